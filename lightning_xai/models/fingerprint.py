"""A short name for the weights of a model, which differs where weights differ."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from lightning_xai.models.low_rank import merged_state


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers, as 16 hexadecimal digits.

    The same on every device, and of a model with low-rank adapters as of the one that they are merged into.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = weights_fingerprint(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> len(before), weights_fingerprint(layer) == before
        (16, False)
    """
    digest = hashlib.sha256()
    for name, value in sorted(merged_state(model.state_dict()).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
