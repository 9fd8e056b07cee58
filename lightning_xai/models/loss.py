"""The symmetric contrastive loss of CLIP, and the gathering of features over ranks that keeps its gradient exact.

Shapes: B rows on this rank, W ranks, K embedding width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["contrastive_loss", "gather_features"]


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric cross entropy of matching every image to its caption and every caption to its image.

    Row i of both feature matrices belongs together. Invalid rows (padding, broken records) are neither examples nor
    negatives, whatever they hold, and receive no gradient. The loss is computed in float32 (float64 for float64
    features), also inside autocast: a logit near 100 has a step of 0.5 in bfloat16.

    Args:
        image_features: [B, K], unit length.
        text_features: [B, K], unit length.
        logit_scale: scalar factor of the cosine similarities (the exponential already taken).
        valid: [B] bool; all rows are valid when it is left out.

    Returns:
        The loss in nats (lower is better), the mean over valid rows and both directions: a zero that still has a
        graph if no row is valid, so that every rank can run its backward pass. And the accuracy in [0, 1] (higher is
        better, no gradient): the share of valid rows, averaged over both directions, whose own partner is more
        similar than every other one; a tie is a miss. It is NaN if no row is valid: nothing was there to get right.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> features = torch.eye(3)
        >>> loss, accuracy = contrastive_loss(features, features, torch.tensor(10.0))
        >>> round(loss.item(), 6), accuracy.item()  # log(1 + 2 exp(-10))
        (9.1e-05, 1.0)
        >>> swapped = features[[1, 0, 2]]
        >>> contrastive_loss(features, swapped, torch.tensor(10.0), torch.tensor([True, False, False]))
        (tensor(0.), tensor(1.))
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "contrastive_loss expects image and text features of one shape [B, K], row by row a pair; got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    batch = image_features.shape[0]
    if valid is None:
        valid = torch.ones(batch, dtype=torch.bool, device=image_features.device)
    if valid.shape != (batch,) or valid.dtype != torch.bool:
        raise ValueError(f"valid has to be [{batch}] bool; got {tuple(valid.shape)} {valid.dtype}")
    with torch.autocast(image_features.device.type, enabled=False):
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        # Filled before the product: a NaN in a padding row would otherwise reach the gradient of the others.
        image = image_features.to(dtype).masked_fill(~valid[:, None], 0)
        text = text_features.to(dtype).masked_fill(~valid[:, None], 0)
        logits = logit_scale.to(dtype) * (image @ text.T)
        # Invalid rows keep finite logits (their loss is dropped below): all -inf would put NaN into the graph.
        hidden = valid[:, None] & ~valid[None, :]
        per_image = logits.masked_fill(hidden, -torch.inf)
        per_text = logits.T.masked_fill(hidden, -torch.inf)
        own = torch.arange(batch, device=logits.device)
        losses = cross_entropy(per_image, own, reduction="none") + cross_entropy(per_text, own, reduction="none")
        count = valid.sum()
        loss = losses.masked_fill(~valid, 0).sum() / (2 * count.clamp(min=1))
        right = (_own_is_largest(per_image) & valid).sum() + (_own_is_largest(per_text) & valid).sum()
        return loss, right.to(dtype) / (2 * count)


def _own_is_largest(logits: Tensor) -> Tensor:
    """[B, B] logits -> [B] bool: the diagonal entry exceeds every other one of its row (never where it is NaN)."""
    smaller = logits.detach() < logits.detach().diagonal()[:, None]
    return smaller.sum(dim=1) == logits.shape[0] - 1


def gather_features(image_features: Tensor, text_features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The features of all ranks in rank order, with the gradient flowing back to the rank that made them.

    When every rank takes the same loss of what this returns and DistributedDataParallel averages the gradients, the
    parameters get exactly the gradient of one process with the whole batch: a rank receives the sum of the W ranks'
    gradients of its rows, and the average takes the factor W out again. One collective carries both towers, so that
    its order in the backward pass is the same on all ranks.

    Args:
        image_features: [B, K], the same B on every rank (pad with invalid rows).
        text_features: [B, K], of the images' dtype.
        valid: [B] bool.

    Returns:
        Image features [W * B, K], text features [W * B, K] and valid [W * B]; the arguments themselves if
        torch.distributed is not initialised or there is one rank.

    Raises:
        ValueError: the features differ in shape or dtype.

    Example:
        >>> features, valid = torch.eye(2), torch.tensor([True, True])
        >>> gather_features(features, features, valid)[0] is features
        True
    """
    if image_features.shape != text_features.shape or image_features.dtype != text_features.dtype:
        raise ValueError(
            "gather_features expects image and text features of one shape and dtype; got "
            f"{tuple(image_features.shape)} {image_features.dtype} and "
            f"{tuple(text_features.shape)} {text_features.dtype}"
        )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return image_features, text_features, valid
    width = image_features.shape[1]
    rows = torch.cat([image_features, text_features, valid[:, None].to(image_features.dtype)], dim=1)
    gathered = cast(Tensor, _GatherRows.apply(rows))
    return gathered[:, :width], gathered[:, width : 2 * width], gathered[:, -1] > 0.5


class _GatherRows(torch.autograd.Function):
    """[B, F] -> [W * B, F]. The backward pass sums over ranks with all_reduce, which every backend offers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
        dist.all_gather(list(gathered.unbind(0)), rows.contiguous())
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]
