from lightning_xai.attribution.base import Attribution, ConstantMapWarning, Method, PairAttribution, min_max, upsample
from lightning_xai.attribution.feature_pair import (
    FeaturePairAttribution,
    HiddenStates,
    IntraModalAttribution,
    References,
    SimilarityGradCAM,
)
from lightning_xai.attribution.path_integral import quadrature

__all__ = [
    "Attribution",
    "ConstantMapWarning",
    "FeaturePairAttribution",
    "HiddenStates",
    "IntraModalAttribution",
    "Method",
    "PairAttribution",
    "References",
    "SimilarityGradCAM",
    "min_max",
    "quadrature",
    "upsample",
]
