from lightning_xai.attribution.base import Attribution, ConstantMapWarning, Method, PairAttribution, min_max, upsample
from lightning_xai.attribution.feature_pair import (
    FeaturePairAttribution,
    HiddenStates,
    IntraModalAttribution,
    References,
    SimilarityGradCAM,
)
from lightning_xai.attribution.path_integral import quadrature

METHODS: dict[str, type[Method]] = {
    "feature_pair": FeaturePairAttribution,
    "similarity_grad_cam": SimilarityGradCAM,
}
"""Every method by the name that commands and configs use."""

__all__ = [
    "METHODS",
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
