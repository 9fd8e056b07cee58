"""The symmetric contrastive loss of CLIP, on one process and over all ranks, whose gradient is the same.

Shapes: B rows on this rank, W ranks, K embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["contrastive_loss", "gather_features", "global_contrastive_loss"]


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

    Warns:
        UserWarning: a single row, of which nothing can be learned.

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
    valid = check_features(image_features, text_features, valid)
    if len(valid) == 1 and image_features.requires_grad:
        warnings.warn("a batch of one pair has no negatives: its loss and gradient are zero", stacklevel=2)
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = known_features(image_features, text_features, valid)
        logits = logit_scale.to(image.dtype) * (image @ text.T)
        loss, right = _sums((logits if images else logits.T for images in (True, False)), valid, valid)
        count = valid.sum()
        return loss / (2 * count.clamp(min=1)), right / (2 * count)


def global_contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """`contrastive_loss` of the rows of all ranks, of which each rank compares its own with everyone's.

    Memory and time of a rank grow with B x W * B, not with the square of the global batch. DistributedDataParallel and
    FSDP2 average gradients: they then are those of one process that has all rows.

    Args:
        image_features: [B, K], unit length; the same B on every rank (pad with invalid rows).
        text_features: [B, K], unit length.
        logit_scale: as for `contrastive_loss`.
        valid: [B] bool.

    Returns:
        Loss and accuracy of `contrastive_loss` for all W * B rows, the same on every rank.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    valid = check_features(image_features, text_features, valid)
    if rank_and_world()[1] == 1:
        return contrastive_loss(image_features, text_features, logit_scale, valid)
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = known_features(image_features, text_features, valid)
        images, texts, everyone = gather_features(image, text, valid)
        # The scale goes to the features, which are few: with the matrix, its gradient would keep one more. And a matrix
        # is made only when the one before has been used up.
        directions = ((logit_scale.to(own.dtype) * own) @ others.T for own, others in ((image, texts), (text, images)))
        sums = torch.stack(_sums(directions, valid, everyone, rank_and_world()[0] * len(valid)))
        loss, right = sum_over_ranks(sums)
        count = everyone.sum()
        return loss / (2 * count.clamp(min=1)), right.detach() / (2 * count)


def check_features(image_features: Tensor, text_features: Tensor, valid: Tensor | None) -> Tensor:
    """`valid`, or all rows where it is left out."""
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
    return valid


def known_features(images: Tensor, texts: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """At least float32, and zero in invalid rows: a NaN in one would otherwise reach the gradient of the others."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    return images.to(dtype).masked_fill(~valid[:, None], 0), texts.to(dtype).masked_fill(~valid[:, None], 0)


def _sums(directions: Iterable[Tensor], valid: Tensor, everyone: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Cross entropy and hits, summed over valid rows and over directions: in each, row i belongs to column `first` + i.

    Args:
        directions: logits [B, G] of this rank's rows with those of all ranks.
        valid: [B] bool.
        everyone: [G] bool, `valid` of all ranks.
        first: this rank's first row among all.
    """
    own = torch.arange(first, first + len(valid), device=valid.device)
    hidden = valid[:, None] & ~everyone  # one matrix for both directions, which the backward pass keeps
    losses, right = [], []
    for logits in directions:
        # Invalid rows keep finite logits, as in `hide_columns`.
        logits = logits.masked_fill(hidden, -torch.inf)
        losses.append(cross_entropy(logits, own, reduction="none"))
        right.append(own_is_largest(logits.detach(), own) & valid)
    loss = torch.stack(losses).sum(dim=0).masked_fill(~valid, 0).sum()
    return loss, torch.stack(right).sum().to(loss.dtype)


def hide_columns(logits: Tensor, hidden: Tensor, valid: Tensor) -> Tensor:
    """Logits [B, G] with -inf where `hidden` ([G] or [B, G] bool) says so.

    Invalid rows keep finite logits, and their loss has to be dropped: all -inf would put NaN into the graph.
    """
    return logits.masked_fill(valid[:, None] & hidden, -torch.inf)


def own_is_largest(logits: Tensor, own: Tensor) -> Tensor:
    """[B, G] logits -> [B] bool: column `own` exceeds every other one of its row (never where it is NaN)."""
    smaller = logits < logits.gather(1, own[:, None])
    return smaller.sum(dim=1) == logits.shape[1] - 1


def gather_features(image_features: Tensor, text_features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The features of all ranks in rank order, with the gradient flowing back to the rank that made them.

    A rank receives the sum of the W ranks' gradients of its rows. One collective carries both towers, so that its order
    in the backward pass is the same on all ranks.

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
    if rank_and_world()[1] == 1:
        return image_features, text_features, valid
    width = image_features.shape[1]
    rows = torch.cat([image_features, text_features, valid[:, None].to(image_features.dtype)], dim=1)
    gathered = gather_rows(rows)
    return gathered[:, :width], gathered[:, width : 2 * width], gathered[:, -1] > 0.5


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [B, F] of all ranks, [W * B, F], in rank order; gradients flow back to the rank that made them."""
    return rows if rank_and_world()[1] == 1 else cast(Tensor, _GatherRows.apply(rows))


def gather_uneven_rows(rows: Tensor) -> tuple[Tensor, int]:
    """`gather_rows` of any number of rows [R, F] on each rank, and the place of this rank's first row among them."""
    rank, world = rank_and_world()
    if world == 1:
        return rows, 0
    sizes = gather_rows(torch.tensor([[len(rows)]], device=rows.device))[:, 0].tolist()
    most = max(1, *sizes)  # no backend is asked to gather nothing
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = gather_rows(padded).chunk(world)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sum(sizes[:rank])


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks of values [N] that all go on alike with; gradients suit averaging over ranks."""
    return values if rank_and_world()[1] == 1 else cast(Tensor, _SumOverRanks.apply(values))


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


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


class _SumOverRanks(torch.autograd.Function):
    """[N] -> [N], the same on all ranks. All go on alike with it, so that the sum of their gradients is W times each.

    DistributedDataParallel's average takes the factor W out again.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()
