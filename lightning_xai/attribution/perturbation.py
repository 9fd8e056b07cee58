"""Shared parts of methods that only run the model, on inputs with parts taken away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_EVERY_KERNEL = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def wide_dtype(embeddings: Tensor) -> torch.dtype:
    """The type to sum many similarities in: float32, or wider where the embeddings are."""
    return torch.promote_types(embeddings.dtype, torch.float32)


@contextmanager
def forward_only() -> Iterator[None]:
    """No gradients, and everything that is fast without them; undone on leaving, also after an exception.

    Inside `differentiable` attention is slow for the sake of its derivatives: about 15 % of a ViT-B/32's time on a CPU.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        with torch.no_grad(), sdpa_kernel(_EVERY_KERNEL):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def only_tokens(tokens: Tensor, kept: Tensor, padding_id: int) -> Tensor:
    """Token ids with padding in place of what is not kept: one caption [L] for each mask [N, L], or one mask each."""
    return torch.where(kept, tokens, padding_id)
