"""Low-rank adapters of weight matrices (LoRA, Hu et al. 2021): W + (alpha / r) B A, of which only A and B learn.

They are parametrizations: whatever reads a weight reads the adapted one. So nn.MultiheadAttention, whose projections
are bare parameters, and attributions, which read weights, see the model that is trained. peft's adapters change the
forward pass of nn.Linear alone, and in nn.MultiheadAttention write W + B A in place of W and subtract it again in each
pass, which derivatives along a path cannot follow, and which moves the frozen W by rounding errors.

Shapes: W [out, in], A [r, in], B [out, r].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

__all__ = ["Adapter", "LowRank", "adapt", "adapter_shapes", "matrices", "merged_state", "without_adapters"]

_ORIGINAL = re.compile(r"(?P<module>(?:.*\.)?)parametrizations\.(?P<weight>[^.]+)\.original")


class Adapter(NamedTuple):
    """What is added to a weight [out, in]: scaling * lora_B @ lora_A.

    Attributes:
        lora_A: A [r, in].
        lora_B: B [out, r].
        scaling: alpha / r, a scalar.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor


class LowRank(nn.Module):
    """The map W -> W + (alpha / r) B A of one weight matrix.

    B begins with zeros, so that the adapted weight begins as W, bit for bit.

    Args:
        weight: W [out, in], of whose type and on whose device the adapter is.
        rank: r.
        alpha: the factor on B A, times r.
    """

    scaling: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear and peft begin
        # In the state dict, so that a checkpoint can be merged without its config.
        self.register_buffer("scaling", weight.new_tensor(alpha / rank))

    def forward(self, weight: Tensor) -> Tensor:
        """W [out, in] -> the adapted weight [out, in], which autocast leaves as precise as W is."""
        with torch.autocast(weight.device.type, enabled=False):
            return _adapted(weight, self.lora_A, self.lora_B, self.scaling)


def _adapted(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor) -> Tensor:
    # One pass over the matrix: the factor is on the small one.
    return torch.addmm(weight, scaling * lora_B, lora_A)


def matrices(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of modules, each with that of a parameter that can be adapted: linear layers, attention's projections."""
    for name, module in model.named_modules():
        for weight, value in module.named_parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear) and weight == "weight"
            if value.ndim == 2 and (is_linear or weight.endswith("proj_weight")):
                yield name, weight


def adapt(model: nn.Module, module: str, weight: str, rank: int, alpha: float) -> dict[str, str]:
    """Adapt a weight, and freeze it.

    Returns:
        The names of the new parameters, and that of the weight under its new name, each with the weight's former name.
    """
    part = model.get_submodule(module)
    original: Tensor = getattr(part, weight)
    original.requires_grad_(False)
    register_parametrization(part, weight, LowRank(original, rank, alpha))
    prefix = f"{module}." if module else ""
    inside = f"{prefix}parametrizations.{weight}"
    return dict.fromkeys((f"{inside}.original", f"{inside}.0.lora_A", f"{inside}.0.lora_B"), f"{prefix}{weight}")


def adapter_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of the adapters in a state dict, by name; empty where there are none."""
    return {name: value.shape for name, value in state.items() if name.endswith((".lora_A", ".lora_B"))}


def merged_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which adapted weights have taken the places of weights and adapters; others stay as they are.

    Raises:
        ValueError: shapes of a weight and its adapter that do not go together.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = adapt(layer, "", "weight", rank=1, alpha=1.0)
        >>> sorted(merged_state(layer.state_dict()))
        ['bias', 'weight']
    """
    merged, adapters = without_adapters(state)
    for name, adapter in adapters.items():
        merged[name] = _merged(name, merged[name], adapter)
    return merged


def _merged(name: str, weight: Tensor, adapter: Adapter) -> Tensor:
    try:
        return _adapted(weight, *adapter)
    except RuntimeError as error:
        raise ValueError(f"the low-rank adapter of {name} does not fit its weight: {error}") from error


def without_adapters(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """A state dict of the weights below the adapters, under their plain names, and the adapters by these names."""
    base, adapters = dict(state), {}
    for found in filter(None, map(_ORIGINAL.fullmatch, state)):
        inside, plain = found[0].removesuffix("original"), f"{found['module']}{found['weight']}"
        names = [f"{inside}0.{name}" for name in Adapter._fields]
        if all(name in state for name in names):  # else another parametrization
            base[plain] = base.pop(found[0])
            adapters[plain] = Adapter(*(base.pop(name) for name in names))
    return base, adapters
