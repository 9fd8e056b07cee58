"""Judge every phrase with every image of the global batch by the patches that it attends to (after FLAIR; no boxes).

Shapes: B rows on this rank, R queries on this rank, G those of all ranks, P patches, L tokens, K embedding width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, pad
from torch.utils.checkpoint import checkpoint

from lightning_xai.exclusion import Exclusion
from lightning_xai.loss import gather_uneven_rows, sum_over_ranks
from lightning_xai.training.objectives.base import Step, Term, zero_with_graph
from lightning_xai.training.objectives.patches import PatchObjective, text_numbers, whole

__all__ = ["PhrasePatch", "phrase_patch_loss"]

_SIMILARITIES = 2**24  # of patches and queries, kept at a time: 64 MiB in float32


def phrase_patch_loss(
    patches: Tensor,
    queries: Tensor,
    image_row: Tensor,
    tokens: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | float,
    valid: Tensor,
    *,
    sharpness: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask of every query and every image of all ranks whether they belong together: `-log sigmoid(z * logit)`.

    With unit vectors v of an image's patches and t of a query, the query attends to the patches that are like it, and
    is compared with what it gathers there:

        c_p = v_p . t,  a = softmax_p(sharpness * c),  logit = scale * sum_p a_p c_p + bias.

    z is 1 for the query's own image and -1 for any other. Images of which the same text is a query as well are no
    negatives of it. Queries travel between ranks, patches stay where they are. Averaged gradients are those of one
    process that has all rows.

    Args:
        patches: [B, P, K] of any length; invalid rows may hold anything.
        queries: [R, K] of any length; any R on each rank, but it needs a graph on all of them.
        image_row: [R] int64, the row of each query's own image, a valid one.
        tokens: [R, L] int64, the queries' texts; the same L on every rank.
        logit_scale: scalar factor (the exponential already taken).
        logit_bias: scalar, added to each logit.
        valid: [B] bool.
        sharpness: factor on similarities in the attention, positive.

    Returns:
        The loss in nats (lower is better), summed over pairs and divided by G; the accuracy in [0, 1] (higher is
        better, no gradient), the share of queries that fit their image better than all queries do that are not of it;
        and G. All are the same on every rank. Without any query: a zero that has a graph, NaN, and 0.

    Example:
        >>> patches, queries = torch.eye(2)[:, None], torch.eye(2)
        >>> loss, accuracy, count = phrase_patch_loss(
        ...     patches, queries, torch.arange(2), torch.tensor([[5], [6]]), torch.tensor(10.0), -5.0,
        ...     torch.tensor([True, True]),
        ... )
        >>> round(loss.item(), 6), accuracy.item(), count.item()  # 2 log(1 + exp(-5))
        (0.013431, 1.0, 2.0)
    """
    with torch.autocast(patches.device.type, enabled=False):
        unit = normalize(patches.masked_fill(~valid[:, None, None], 0), dim=2)
        everyone, first = gather_uneven_rows(normalize(queries, dim=1))
        own, named = _belonging(image_row, text_numbers(tokens), first, len(patches))
        similarity = _gathered(unit, everyone, sharpness)
        logits = logit_scale.to(unit.dtype) * similarity + torch.as_tensor(logit_bias).to(unit).reshape(())
        wrong = valid[:, None] & ~named
        # Infinite logits of the right sign cost nothing, and have no gradient.
        loss = -logsigmoid(logits.masked_fill(~own, torch.inf)).sum()
        loss = loss - logsigmoid(-logits.masked_fill(~wrong, -torch.inf)).sum()
        others = pad(logits.detach().masked_fill(~wrong, -torch.inf), (1, 0), value=-torch.inf)
        right = (own & (logits.detach() > others.amax(dim=1, keepdim=True))).sum()
        sums = torch.stack([loss, right.to(loss), loss.new_tensor(len(queries))])
        total, hits, count = sum_over_ranks(sums)
        count = count.detach()
        return total / count.clamp(min=1), hits.detach() / count, count


def _belonging(image_row: Tensor, texts: Tensor, first: int, images: int) -> tuple[Tensor, Tensor]:
    """Which of all queries are an image's own, and which have the text of one of those: [B, G] bool each."""
    columns = torch.arange(first, first + len(image_row), device=texts.device)
    own = torch.zeros(images, len(texts), dtype=torch.bool, device=texts.device)
    own[image_row, columns] = True
    says = torch.zeros_like(own)  # by the number of the text, of which there are no more than queries
    says[image_row, texts[columns]] = True
    return own, says[:, texts]


def _gathered(patches: Tensor, queries: Tensor, sharpness: float) -> Tensor:
    """The similarity [B, G] of each query with what it gathers from each image's patches, all of unit length."""

    def attend(part: Tensor) -> Tensor:
        cosines_BPG = patches @ part.T
        return ((sharpness * cosines_BPG).softmax(dim=1) * cosines_BPG).sum(dim=1)

    # A matrix of all patches and queries is made for a few queries at a time, and again in the backward pass: it grows
    # with the product of batch, global batch and patches.
    some = max(1, _SIMILARITIES // (patches.shape[0] * patches.shape[1]))
    parts = [
        checkpoint(attend, part, use_reentrant=False, preserve_rng_state=False) for part in torch.split(queries, some)
    ]
    return torch.cat(parts, dim=1)


class PhrasePatch(PatchObjective):
    """Judge every phrase with every image of the global batch by the patches that it attends to. Needs no boxes.

    See `phrase_patch_loss`. A phrase is embedded as a separate caption, patches are the training pass's own. Phrases
    are all that the data name in the captions, with a box or without, but for objects that the crop leaves nothing of.
    A caption without such a phrase takes part as a whole, so that data without any regions do as well.

    Logits are scaled by the model's `logit_scale`, and shifted by its `logit_bias` where it has one, as SigLIP has.
    `Sigmoid` trains that bias; without `Sigmoid` it stays as it is.

    Also logs, of the global batch, `train/phrase_patch_accuracy`, `train/phrase_patch_phrases` and
    `train/phrase_patch_captions`, the numbers of phrases and of whole captions that take part.

    Args:
        weight: factor on the term in the loss.
        bias: added to the logits of a model that has no `logit_bias`.
        sharpness: factor on similarities in the attention.

    Raises:
        ValueError: a weight or a sharpness that is not positive, or a bias that is not finite; in `prepare`: an image
            tower whose patches have no embedding of their own, such as a ResNet.
    """

    name = "phrase_patch"

    def __init__(self, *, weight: float = 1.0, bias: float = -10.0, sharpness: float = 10.0) -> None:
        super().__init__(weight=weight)
        if not math.isfinite(bias) or not 0 < sharpness < math.inf:
            raise ValueError(f"bias has to be finite, sharpness positive and finite; got {bias} and {sharpness}")
        self.bias = bias
        self.sharpness = sharpness

    def __call__(self, step: Step) -> Term:
        """Compute the term; a zero with a graph where no row of any rank is valid."""
        batch, tokenizer = step.batch, step.encoder.tokenizer
        phrases, said = self._phrases(step)
        seen = (phrases.reason != Exclusion.OUTSIDE_CROP).nonzero()[:, 0]
        image_row = phrases.image_row[seen]
        alone = batch.valid.scatter(0, image_row, value=False).nonzero()[:, 0]  # captions without a phrase
        own_bias = step.encoder.logit_bias
        loss, accuracy, _ = phrase_patch_loss(
            self._patches(step.encoder) + zero_with_graph(step),
            torch.cat([said[seen], step.text[alone]]),
            torch.cat([image_row, alone]),
            whole(torch.cat([self._tokens(phrases)[seen], batch.tokens[alone]]), tokenizer),
            step.scale,
            self.bias if own_bias is None else own_bias,
            batch.valid,
            sharpness=self.sharpness,
        )
        counts = sum_over_ranks(loss.new_tensor([len(seen), len(alone)]))
        logged = {"accuracy": accuracy, "phrases": counts[0], "captions": counts[1]}
        return Term(loss, {f"{self.name}_{name}": value for name, value in logged.items()})
