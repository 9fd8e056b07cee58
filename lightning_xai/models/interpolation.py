"""Weights between those of a model and of its fine-tuned version: WiSE-FT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_xai.models.architecture import differing_settings
from lightning_xai.models.dual_encoder import DualEncoder

__all__ = ["check_same_model", "interpolated"]

_PARTS = ("library", "model_cfg", "preprocess_cfg")
_INITIAL = {"model_cfg.init_logit_scale", "model_cfg.init_logit_bias"}  # training has replaced these
_ADDED = {"logit_bias"}  # a training with the sigmoid loss adds it to models without one


def check_same_model(base: DualEncoder, tuned: DualEncoder) -> None:
    """Refuse two models whose weights do not mean the same.

    Raises:
        ValueError: architecture, activation or preprocessing differ; the message names the settings.
    """
    first, second = ({part: encoder.architecture.get(part) for part in _PARTS} for encoder in (base, tuned))
    differing = differing_settings(first, second) - _INITIAL
    if differing:
        raise ValueError(
            f"the two models differ in {', '.join(sorted(differing))}, so that weights between theirs have no meaning: "
            f"give a {base.name} and what was fine-tuned from it"
        )
    own, other = ({key: tuple(x.shape) for key, x in encoder.model.state_dict().items()} for encoder in (base, tuned))
    names = {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)} - _ADDED
    if names:
        raise ValueError(f"the two models differ in {len(names)} tensors, such as {min(names)}: give the same model")


def interpolated(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The weights `(1 - alpha) * base + alpha * tuned` of Wortsman et al. (2022), Equation 1.

    Buffers such as batch statistics are interpolated, too, and the logit scale as it is stored, as a logarithm. Whole
    numbers (counts of batches, positions), and tensors that base lacks, are tuned's. Computed in float64; 0 and 1 give
    the weights that came in, bit for bit, and so does a tensor that both share.

    Args:
        base: names and tensors.
        tuned: the same names, and maybe more.
        alpha: in [0, 1].

    Example:
        >>> interpolated({"a": torch.tensor([0.0, 1.0])}, {"a": torch.tensor([2.0, 1.0])}, 0.25)["a"]
        tensor([0.5000, 1.0000])
    """
    return {name: _between(base.get(name, tensor), tensor, alpha) for name, tensor in tuned.items()}


def _between(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    if not tuned.is_floating_point() or alpha == 1:
        return tuned.clone()
    if alpha == 0:
        return base.clone()
    between = torch.lerp(base.double(), tuned.double(), alpha).to(tuned.dtype)
    return torch.where(base == tuned, tuned, between)  # masks hold infinities, whose difference is no number
