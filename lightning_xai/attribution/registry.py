"""The attribution methods by name, and the contract that a method of another package has to keep.

A new built-in method is one file in this package and one entry in `METHODS`.
"""

from __future__ import annotations

import inspect
from typing import Any

from lightning_xai.attribution.base import AttributionMethod
from lightning_xai.attribution.pairwise import PairwiseMethod
from lightning_xai.registry import Registry

__all__ = ["ALL", "METHODS", "check_method_class"]

ALL = "all"
"""The name that stands for every method."""

_GROUP = "lightning_xai.methods"
_FLAGS = ("signed", "pairwise", "intra_modal", "stochastic", "baseline", "has_zero")


def check_method_class(name: str, entry: Any) -> None:
    """Raise a ValueError that states the rule which a method of another package breaks.

    Args:
        name: of the entry.
        entry: what it names.
    """
    if not name.isidentifier() or name == ALL:
        raise ValueError(f"a method's name consists of letters, digits and underscores, and is not {ALL!r}")
    if not (isinstance(entry, type) and issubclass(entry, AttributionMethod)):
        raise ValueError(f"a method is a subclass of lightning_xai.attribution.AttributionMethod; got {entry!r}")
    if entry.__abstractmethods__:
        raise ValueError(f"a method implements {', '.join(sorted(entry.__abstractmethods__))}")
    if not entry.attribute.__module__.startswith("lightning_xai."):
        raise ValueError("a method implements `_attribute`; `attribute` checks what it returns, so leave that as it is")
    for flag in _FLAGS:
        if not isinstance(getattr(entry, flag), bool):
            raise ValueError(f"the flag `{flag}` is True or False; got {getattr(entry, flag)!r}")
    if entry.pairwise != issubclass(entry, PairwiseMethod):
        raise ValueError("a method is `pairwise` where it derives from lightning_xai.attribution.PairwiseMethod")
    unchanged = [name for name in ("attribute_images", "attribute_texts") if _inherits(entry, name)]
    if entry.intra_modal and unchanged:
        raise ValueError(f"an `intra_modal` method implements {' and '.join(unchanged)}")
    _check_options(entry)
    # For messages of `attribute`.
    entry.origin = f"plug-in {METHODS.origin(name)}, entry {name!r} of {_GROUP}"


def _inherits(entry: type[AttributionMethod], name: str) -> bool:
    return getattr(entry, name, None) in (None, getattr(PairwiseMethod, name))


def _check_options(entry: type[AttributionMethod]) -> None:
    encoder, *options = inspect.signature(entry).parameters.values()
    if encoder.name != "encoder" or encoder.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise ValueError("the constructor takes `encoder` first")
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    nameless = [option.name for option in options if option.kind in by_position]
    if nameless:
        raise ValueError(f"the constructor takes its options by name; {', '.join(nameless)} cannot be given so")
    named = [option for option in options if option.kind is not inspect.Parameter.VAR_KEYWORD]
    required = [option.name for option in named if option.default is inspect.Parameter.empty]
    if required:
        raise ValueError(f"every option has a default; {', '.join(required)} has none")
    if entry.stochastic != any(option.name == "seed" for option in options):
        raise ValueError("a method is `stochastic` where its constructor has an option `seed`, and only there")


METHODS: Registry[type[AttributionMethod]] = Registry(
    "attribution method",
    {
        "feature_pair": "lightning_xai.attribution.feature_pair:FeaturePairAttribution",
        "m2ib": "lightning_xai.attribution.m2ib:M2IB",
        "grad_cam": "lightning_xai.attribution.grad_cam:GradCAM",
        "similarity_grad_cam": "lightning_xai.attribution.feature_pair:SimilarityGradCAM",
        "attention_relevance": "lightning_xai.attribution.attention_relevance:AttentionRelevance",
        "grad_eclip": "lightning_xai.attribution.grad_eclip:GradECLIP",
        "legrad": "lightning_xai.attribution.legrad:LeGrad",
        "mask_clip": "lightning_xai.attribution.mask_clip:MaskCLIP",
        "clip_surgery": "lightning_xai.attribution.clip_surgery:CLIPSurgery",
        "nib": "lightning_xai.attribution.nib:NIB",
        "rollout": "lightning_xai.attribution.rollout:AttentionRollout",
        "saliency": "lightning_xai.attribution.saliency:Saliency",
        "integrated_gradients": "lightning_xai.attribution.integrated_gradients:IntegratedGradients",
        "kernel_shap": "lightning_xai.attribution.kernel_shap:KernelSHAP",
        "rise": "lightning_xai.attribution.rise:RISE",
        "banzhaf_pairs": "lightning_xai.attribution.banzhaf:BanzhafInteractions",
        "random": "lightning_xai.attribution.baselines:RandomMap",
        "gaussian": "lightning_xai.attribution.baselines:CentredGaussian",
    },
    group=_GROUP,
    check=check_method_class,
)
"""Every method by the name that commands and configs use."""
