"""Attribution methods, what they return, and what they explain.

Names are loaded when they are first used: a method costs no time where another one is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_xai.attribution.attention_relevance import AttentionRelevance
    from lightning_xai.attribution.banzhaf import BanzhafAttribution, BanzhafInteractions
    from lightning_xai.attribution.base import (
        Attribution,
        AttributionMethod,
        ConstantMapWarning,
        ImageComparison,
        InteractionAttribution,
        OtherCaptions,
        UnsupportedTargetError,
    )
    from lightning_xai.attribution.baselines import CentredGaussian, RandomMap
    from lightning_xai.attribution.clip_surgery import CLIPSurgery
    from lightning_xai.attribution.feature_pair import (
        FeaturePairAttribution,
        FeaturePairs,
        SimilarityGradCAM,
    )
    from lightning_xai.attribution.grad_cam import GradCAM
    from lightning_xai.attribution.grad_eclip import GradECLIP
    from lightning_xai.attribution.integrated_gradients import IntegratedGradients
    from lightning_xai.attribution.kernel_shap import KernelSHAP
    from lightning_xai.attribution.legrad import LeGrad
    from lightning_xai.attribution.m2ib import M2IB
    from lightning_xai.attribution.mask_clip import MaskCLIP
    from lightning_xai.attribution.nib import NIB
    from lightning_xai.attribution.one_tower import Input, OneTowerMethod
    from lightning_xai.attribution.pairwise import HiddenStates, IntraModalAttribution, PairwiseMethod, References
    from lightning_xai.attribution.path_integral import quadrature
    from lightning_xai.attribution.registry import METHODS
    from lightning_xai.attribution.rise import RISE
    from lightning_xai.attribution.rollout import AttentionRollout
    from lightning_xai.attribution.saliency import Saliency
    from lightning_xai.attribution.score import Score
    from lightning_xai.attribution.targets import (
        TARGETS,
        Contrast,
        PairSimilarities,
        Probability,
        Similarity,
        Target,
    )
    from lightning_xai.heat_maps import min_max, upsample

__all__ = [
    "M2IB",
    "METHODS",
    "NIB",
    "RISE",
    "TARGETS",
    "AttentionRelevance",
    "AttentionRollout",
    "Attribution",
    "AttributionMethod",
    "BanzhafAttribution",
    "BanzhafInteractions",
    "CLIPSurgery",
    "CentredGaussian",
    "ConstantMapWarning",
    "Contrast",
    "FeaturePairAttribution",
    "FeaturePairs",
    "GradCAM",
    "GradECLIP",
    "HiddenStates",
    "ImageComparison",
    "Input",
    "IntegratedGradients",
    "InteractionAttribution",
    "IntraModalAttribution",
    "KernelSHAP",
    "LeGrad",
    "MaskCLIP",
    "OneTowerMethod",
    "OtherCaptions",
    "PairSimilarities",
    "PairwiseMethod",
    "Probability",
    "RandomMap",
    "References",
    "Saliency",
    "Score",
    "Similarity",
    "SimilarityGradCAM",
    "Target",
    "UnsupportedTargetError",
    "min_max",
    "quadrature",
    "upsample",
]

_MODULES = {
    "lightning_xai.attribution.attention_relevance": ("AttentionRelevance",),
    "lightning_xai.attribution.banzhaf": ("BanzhafAttribution", "BanzhafInteractions"),
    "lightning_xai.attribution.base": (
        "Attribution",
        "AttributionMethod",
        "ConstantMapWarning",
        "ImageComparison",
        "InteractionAttribution",
        "OtherCaptions",
        "UnsupportedTargetError",
    ),
    "lightning_xai.attribution.baselines": ("CentredGaussian", "RandomMap"),
    "lightning_xai.attribution.clip_surgery": ("CLIPSurgery",),
    "lightning_xai.attribution.feature_pair": ("FeaturePairAttribution", "FeaturePairs", "SimilarityGradCAM"),
    "lightning_xai.attribution.grad_cam": ("GradCAM",),
    "lightning_xai.attribution.grad_eclip": ("GradECLIP",),
    "lightning_xai.attribution.integrated_gradients": ("IntegratedGradients",),
    "lightning_xai.attribution.kernel_shap": ("KernelSHAP",),
    "lightning_xai.attribution.legrad": ("LeGrad",),
    "lightning_xai.attribution.m2ib": ("M2IB",),
    "lightning_xai.attribution.mask_clip": ("MaskCLIP",),
    "lightning_xai.attribution.nib": ("NIB",),
    "lightning_xai.attribution.one_tower": ("Input", "OneTowerMethod"),
    "lightning_xai.attribution.pairwise": ("HiddenStates", "IntraModalAttribution", "PairwiseMethod", "References"),
    "lightning_xai.attribution.path_integral": ("quadrature",),
    "lightning_xai.attribution.registry": ("METHODS",),
    "lightning_xai.attribution.rise": ("RISE",),
    "lightning_xai.attribution.rollout": ("AttentionRollout",),
    "lightning_xai.attribution.saliency": ("Saliency",),
    "lightning_xai.attribution.score": ("Score",),
    "lightning_xai.attribution.targets": (
        "Contrast",
        "PairSimilarities",
        "Probability",
        "Similarity",
        "TARGETS",
        "Target",
    ),
    "lightning_xai.heat_maps": ("min_max", "upsample"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, those that are not imported yet included."""
    return sorted({*globals(), *__all__})
