from lightning_xai.evaluation.attribution_evaluation import AttributionEvaluation

__all__ = ["AttributionEvaluation"]
