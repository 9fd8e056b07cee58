"""Names that configs of version 0.1 use; see `lightning_xai.training` and `lightning_xai.evaluation`."""

from lightning_xai.evaluation import AttributionEvaluation
from lightning_xai.training import ContrastiveFineTuning

__all__ = ["AttributionEvaluation", "ContrastiveFineTuning"]
