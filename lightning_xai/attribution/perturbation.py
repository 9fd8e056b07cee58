"""What methods share that only run the model, on inputs with parts taken away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def forward_only() -> Iterator[None]:
    """No gradients, and every attention kernel again: inside `differentiable` only the slow one is allowed."""
    with torch.no_grad(), sdpa_kernel(_FASTEST_FIRST):
        yield


def without_tokens(tokens_L: Tensor, kept_NL: Tensor, padding_id: int) -> Tensor:
    """A caption's tokens [L] in N versions, each with padding in place of what is not kept: [N, L]."""
    return torch.where(kept_NL, tokens_L, padding_id)
