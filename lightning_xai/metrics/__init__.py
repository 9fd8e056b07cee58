from lightning_xai.metrics.base import (
    CaptionTargets,
    CollageTargets,
    MetricSpec,
    NegativeTargets,
    PhrasePairTargets,
    PhraseTargets,
    ScoreMetric,
)
from lightning_xai.metrics.caption_choice import (
    Choice,
    ChoiceScores,
    choice_scores,
    pair_choice,
    right_choices,
)
from lightning_xai.metrics.confidence import ConfidenceMetric, confidence_drop, confidence_increase
from lightning_xai.metrics.grounding import (
    GroundingMetric,
    GroundingSummary,
    box_attribution,
    gamma,
    patch_mask,
    rho,
)
from lightning_xai.metrics.hard_negatives import HardNegativesMetric
from lightning_xai.metrics.localization import LocalizationMetric, binarised, box_union, intersection_over_union
from lightning_xai.metrics.map_similarity import spearman, ssim
from lightning_xai.metrics.mask_grounding import mask_patches, patch_shares
from lightning_xai.metrics.mask_localization import pixel_average_precision
from lightning_xai.metrics.other_objects import OtherObjectsMetric, directed_pairs
from lightning_xai.metrics.registry import METRICS
from lightning_xai.metrics.retrieval import RetrievalMetric, recall_at_k

__all__ = [
    "METRICS",
    "CaptionTargets",
    "Choice",
    "ChoiceScores",
    "CollageTargets",
    "ConfidenceMetric",
    "GroundingMetric",
    "GroundingSummary",
    "HardNegativesMetric",
    "LocalizationMetric",
    "MetricSpec",
    "NegativeTargets",
    "OtherObjectsMetric",
    "PhrasePairTargets",
    "PhraseTargets",
    "RetrievalMetric",
    "ScoreMetric",
    "binarised",
    "box_attribution",
    "box_union",
    "choice_scores",
    "confidence_drop",
    "confidence_increase",
    "directed_pairs",
    "gamma",
    "intersection_over_union",
    "mask_patches",
    "pair_choice",
    "patch_mask",
    "patch_shares",
    "pixel_average_precision",
    "recall_at_k",
    "rho",
    "right_choices",
    "spearman",
    "ssim",
]
