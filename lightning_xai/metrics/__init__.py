from lightning_xai.metrics.grounding import ClassGrounding, GroundingMetric, GroundingSummary, gamma, patch_mask, rho
from lightning_xai.metrics.map_similarity import spearman, ssim
from lightning_xai.metrics.retrieval import RetrievalMetric, recall_at_k

__all__ = [
    "ClassGrounding",
    "GroundingMetric",
    "GroundingSummary",
    "RetrievalMetric",
    "gamma",
    "patch_mask",
    "recall_at_k",
    "rho",
    "spearman",
    "ssim",
]
