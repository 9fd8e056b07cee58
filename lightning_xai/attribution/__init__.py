from lightning_xai.attribution.base import Attribution
from lightning_xai.attribution.feature_pair import FeaturePairAttribution, HiddenStates, References
from lightning_xai.attribution.path_integral import quadrature

__all__ = ["Attribution", "FeaturePairAttribution", "HiddenStates", "References", "quadrature"]
