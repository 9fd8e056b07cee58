from lightning_xai.evaluation.attribution_evaluation import AttributionEvaluation
from lightning_xai.evaluation.zero_shot import ZeroShot, ZeroShotResult, zero_shot_classifier

__all__ = ["AttributionEvaluation", "ZeroShot", "ZeroShotResult", "zero_shot_classifier"]
