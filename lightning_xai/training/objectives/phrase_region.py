"""Match phrases to the regions that they name, among those of the global batch (after RegionCLIP and FG-CLIP).

Shapes: R phrases on this rank, G those of all ranks, P = H x W patches, L tokens, K embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lightning_xai.data.needs import BatchNeeds
from lightning_xai.exclusion import Exclusion
from lightning_xai.loss import gather_uneven_rows, own_is_largest, sum_over_ranks
from lightning_xai.metrics.grounding import measurable, patch_mask
from lightning_xai.training.objectives.base import Step, Term, zero_with_graph
from lightning_xai.training.objectives.patches import PatchObjective, text_numbers, whole

__all__ = ["PhraseRegion", "phrase_region_loss"]


def phrase_region_loss(
    regions: Tensor, phrases: Tensor, tokens: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric cross entropy of matching each region to its phrase and each phrase to its region, over all ranks.

    With unit vectors v of regions and t of phrases, and N(r) = r and the phrases of all ranks with another text,

        p_r = exp(scale * v_r . t_r) / sum_{j in N(r)} exp(scale * v_r . t_j),
        q_r = exp(scale * v_r . t_r) / sum_{j in N(r)} exp(scale * v_j . t_r),
        loss = -1 / (2 G) * sum_r (log p_r + log q_r).

    Phrases of the same text are true of each other's regions, and therefore no negatives. Averaged gradients are those
    of one process that has all phrases. Each rank may have another number of them, but needs a graph: where it has no
    phrase, give tensors of no rows that depend on the weights.

    Args:
        regions: [R, K], row by row a pair with `phrases`, of any length.
        phrases: [R, K], of any length.
        tokens: [R, L] int64, the phrases' texts; the same L on every rank.
        logit_scale: scalar factor of the cosine similarities (the exponential already taken).

    Returns:
        The loss in nats (lower is better); the accuracy in [0, 1] (higher is better, no gradient), the share of
        matches, of both directions, that are more similar than every negative; and G. All are the same on every rank.
        Without any phrase: a zero that has a graph, NaN, and 0.

    Example:
        >>> vectors, tokens = torch.eye(2), torch.tensor([[5, 1], [6, 1]])
        >>> loss, accuracy, count = phrase_region_loss(vectors, vectors, tokens, torch.tensor(10.0))
        >>> round(loss.item(), 6), accuracy.item(), count.item()  # log(1 + exp(-10))
        (4.5e-05, 1.0, 2.0)
    """
    with torch.autocast(regions.device.type, enabled=False):
        pairs = torch.cat([normalize(regions, dim=1), normalize(phrases, dim=1)], dim=1)
        everyone, first = gather_uneven_rows(pairs)
        own = torch.arange(first, first + len(pairs), device=pairs.device)
        texts = text_numbers(tokens)
        # A row keeps its own column, so that none is without a finite logit.
        hidden = (texts[own][:, None] == texts).scatter(1, own[:, None], value=False)
        region, phrase = (logit_scale.to(pairs.dtype) * pairs).chunk(2, dim=1)
        all_regions, all_phrases = everyone.chunk(2, dim=1)
        logits = torch.stack([region @ all_phrases.T, phrase @ all_regions.T]).masked_fill(hidden, -torch.inf)
        loss = torch.stack([cross_entropy(each, own, reduction="sum") for each in logits]).sum()
        right = torch.stack([own_is_largest(each, own).sum() for each in logits.detach()]).sum()
        sums = torch.stack([loss, right.to(loss), loss.new_tensor(len(pairs))])
        loss, hits, count = sum_over_ranks(sums)
        count = count.detach()
        return loss / (2 * count.clamp(min=1)), hits.detach() / (2 * count), count


class PhraseRegion(PatchObjective):
    """Match each phrase to the region that it names among those of the global batch, and each region to its phrase.

    See `phrase_region_loss`. A phrase is embedded as a separate caption, a region as the mean of the embeddings of
    its box's patches, which are the training pass's own. Similarities are scaled by the model's `logit_scale`. Phrases
    that gamma cannot be measured on, such as those whose box is smaller than a patch, take no part.

    Also logs, of the global batch, `train/phrase_region_accuracy`, `train/phrase_region_phrases`, the number of phrases
    that take part, and `train/phrase_region_excluded`, the number of those in its captions that do not.

    Args:
        weight: factor on the term in the loss.

    Raises:
        ValueError: a weight that is not positive; in `prepare`: an image tower whose patches have no embedding of their
            own, such as a ResNet.
    """

    name = "phrase_region"

    needs = BatchNeeds(phrases=True, boxes=True, phrase_tokens=True)

    def __call__(self, step: Step) -> Term:
        """Compute the term; a zero with a graph where no phrase of any rank takes part."""
        phrases, said = self._phrases(step)
        size, grid = step.encoder.image_shape[1:], self._image.grid
        reason = measurable(phrases.reason, phrases.boxes, grid, size)
        rows = (reason == Exclusion.MEASURED).nonzero()[:, 0]
        patches = self._patches(step.encoder)
        inside = patch_mask(phrases.boxes[rows], grid, size).flatten(1).to(patches)
        shares = inside / inside.sum(dim=1, keepdim=True)
        regions = torch.einsum("rp,rpk->rk", shares, patches[phrases.image_row[rows]]) + zero_with_graph(step)
        tokens = whole(self._tokens(phrases)[rows], step.encoder.tokenizer)
        loss, accuracy, count = phrase_region_loss(regions, said[rows], tokens, step.scale)
        excluded = sum_over_ranks(loss.new_tensor([len(phrases) - len(rows)]))[0]
        logged = {"accuracy": accuracy, "phrases": count, "excluded": excluded}
        return Term(loss, {f"{self.name}_{name}": value for name, value in logged.items()})
