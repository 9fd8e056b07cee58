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
