"""CLIP Surgery: a second way through the last blocks, and what all prompts share taken away (Li et al., 2023).

*Architecture surgery*: next to the model's own way x through its last blocks, a second one starts at the first of them
and gathers what attention between values makes, without MLP,

    y <- y + out_proj(softmax(v v' / sqrt(d)) v),      v the values of the block's own x.

*Feature surgery*: of the cosines c_pt of patch p of y and prompt t, weighted by w_t = s_t / mean(s),
s = softmax(2 cos(image, t)), their mean over prompts is subtracted.

Shape suffixes: B pairs, T tokens run, P prompts with the caption, J captions, K embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_xai.attribution.attention import Attention, AttentionMethod, TowerPass
from lightning_xai.attribution.score import Score
from lightning_xai.models.encoder import TwoTowerEncoder


class CLIPSurgery(AttentionMethod):
    """Cosine similarity of each patch with the caption, after architecture and feature surgery.

    Signed: larger is more alike. The paper explains images; the text map is of each token after architecture surgery of
    the text tower, with the image, and zero but for the caption's own tokens. A target of several captions is taken of
    each patch, from its cosines with each caption after surgery, where each makes a set with the same prompts.

    Args:
        encoder: the dual encoder to explain.
        start_layer: the block at which the second way starts; one number for both towers, or one for the image tower
            and one for the text tower. None, the published one, for the upper half: the last 6 of 12 blocks.
        prompts: captions of other things, which make a set of prompts with the caption. Without any, nothing would be
            left of feature surgery, and the similarity with an empty caption is subtracted instead, as is published for
            a single text.
        feature_surgery: False for architecture surgery alone.
        temperature: the factor on similarities in the softmax over prompts.
        internal_batch_size: pairs computed at a time, None for all; bounds memory, changes no number.

    Raises:
        UnsupportedTowerError: a tower whose attention cannot be seen, or CLIP's ResNet, which has no blocks of it.
        ValueError: no such layer, an empty prompt, or a temperature that is not a number.
    """

    signed = True
    has_zero = False

    def __init__(
        self,
        encoder: TwoTowerEncoder,
        *,
        start_layer: int | tuple[int, int] | None = None,
        prompts: Sequence[str] = (),
        feature_surgery: bool = True,
        temperature: float = 2.0,
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__(encoder, internal_batch_size=internal_batch_size)
        if not math.isfinite(temperature):
            raise ValueError(f"temperature has to be a finite number; got {temperature}")
        if start_layer is None:
            layers = encoder.image_at_layer().layers, encoder.text_at_layer().layers
            start_layer = layers[0][len(layers[0]) // 2], layers[1][len(layers[1]) // 2]
        self._attend(start_layer, self._second_way)
        self._feature_surgery, self._temperature = feature_surgery, temperature
        # What an empty caption says, every caption says. The tokenizer itself takes one.
        self._prompts = encoder.tokenizer.encode(prompts) if prompts else encoder.tokenizer.tokenizer([""]).long()
        self._is_set = bool(prompts)

    @torch.no_grad()
    def _map(self, seen: TowerPass, own_BK: Tensor, score: Score) -> Tensor:
        tokens_BTK, directions_BJK = normalize(self._second_way(seen), dim=2), normalize(score.directions, dim=2)
        own_BTJ = tokens_BTK @ directions_BJK.mT
        if seen.tokens is None and self._feature_surgery:
            own_BTJ = self._less_what_is_shared(own_BTJ, tokens_BTK, normalize(own_BK, dim=1), directions_BJK)
        return seen.maps(score.of(own_BTJ))

    def _less_what_is_shared(
        self, own_BTJ: Tensor, tokens_BTK: Tensor, image_BK: Tensor, captions_BJK: Tensor
    ) -> Tensor:
        """The cosines of each caption after feature surgery, all from unit embeddings."""
        prompts_PK = normalize(self.encoder.encode_text(self._prompts.to(image_BK.device)), dim=1)
        others_BTP = tokens_BTK @ prompts_PK.T
        if not self._is_set:
            return own_BTJ - others_BTP
        columns = []
        for place, caption_BK in enumerate(captions_BJK.unbind(dim=1)):
            whole_BP = torch.cat([(image_BK * caption_BK).sum(dim=1, keepdim=True), image_BK @ prompts_PK.T], 1)
            share_BP = (self._temperature * whole_BP).softmax(dim=1)
            weight_BP = share_BP / share_BP.mean(dim=1, keepdim=True)
            weighted_BTP = weight_BP[:, None] * torch.cat([own_BTJ[:, :, place, None], others_BTP], dim=2)
            columns.append(weighted_BTP[:, :, 0] - weighted_BTP.mean(dim=2))
        return torch.stack(columns, dim=2)

    @staticmethod
    def _second_way(seen: TowerPass) -> Tensor:
        """Embeddings of all tokens of the second way [B, T, K]."""
        if not seen.calls:
            raise seen.tower.unsupported("attends in its pool alone, where no second way has room")
        hidden_BTD = seen.calls[0].hidden
        for block in seen.calls:
            hidden_BTD = hidden_BTD + block.projected(_of_values)
        return seen.embed_each(hidden_BTD)


def _of_values(*args: Any, **kwargs: Any) -> Tensor:
    """In place of attention: that of values to values."""
    call = Attention(*args, **kwargs)
    return replace(call, query=call.value, key=call.value).probabilities() @ call.value
