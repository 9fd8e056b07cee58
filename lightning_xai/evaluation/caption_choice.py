"""Wrong captions of batches -> similarities to choose by.

Shape suffixes: B images, C captions, N wrong captions, L tokens, K embedding width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.data.batch import Batch
from lightning_xai.data.phrases import Negatives
from lightning_xai.data.wrong_captions import WrongCaptions
from lightning_xai.metrics.caption_choice import Choice

__all__ = ["HARD_NEGATIVE", "ChoicePass"]

HARD_NEGATIVE = "hard_negative"
"""The kind of hard negatives: those that shards hold, and those made by `object_swaps`."""


class ChoicePass:
    """The choices of one evaluation on this rank.

    Wrong captions wait until the end and are embedded there, each text once: other callbacks listen to the model while
    it runs on a batch. Until then an embedding of the image and the tokens are kept of each (2.4 KB at width 512).

    Attributes:
        same_tokens: how many wrong captions were excluded since the tokenizer cannot tell them from the true ones.
    """

    def __init__(self) -> None:
        self.same_tokens = 0
        self._image_NK: list[Tensor] = []
        self._true_N: list[Tensor] = []
        self._tokens_NL: list[Tensor] = []
        self._names: list[tuple[str, str]] = []  # kind and group of each

    def add(self, batch: Batch, image_BK: Tensor, text_CK: Tensor) -> None:
        """Take note of a batch's wrong captions and hard negatives, with the embeddings of its images and captions."""
        image_BK, text_CK = _unit(image_BK), _unit(text_CK)
        if batch.wrong_captions:
            names = list(zip(batch.wrong_captions.kinds, batch.wrong_captions.groups, strict=True))
            self._add(batch, batch.wrong_captions, names, image_BK, text_CK)
        if batch.negatives:
            self._add(batch, batch.negatives, [(HARD_NEGATIVE, "")] * len(batch.negatives), image_BK, text_CK)

    def _add(
        self,
        batch: Batch,
        wrong: WrongCaptions | Negatives,
        names: list[tuple[str, str]],
        image_BK: Tensor,
        text_CK: Tensor,
    ) -> None:
        differ_N = (wrong.tokens != batch.tokens[wrong.caption_row]).any(dim=1)
        image_NK = image_BK[wrong.image_row[differ_N]]
        self._image_NK.append(image_NK)
        self._true_N.append((image_NK * text_CK[wrong.caption_row[differ_N]]).sum(dim=1))
        self._tokens_NL.append(wrong.tokens[differ_N])
        self._names += [name for name, differs in zip(names, differ_N.tolist(), strict=True) if differs]
        self.same_tokens += len(names) - int(differ_N.sum())

    @torch.no_grad()
    def finish(self, encode_text: Callable[[Tensor], Tensor], batch_size: int) -> list[Choice]:
        """Embed the wrong captions, so many at a time, and return all choices."""
        if not self._names:
            return []
        tokens_UL, text_N = torch.unique(torch.cat(self._tokens_NL), dim=0, return_inverse=True)
        wrong_UK = torch.cat([_unit(encode_text(part)) for part in tokens_UL.split(batch_size)])
        wrong_N = (torch.cat(self._image_NK) * wrong_UK[text_N]).sum(dim=1)
        similarities = zip(torch.cat(self._true_N).tolist(), wrong_N.tolist(), strict=True)
        return [Choice(*names, *pair) for names, pair in zip(self._names, similarities, strict=True)]


def _unit(embedding: Tensor) -> Tensor:
    """Of unit length, and not in half precision, in which many similarities would be equal."""
    return normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)
