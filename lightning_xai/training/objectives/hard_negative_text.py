"""CLIP's objective with hard negative captions in the image-to-text softmax (NegCLIP, Yuksekgonul et al. 2023).

Shapes: B rows on this rank, W ranks, K embedding width, N hard negatives of an image at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_xai.data.batch import Batch
from lightning_xai.data.needs import BatchNeeds
from lightning_xai.data.sample import stable_hash
from lightning_xai.exclusion import Exclusion
from lightning_xai.loss import (
    check_features,
    gather_rows,
    hide_columns,
    known_features,
    own_is_largest,
    rank_and_world,
    sum_over_ranks,
)
from lightning_xai.training.objectives.base import Objective, Step, Term

__all__ = ["HardNegativeText", "NegativeTexts", "hard_negative_loss"]


@dataclass(frozen=True)
class NegativeTexts:
    """Up to N hard negatives of each of B images.

    Attributes:
        features: [B, N, K], unit length.
        known: [B, N] bool, the places that hold one.
        texts: [B, N] int64, a number for each wording.
        captions: [B] int64, likewise of the true captions: a hard negative of one image may be the true caption of
            another, which it then is no negative of.
    """

    features: Tensor
    known: Tensor
    texts: Tensor
    captions: Tensor


def hard_negative_loss(
    image_features: Tensor,
    text_features: Tensor,
    wrong: NegativeTexts,
    logit_scale: Tensor,
    valid: Tensor,
    margin: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Match images and captions of all ranks as `global_contrastive_loss`, with hard negatives of all ranks as columns.

    `(L_image + L_text) / 2`, where `L_text` is CLIP's and, with c the cosines, s the scale and m the margin,
    `L_image = -log(exp(s c_ii) / (sum_j exp(s c_ij) + sum_n exp(s (c_in + m))))`, the mean over valid images. n goes
    through the hard negatives of all images but those with the words of caption i. The margin is that of CosFace (Wang
    et al. 2018), for these columns alone: a true caption has to be closer than a wrong one by m. Without any hard
    negative this is the contrastive loss.

    Args:
        image_features: [B, K], unit length; the same B on every rank (pad with invalid rows).
        text_features: [B, K], unit length.
        wrong: hard negatives; the same N on every rank.
        logit_scale: scalar factor of the cosine similarities (the exponential already taken).
        valid: [B] bool.
        margin: added to the cosines of hard negatives.

    Returns:
        The loss in nats (lower is better), the same on every rank, and without any valid row a zero that has a graph.
        And numbers without a graph, over all ranks: `accuracy` as that of the contrastive loss, hard negatives left
        out; `negatives`, how many there are; and `negatives_accuracy` in [0, 1] (higher is better), the share of images
        with hard negatives whose true caption is more similar than each of their own: NaN where there is none.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    valid = check_features(image_features, text_features, valid)
    own = rank_and_world()[0] * len(valid) + torch.arange(len(valid), device=valid.device)
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = known_features(image_features, text_features, valid)
        known = wrong.known & valid[:, None]
        negatives = wrong.features.to(image.dtype).masked_fill(~known[:, :, None], 0)
        images, texts, others, everyone, usable = _gathered(image, text, negatives, valid, known)
        same = wrong.captions[:, None] == gather_rows(wrong.texts).flatten()
        hidden = torch.cat([~everyone.expand(len(valid), -1), ~usable | same], dim=1)
        scale = logit_scale.to(image.dtype)
        # One row for all images, added within the product, so that no further matrix is made.
        shift = torch.cat([torch.zeros_like(texts[:, 0]), torch.full_like(others[:, 0], margin)]) * scale
        by_image = hide_columns(torch.addmm(shift, scale * image, torch.cat([texts, others]).T), hidden, valid)
        by_text = hide_columns((scale * text) @ images.T, ~everyone, valid)
        losses = [cross_entropy(logits, own, reduction="none") for logits in (by_image, by_text)]
        loss = torch.stack(losses).sum(dim=0).masked_fill(~valid, 0).sum()
        right = [own_is_largest(logits.detach(), own) & valid for logits in (by_image[:, : len(everyone)], by_text)]
        tried = known.any(dim=1)
        beaten = tried & _beaten(image.detach(), text.detach(), negatives.detach(), known)
        counts = torch.stack([right[0], right[1], beaten, tried]).sum(dim=1).to(loss.dtype)
        loss, *sums = sum_over_ranks(torch.cat([loss[None], counts])).unbind()
        found = [each.detach() for each in sums]
        count = everyone.sum()
        numbers = {"accuracy": (found[0] + found[1]) / (2 * count), "negatives": usable.sum().to(loss.dtype)}
        return loss / (2 * count.clamp(min=1)), numbers | {"negatives_accuracy": found[2] / found[3]}


def _gathered(image: Tensor, text: Tensor, negatives: Tensor, valid: Tensor, known: Tensor) -> tuple[Tensor, ...]:
    """Features of all ranks' images, captions and negatives, and which captions and negatives there are."""
    width, places = image.shape[1], known.shape[1]
    flags = torch.cat([valid[:, None], known], dim=1).to(image.dtype)
    # One collective carries all of it, so that its order in the backward pass is the same on all ranks.
    rows = gather_rows(torch.cat([image, text, negatives.flatten(1), flags], dim=1))
    images, texts, others, seen = torch.split(rows, [width, width, places * width, 1 + places], dim=1)
    seen = seen.detach() > 0.5
    return images, texts, others.reshape(-1, width), seen[:, 0], seen[:, 1:].flatten()


def _beaten(image: Tensor, text: Tensor, negatives: Tensor, known: Tensor) -> Tensor:
    """[B] bool: the image's caption is more similar than all of its negatives."""
    wrong = torch.einsum("bk,bnk->bn", image, negatives)
    return (((image * text).sum(dim=1, keepdim=True) > wrong) | ~known).all(dim=1)


class HardNegativeText(Objective):
    """Match images and captions as `Softmax` does, and let no image take a wrong caption (NegCLIP).

    The wrong captions of all ranks are further columns of the image-to-text softmax, in the formula of
    `hard_negative_loss`. The term holds CLIP's two directions, so that it takes the place of `Softmax`; a step with it
    embeds at most 1 + `per_image` times as many texts.

    Also logs `train/accuracy`, as `Softmax` does, and of the global batch `train/hard_negative_text_negatives`, the
    number of wrong captions, `train/hard_negative_text_accuracy`, the share of images whose caption is more similar
    than each of their own wrong ones, and `train/hard_negative_text_excluded`, the number of wrong captions that take
    no part: those whose wrong words are cut off at the end of the context, or no whole tokens, and those about an
    object that the crop hides.

    Args:
        weight: factor on the term in the loss.
        margin: added to the cosines of wrong captions, in [0, 2].
        per_image: most wrong captions of an image; of more, others are drawn in each epoch.
        swap_objects: in addition to wrong captions that the data hold, make some: the class name of an object that the
            image does not show takes the place of one that it shows, others in each epoch.

    Raises:
        ValueError: an option outside its range.
    """

    name = "hard_negative_text"

    def __init__(
        self, *, weight: float = 1.0, margin: float = 0.0, per_image: int = 1, swap_objects: bool = False
    ) -> None:
        super().__init__(weight=weight)
        if not 0 <= margin <= 2:
            raise ValueError(f"the margin is one of cosines, from 0 to 2; got {margin}")
        if per_image < 1:
            raise ValueError(f"per_image has to be at least 1; got {per_image}")
        self.margin = margin
        self.per_image = per_image
        self.needs = BatchNeeds(negatives=per_image, swap_objects=swap_objects)

    def extra_tokens(self, batch: Batch) -> Tensor:
        """Return the wrong captions.

        Raises:
            ValueError: the batch was made without hard negatives.
        """
        if batch.negatives is None:
            raise ValueError(
                f"the objective {self.name} needs hard negatives, and the training batches have no place for them: "
                "take ShardDataModule, or make them by TrainingCollate(..., needs=task.batch_needs)"
            )
        return batch.negatives.tokens

    @property
    def trains_on(self) -> Mapping[str, Mapping[str, Any]]:
        """The choice between a caption and a slightly wrong one."""
        return {"val/caption_choice": {}}

    def __call__(self, step: Step) -> Term:
        """Compute the loss in nats and the numbers of the class."""
        negatives, size = step.batch.negatives, (len(step.image), self.per_image)
        assert negatives is not None  # else `extra_tokens` has raised
        rows = negatives.image_row
        # Rows ascend: the place of a negative is how many others of its image come before it.
        where = rows, torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        measured = negatives.reason == int(Exclusion.MEASURED)
        wrong = NegativeTexts(
            features=step.text.new_zeros(*size, step.text.shape[1]).index_put(where, step.extra[self.name]),
            known=torch.zeros(size, dtype=torch.bool, device=rows.device).index_put(where, measured),
            texts=rows.new_zeros(size).index_put(where, _numbers(negatives.captions).to(rows.device)),
            captions=_numbers(step.batch.captions).to(rows.device),
        )
        loss, numbers = hard_negative_loss(step.image, step.text, wrong, step.scale, step.batch.valid, self.margin)
        excluded = sum_over_ranks((~measured).sum()[None].to(loss.dtype)).detach()[0]
        own = {"negatives": numbers["negatives"], "accuracy": numbers["negatives_accuracy"], "excluded": excluded}
        named = {f"{self.name}_{name}": value for name, value in own.items()}
        return Term(loss, {"accuracy": numbers["accuracy"]} | named)


def _numbers(texts: list[str]) -> Tensor:
    """The same number for the same text, on every rank."""
    return torch.tensor([stable_hash(text) for text in texts], dtype=torch.int64)
