"""Retrieval in both directions where an image has several captions, and a validation loss free of the world size.

Shapes: N images, C captions, K embedding width. Features have unit length, so products are cosine similarities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_xai.loss import contrastive_loss

__all__ = ["RetrievalMetric", "recall_at_k"]


def recall_at_k(
    image_features: Tensor,
    text_features: Tensor,
    caption_image: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 512,
) -> dict[str, float]:
    """Recall at k of image -> text and text -> image, with all captions of an image counted as its own.

    Text -> image: the share of captions whose image is among the k most similar images. Image -> text: the share of
    images with any own caption among the k most similar captions; own captions do not compete with each other, and
    images without a caption do not count. Ties count against the model, and so does NaN: a collapsed model scores 0.

    Args:
        image_features: [N, K], unit length.
        text_features: [C, K], unit length.
        caption_image: [C] int64, the row of each caption's image.
        ks: numbers of retrieved items.
        chunk: rows of the similarity matrix held at a time; memory grows with chunk * max(N, C).

    Returns:
        `image_to_text_recall_at_{k}` and `text_to_image_recall_at_{k}` in [0, 1], higher is better; NaN if there is no
        caption.

    Raises:
        ValueError: shapes do not fit, a caption's image does not exist, or a k or the chunk is below 1.

    Example:
        >>> images = torch.eye(2)
        >>> texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # the first two belong to the first image
        >>> recall_at_k(images, texts, torch.tensor([0, 0, 1]), ks=[1])
        {'image_to_text_recall_at_1': 1.0, 'text_to_image_recall_at_1': 0.6666666666666666}
    """
    _check_retrieval(image_features, text_features, caption_image, ks, chunk)
    with torch.no_grad(), torch.autocast(image_features.device.type, enabled=False):
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        images, texts = image_features.to(dtype), text_features.to(dtype)
        image_ranks = _ranks_of_best_caption(images, texts, caption_image, chunk)
        text_ranks = _ranks_of_own_image(images, texts, caption_image, chunk)
    return {
        f"{direction}_recall_at_{k}": int((ranks < k).sum()) / len(ranks) if len(ranks) else math.nan
        for direction, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks))
        for k in ks
    }


def _ranks_of_own_image(images: Tensor, texts: Tensor, caption_image: Tensor, chunk: int) -> Tensor:
    """[C] int64: how many other images are at least as similar to a caption as its own."""
    ranks = [torch.empty(0, dtype=torch.int64, device=images.device)]
    for start in range(0, len(texts), chunk):
        own = caption_image[start : start + chunk]
        similarity = texts[start : start + chunk] @ images.T
        threshold = similarity.gather(1, own[:, None])
        # "Not smaller" rather than "at least" counts NaN as well; the own image is always among them.
        ranks.append((~(similarity < threshold)).sum(dim=1) - 1)
    return torch.cat(ranks)


def _ranks_of_best_caption(images: Tensor, texts: Tensor, caption_image: Tensor, chunk: int) -> Tensor:
    """[images with a caption] int64: how many captions of others are at least as similar as an image's best own one."""
    ranks = [torch.empty(0, dtype=torch.int64, device=images.device)]
    queries = caption_image[_sorted_distinct(caption_image)]
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        similarity = images[rows] @ texts.T
        own = rows[:, None] == caption_image
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(similarity < best) & ~own).sum(dim=1))
    return torch.cat(ranks)


def _check_retrieval(
    image_features: Tensor, text_features: Tensor, caption_image: Tensor, ks: Sequence[int], chunk: int
) -> None:
    if image_features.ndim != 2 or text_features.ndim != 2 or image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            "expected image features [N, K] and text features [C, K]; got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    if caption_image.shape != text_features.shape[:1]:
        raise ValueError(f"expected caption_image [{len(text_features)}]; got {tuple(caption_image.shape)}")
    if not ((caption_image >= 0) & (caption_image < len(image_features))).all():
        raise ValueError(
            f"caption_image counts into the {len(image_features)} images; "
            f"got values from {int(caption_image.min())} to {int(caption_image.max())}"
        )
    _check_numbers(ks, chunk=chunk)


def _check_numbers(ks: Sequence[int], **others: int) -> None:
    if not ks or min(*ks, *others.values()) < 1:
        got = "".join(f", {name}={value}" for name, value in others.items())
        raise ValueError(f"ks (at least one) and {' and '.join(others)} have to be 1 or more; got ks={tuple(ks)}{got}")


class RetrievalMetric(Metric):
    """Recall and contrastive loss over a whole split; the same numbers at any world size and batch size.

    Every rank has to call `update` at least once before `compute`, with invalid rows only if it has nothing else:
    torchmetrics cannot gather matrices from a rank that holds none. What is kept is one feature vector per image and
    caption (61 MB for the 5 000 images and 25 000 captions of COCO at width 512).

    Args:
        ks: numbers of retrieved items.
        group_size: images per group of the validation loss: consecutive images of the split in the order of their
            global index, each with its first caption, are each other's negatives.
        chunk: rows of the similarity matrix held at a time.

    Raises:
        ValueError: a k, the group size or the chunk is below 1.

    Example:
        >>> metric = RetrievalMetric(ks=[1], group_size=2)
        >>> features, rows = torch.eye(3), torch.arange(3)
        >>> metric.update(features, features, rows, rows, torch.zeros(3, dtype=torch.int64), torch.tensor(10.0))
        >>> {name: round(value, 6) for name, value in metric.compute().items()}  # doctest: +NORMALIZE_WHITESPACE
        {'image_to_text_recall_at_1': 1.0, 'text_to_image_recall_at_1': 1.0,
         'contrastive_loss': 3e-05, 'accuracy': 1.0}
    """

    full_state_update = False
    is_differentiable = False
    image_features: list[Tensor]
    text_features: list[Tensor]
    image_index: list[Tensor]
    caption_sample: list[Tensor]
    caption_number: list[Tensor]
    logit_scale: Tensor

    def __init__(self, ks: Sequence[int] = (1, 5, 10), group_size: int = 64, chunk: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_numbers(ks, group_size=group_size, chunk=chunk)
        self.ks = tuple(ks)
        self.group_size = group_size
        self.chunk = chunk
        for name in ("image_features", "text_features", "image_index", "caption_sample", "caption_number"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("logit_scale", torch.zeros(()), dist_reduce_fx="max")

    def set_dtype(self, dst_type: str | torch.dtype) -> RetrievalMetric:
        """Does nothing: features are kept in float32 and sample numbers in int64."""
        return self

    def update(
        self,
        image_features: Tensor,
        text_features: Tensor,
        index: Tensor,
        caption_image: Tensor,
        caption_index: Tensor,
        logit_scale: Tensor,
    ) -> None:
        """Add a batch; its invalid images (index -1) and their captions are left out.

        Args:
            image_features: [B, K], unit length.
            text_features: [C, K], unit length.
            index: [B] int64, the sample's global number in the split; -1 marks a row that is not valid.
            caption_image: [C] int64, the row of each caption's image in this batch; -1 marks a row that is not valid.
            caption_index: [C] int64, the caption's number within its sample.
            logit_scale: scalar factor of the cosine similarities; the same for the whole split.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        shapes = [
            tuple(tensor.shape) for tensor in (image_features, text_features, index, caption_image, caption_index)
        ]
        (batch, width), captions = image_features.shape, len(text_features)
        if shapes != [(batch, width), (captions, width), (batch,), (captions,), (captions,)]:
            raise ValueError(f"expected shapes [B, K], [C, K], [B], [C], [C]; got {shapes}")
        sample = torch.cat([index, index.new_full((1,), -1)])[caption_image]  # row -1 is the appended one
        self.image_features.append(image_features.detach().float()[index >= 0])
        self.image_index.append(index[index >= 0])
        self.text_features.append(text_features.detach().float()[sample >= 0])
        self.caption_sample.append(sample[sample >= 0])
        self.caption_number.append(caption_index[sample >= 0])
        self.logit_scale = logit_scale.detach().float().reshape(())

    def compute(self) -> dict[str, float]:
        """Recall in both directions and the loss of fixed groups, on all ranks.

        A sample or caption that came more than once counts once.

        Returns:
            The dict of `recall_at_k`, and `contrastive_loss` and `accuracy` (see `contrastive_loss`) as means over the
            images that have a caption; a smaller last group counts by its size. All NaN if there was no valid row.
        """
        if not len(self.image_index):
            return self._result(torch.empty(0, 1), torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
        index, sample, number = (dim_zero_cat(s) for s in (self.image_index, self.caption_sample, self.caption_number))
        image_rows, caption_rows = _sorted_distinct(index), _sorted_distinct(sample, number)
        images = dim_zero_cat(self.image_features)[image_rows]
        texts = dim_zero_cat(self.text_features)[caption_rows]
        return self._result(images, texts, torch.searchsorted(index[image_rows], sample[caption_rows]))

    def _result(self, images: Tensor, texts: Tensor, caption_image: Tensor) -> dict[str, float]:
        """Images [N, K] and captions [C, K] sorted by sample and number -> all numbers."""
        result = recall_at_k(images, texts, caption_image, self.ks, self.chunk)
        first = torch.ones_like(caption_image, dtype=torch.bool)
        first[1:] = caption_image[1:] != caption_image[:-1]
        paired_images, paired_texts = images[caption_image[first]], texts[first]
        loss = accuracy = 0.0
        pairs = len(paired_images)
        for start in range(0, pairs, self.group_size):
            group = slice(start, start + self.group_size)
            group_loss, group_accuracy = contrastive_loss(paired_images[group], paired_texts[group], self.logit_scale)
            loss += group_loss.item() * len(paired_images[group])
            accuracy += group_accuracy.item() * len(paired_images[group])
        means = {"contrastive_loss": loss, "accuracy": accuracy}
        return result | {name: total / pairs if pairs else math.nan for name, total in means.items()}


def _sorted_distinct(*keys: Tensor) -> Tensor:
    """Rows [n] int64 that sort by the keys (first key first), the first of each set of equal rows."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    distinct = torch.ones(len(order), dtype=torch.bool, device=order.device)
    distinct[1:] = torch.stack([key[order][1:] != key[order][:-1] for key in keys]).any(dim=0)
    return order[distinct]
