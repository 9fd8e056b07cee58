"""The maps that one method gives for a batch, each item attributed once, whatever metrics use them.

Pairwise methods explain a phrase within its caption: its map is the sum of its tokens' rows. Other methods have one map
for a whole caption; for them, each phrase is explained as a separate caption.

Shape suffixes: B images, C captions, M phrases, N hard negatives, L tokens, H x W the patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai.attribution.base import AttributionMethod
from lightning_xai.attribution.capture import Captured
from lightning_xai.attribution.pairwise import HiddenStates, PairwiseMethod, References
from lightning_xai.data.batch import Batch

__all__ = ["BatchMaps", "MethodMaps", "PairwiseMaps", "Wanted", "maps_of"]


@dataclass(frozen=True)
class Wanted:
    """The maps that are needed of a batch.

    Attributes:
        phrases: [M] int64, rows of `Batch.phrases`.
        negatives: [N] int64, rows of `Batch.negatives`.
        captions: whether the maps of all captions are wanted.
    """

    phrases: Tensor
    negatives: Tensor
    captions: bool


@dataclass(frozen=True)
class BatchMaps:
    """The maps of a batch.

    Attributes:
        phrases: [M, H, W].
        true: [N, H, W], of the true words of each hard negative.
        replacements: [N, H, W], of the words in their place, in the wrong caption.
        image: [C, H, W], of each caption's image; none (C = 0) where not wanted.
        text: [C, L], of each caption's tokens; none where not wanted.
    """

    phrases: Tensor
    true: Tensor
    replacements: Tensor
    image: Tensor
    text: Tensor


class MethodMaps:
    """Makes the maps of batches with a method that has one map for a whole caption.

    Args:
        method: of the model that is evaluated.
        batch_size: pairs of image and caption that are attributed at a time; bounds memory.
    """

    def __init__(self, method: AttributionMethod, batch_size: int) -> None:
        self.method = method
        self.grid = method.grid
        self._batch_size = batch_size

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, the model runs on a batch; `maps` of the same batch, after it, reuses what the pass computed."""
        yield

    def maps(self, batch: Batch, wanted: Wanted) -> BatchMaps:
        """Attribute what is wanted of a batch, after its forward pass."""
        image, text = [self._none(batch)], [batch.images.new_zeros(0, batch.tokens.shape[1])]
        for rows in self._chunks(len(batch.tokens) if wanted.captions else 0):
            part = self.method.attribute(batch.images[batch.caption_image[rows]], batch.tokens[rows])
            image.append(part.image)
            text.append(part.text)
        phrases, negatives = batch.phrases, batch.negatives
        asked = [(int(phrases.image_row[row]), phrases.text[row]) for row in wanted.phrases.tolist()]
        if negatives is not None:
            for words in (negatives.text, negatives.replacement):
                asked += [(int(negatives.image_row[row]), words[row]) for row in wanted.negatives.tolist()]
        sizes = [len(wanted.phrases), len(wanted.negatives), len(wanted.negatives)]
        own, true, replacements = torch.split(self._of_words(batch, asked), sizes)
        return BatchMaps(own, true, replacements, torch.cat(image), torch.cat(text))

    def _of_words(self, batch: Batch, asked: list[tuple[int, str]]) -> Tensor:
        """A map for each image and words; the same question is answered once."""
        questions = list(dict.fromkeys(asked))
        if not questions:
            return self._none(batch)
        tokens = self.method.encoder.tokenizer.encode([words for _, words in questions]).to(batch.tokens.device)
        images = torch.tensor([image for image, _ in questions], device=batch.tokens.device)
        maps = torch.cat(
            [
                self.method.attribute(batch.images[images[rows]], tokens[rows]).image
                for rows in self._chunks(len(questions))
            ]
        )
        place = {question: row for row, question in enumerate(questions)}
        return maps[torch.tensor([place[question] for question in asked], device=maps.device)]

    def _none(self, batch: Batch) -> Tensor:
        return batch.images.new_zeros(0, *self.grid)

    def _chunks(self, count: int) -> Iterator[slice]:
        yield from (slice(start, start + self._batch_size) for start in range(0, count, self._batch_size))


class PairwiseMaps(MethodMaps):
    """Makes the maps of batches with a pairwise method, from what the model's own forward pass computes.

    The weights have to stay as they are from the first call of `maps` on.
    """

    method: PairwiseMethod

    def __init__(self, method: PairwiseMethod, batch_size: int) -> None:
        super().__init__(method, batch_size)
        self._captured = Captured()
        self._references: References | None = None

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, the model runs on a batch; `maps` of the same batch, after it, reuses what the pass computed."""
        with self.method.capturing() as self._captured:
            yield

    def maps(self, batch: Batch, wanted: Wanted) -> BatchMaps:
        """Attribute what is wanted of a batch, after its forward pass."""
        captured, self._captured = self._captured, Captured()
        phrases, negatives = batch.phrases, batch.negatives
        captions, masks = phrases.caption_row[wanted.phrases], phrases.span_mask[wanted.phrases]
        if negatives is not None:
            captions = torch.cat([captions, negatives.caption_row[wanted.negatives]])
            masks = torch.cat([masks, negatives.true_mask[wanted.negatives]])
        image, text = self._none(batch), batch.images.new_zeros(0, batch.tokens.shape[1])
        if not wanted.captions and not len(captions):
            return BatchMaps(image, image, image, image, text)
        states = self.method.hidden_states(batch.images, batch.tokens, captured)
        if self._references is None:
            self._references = self.method.references()
        if wanted.captions:
            image, text, maps = self._of_captions(batch, states, captions, masks)
        else:
            maps = self._of_spans(batch, states, captions, masks)
        own, true = torch.split(maps, [len(wanted.phrases), len(maps) - len(wanted.phrases)])
        return BatchMaps(own, true, self._replacements(batch, states, wanted.negatives), image, text)

    def _of_captions(
        self, batch: Batch, states: HiddenStates, captions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of all captions, and those of spans as sums over their interactions."""
        assert self._references is not None
        spans = batch.images.new_zeros(len(captions), *self.grid)
        images, texts = [self._none(batch)], [batch.images.new_zeros(0, batch.tokens.shape[1])]
        for rows in self._chunks(len(batch.tokens)):
            chosen = torch.arange(len(batch.tokens), device=captions.device)[rows]
            result = self.method.attribute_states(states.pairs(batch.caption_image[chosen], chosen), self._references)
            images.append(result.image)
            texts.append(result.text)
            here = ((captions >= rows.start) & (captions < rows.stop)).nonzero()[:, 0]
            interactions = result.interactions[captions[here] - rows.start]
            spans[here] = torch.einsum("rl,rlhw->rhw", masks[here].to(interactions), interactions).to(spans)
        return torch.cat(images), torch.cat(texts), spans

    def _of_spans(self, batch: Batch, states: HiddenStates, captions: Tensor, masks: Tensor) -> Tensor:
        """Maps of spans alone, far cheaper."""
        assert self._references is not None
        maps = [self._none(batch)]
        for rows in self._chunks(len(captions)):
            chosen = states.pairs(batch.caption_image[captions[rows]], captions[rows])
            maps.append(self.method.span_map_of(chosen, masks[rows], self._references))
        return torch.cat(maps)

    def _replacements(self, batch: Batch, states: HiddenStates, wanted: Tensor) -> Tensor:
        """Maps of the words that a wrong caption has in place of the true ones."""
        assert self._references is not None
        maps = [self._none(batch)]
        negatives = batch.negatives
        for rows in self._chunks(len(wanted)):
            assert negatives is not None
            chosen = wanted[rows]
            tokens = negatives.tokens[chosen]
            image, text = states.image[negatives.image_row[chosen]], self.method.text_states(tokens)
            mask = negatives.mask[chosen]
            maps.append(self.method.span_map_of(HiddenStates(image, text, tokens), mask, self._references))
        return torch.cat(maps)


def maps_of(method: AttributionMethod, batch_size: int) -> MethodMaps:
    """Make the maps that fit a method; see `MethodMaps`."""
    return PairwiseMaps(method, batch_size) if isinstance(method, PairwiseMethod) else MethodMaps(method, batch_size)
