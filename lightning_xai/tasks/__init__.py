from lightning_xai.tasks.attribution_evaluation import AttributionEvaluation
from lightning_xai.tasks.contrastive import ContrastiveFineTuning

__all__ = ["AttributionEvaluation", "ContrastiveFineTuning"]
