"""Maps of all words of a caption, to look at; they cost what phrases cost, not what all interactions do."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xai.attribution.pairwise import HiddenStates, PairwiseMethod, References
from lightning_xai.data.spans import SpanAlignmentError, SpanCutOffError
from lightning_xai.results.examples import words_of

__all__ = ["word_maps"]


def word_maps(method: PairwiseMethod, states: HiddenStates, references: References, caption: str) -> Tensor | None:
    """Map each word of a caption, as `words_of` finds them, within its caption.

    Args:
        method: whose interactions are summed up over the tokens of a word.
        states: of one image and the caption, as a forward pass has made them.
        references: of the method.
        caption: the text.

    Returns:
        [n, H, W] float32 on the CPU; zero for words after the context length, which the model does not see. None where
        a word is no whole number of tokens.
    """
    masks = []
    for span in words_of(caption):
        mask = torch.zeros_like(states.tokens[0], dtype=torch.bool)
        try:
            mask[method.encoder.tokenizer.token_span(caption, span)] = True
        except SpanCutOffError:
            pass
        except SpanAlignmentError:
            return None
        masks.append(mask)
    every = torch.stack(masks)
    seen = every.any(dim=1)
    row = torch.zeros(int(seen.sum()), dtype=torch.int64, device=every.device)
    maps = torch.zeros(len(every), *method.grid)
    maps[seen.cpu()] = method.span_maps_of(states, row, row, every[seen], references).float().cpu()
    return maps
