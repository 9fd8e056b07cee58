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


def only_tokens(tokens: Tensor, kept: Tensor, padding_id: int) -> Tensor:
    """Token ids with padding in place of what is not kept: one caption [L] for each mask [N, L], or one mask each."""
    return torch.where(kept, tokens, padding_id)
