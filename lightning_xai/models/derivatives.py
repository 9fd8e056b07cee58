"""Parts of a transformer's block, applied to values together with their derivatives along several directions.

Both stand in one tensor [B, 1 + S, ..., D]: first the value, then its S derivatives, so that a linear layer reads its
weights once for all of them. Everything here is elementary, so that results can be differentiated again.

Shape suffixes: B batch, S directions, D width.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import torch
from open_clip.transformer import LayerNorm, LayerNormFp32, LayerScale, QuickGELU
from timm.layers.norm import LayerNorm as TimmLayerNorm
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import type_before_parametrizations

_ACTIVATIONS = (nn.GELU, QuickGELU)
_SCALES = (nn.Identity, LayerScale)
LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32, TimmLayerNorm)
"""The classes that are PyTorch's layer norm, in whichever precision."""


def is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Return whether a module is of just one of these classes, its weights parametrized, as by low-rank adapters."""
    plain: type[nn.Module] = type_before_parametrizations(module)
    return plain in kinds


def is_norm(module: Any) -> bool:
    """Return whether this is a layer norm with scale and shift, which `norm` serves."""
    return is_plain(module, *LAYER_NORMS) and module.weight is not None and module.bias is not None


def is_scale(module: Any) -> bool:
    """Return whether a module multiplies by a weight or not at all, so that derivatives can be put through it."""
    return is_plain(module, *_SCALES)


def is_mlp(module: Any) -> bool:
    """Return whether `mlp` serves a module."""
    if not is_plain(module, nn.Sequential) or len(module) != 3:
        return False
    first, activation, second = module
    return is_plain(first, nn.Linear) and is_plain(activation, *_ACTIVATIONS) and is_plain(second, nn.Linear)


def shift(both: Tensor, constant: Tensor) -> Tensor:
    """Add a constant, which no derivative knows."""
    return torch.cat([both[:, :1] + constant, both[:, 1:]], dim=1) if both.shape[1] > 1 else both + constant


def linear(both: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer, [B, 1 + S, ..., D] -> [B, 1 + S, ..., E]."""
    if bias is None or both.shape[1] == 1:
        return functional.linear(both, weight, bias)
    return shift(functional.linear(both, weight), bias)


def norm(both: Tensor, module: nn.LayerNorm) -> Tensor:
    """A layer norm of the last axis."""
    value: Tensor = module(both[:, :1])
    if both.shape[1] == 1:
        return value
    # The squares of float16 overflow from 256 on.
    wide = both.to(torch.promote_types(both.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    inverse_std = torch.rsqrt(centred[:, :1].square().mean(dim=-1, keepdim=True) + module.eps)
    normal, change = centred[:, :1] * inverse_std, centred[:, 1:]
    change = (change - normal * (normal * change).mean(dim=-1, keepdim=True)) * inverse_std
    return torch.cat([value, (change * module.weight).to(value.dtype)], dim=1)


def mlp(both: Tensor, module: nn.Sequential) -> Tensor:
    """Two linear layers with an activation between them."""
    first: Any
    second: Any
    first, activation, second = module
    hidden = linear(both, first.weight, first.bias)
    value: Tensor = activation(hidden[:, :1])
    if both.shape[1] > 1:
        value = torch.cat([value, _slope(hidden[:, :1], activation) * hidden[:, 1:]], dim=1)
    return linear(value, second.weight, second.bias)


def _slope(x: Tensor, activation: nn.Module) -> Tensor:
    """The derivative of an activation."""
    if isinstance(activation, QuickGELU):
        gate = torch.sigmoid(1.702 * x)
        return gate * (1 + 1.702 * x * (1 - gate))
    assert isinstance(activation, nn.GELU)
    if activation.approximate == "none":
        return 0.5 * (1 + torch.erf(x / sqrt(2))) + x * torch.exp(-x.square() / 2) / sqrt(2 * pi)
    inner_slope = sqrt(2 / pi) * (1 + 3 * 0.044715 * x.square())
    tanh = torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * inner_slope
