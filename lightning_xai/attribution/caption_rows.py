"""The selections of a caption's tokens that interactions are computed of: each token alone, padding as one.

Shape suffixes: B captions, S selections, L tokens as given, T tokens run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.at_layer import TextTowerAtLayer


@dataclass(frozen=True)
class CaptionRows:
    """As many selections as the longest caption has tokens, and one more where padding can be seen.

    A tower without a causal or a padding mask sees all positions, of which a caption fills a dozen. Its padding is one
    selection, whose value the padding tokens share equally.

    Attributes:
        row_BT: the selection of each token; -1 for tokens that the embedding cannot depend on.
        sharers_BT: how many tokens share the selection: 1, or as many as there are of padding.
    """

    row_BT: Tensor
    sharers_BT: Tensor

    @classmethod
    def of(cls, text: TextTowerAtLayer, tokenizer: CaptionTokenizer, tokens_BL: Tensor, run: int) -> CaptionRows:
        """Those of captions of which so many tokens are run."""
        more = max(0, run - tokens_BL.shape[1])  # tokens that the tower adds count as the caption's
        visible_BT = pad(text.visible(tokens_BL)[:, :run], (0, more), value=True)
        padding_BT = pad(tokenizer.padding_mask(tokens_BL)[:, :run], (0, more), value=False) & visible_BT
        own_BT = visible_BT & ~padding_BT
        row_BT = torch.where(own_BT, own_BT.cumsum(dim=1) - 1, -1)
        row_BT = torch.where(padding_BT, row_BT.max() + 1, row_BT)
        return cls(row_BT, torch.where(padding_BT, padding_BT.sum(dim=1, keepdim=True), 1))

    def selections(self, like: Tensor) -> Tensor:
        """The selections [B, S, T], of the type of `like`."""
        # The first class takes up the tokens without a selection.
        return one_hot(self.row_BT + 1)[:, :, 1:].mT.to(like)

    def spread(self, values_BSX: Tensor) -> Tensor:
        """Values of the selections [B, S, X] -> values of the tokens [B, T, X]."""
        at_BTX = self.row_BT.clamp(min=0)[:, :, None].expand(-1, -1, values_BSX.shape[2])
        values_BTX = values_BSX.gather(1, at_BTX) / self.sharers_BT[:, :, None]
        return values_BTX.masked_fill(self.row_BT[:, :, None] < 0, 0)
