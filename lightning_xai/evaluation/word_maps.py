"""Maps of all words of a caption, to look at; they cost what phrases cost, not what all interactions do."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.attribution.pairwise import PairwiseMethod
from lightning_xai.data.spans import SpanAlignmentError, SpanCutOffError
from lightning_xai.results.examples import words_of

__all__ = ["word_maps"]


def word_maps(method: PairwiseMethod, image: Tensor, tokens: Tensor, caption: str) -> Tensor | None:
    """Map each word of a caption, as `words_of` finds them, within its caption.

    Args:
        method: whose interactions are summed up over the tokens of a word.
        image: [3, height, width], as the encoder takes it.
        tokens: [L], the caption's.
        caption: the text.

    Returns:
        [n, H, W] float32 on the CPU; zero for words after the context length, which the model does not see. None where
        a word is no whole number of tokens.
    """
    masks = []
    for span in words_of(caption):
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        try:
            mask[method.encoder.tokenizer.token_span(caption, span)] = True
        except SpanCutOffError:
            pass
        except SpanAlignmentError:
            return None
        masks.append(mask)
    states = method.hidden_states(image[None], tokens[None])
    row = torch.zeros(len(masks), dtype=torch.int64, device=tokens.device)
    return method.span_maps_of(states, row, row, torch.stack(masks), method.references()).float().cpu()
