"""The wrong captions of a batch, for a model to choose between them and the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_xai.data.phrases import TensorFields
from lightning_xai.data.spans import CaptionTokenizer

__all__ = ["WrongCaptions"]


@dataclass
class WrongCaptions(TensorFields):
    """N wrong captions of a batch, see `WrongCaption`.

    Attributes:
        image_row: `[N]` int64, row of `Batch.images`.
        caption_row: `[N]` int64, row of the true caption in `Batch.tokens`.
        tokens: `[N, L]` int64, the wrong caption.
        kinds: N words for what is wrong.
        groups: N values of `Sample.group`.
    """

    image_row: Tensor
    caption_row: Tensor
    tokens: Tensor
    kinds: list[str]
    groups: list[str]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, str, str, str]], tokenizer: CaptionTokenizer) -> Self:
        """Tokenise rows of (row of the image, row of the true caption, wrong caption, kind, group)."""
        image_row, caption_row = torch.tensor([row[:2] for row in rows], dtype=torch.int64).reshape(-1, 2).T.clone()
        kinds, groups = [kind for *_, kind, _ in rows], [group for *_, group in rows]
        return cls(image_row, caption_row, tokenizer.encode([text for _, _, text, _, _ in rows]), kinds, groups)

    def __len__(self) -> int:
        return len(self.kinds)
