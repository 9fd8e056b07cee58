"""The maps that one method gives for a batch, each item attributed once, whatever metrics use them.

Methods that tell pairs of token and patch apart explain a phrase where it stands: its map is the sum of its tokens'
rows. Other methods have one map for a whole caption; for them a phrase is a caption of its own.

Shape suffixes: B images, C captions, M phrases, N hard negatives, L tokens, H x W the patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xai.attribution.base import AttributionMethod
from lightning_xai.attribution.capture import Captured
from lightning_xai.attribution.pairwise import HiddenStates, PairwiseMethod, References
from lightning_xai.data.batch import Batch

__all__ = ["BatchMaps", "MapMaker", "PairMapMaker", "Wanted", "map_maker"]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a method.

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
    """What a method answers.

    Attributes:
        phrases: [M, H, W].
        true: [N, H, W], of the true words of each hard negative.
        replacements: [N, H, W], of the words in their place, in the wrong caption.
        image: [C, H, W], of each caption's image; None where not wanted.
        text: [C, L], of each caption's tokens; None where not wanted.
    """

    phrases: Tensor
    true: Tensor
    replacements: Tensor
    image: Tensor | None
    text: Tensor | None


class MapMaker:
    """Makes the maps of a batch with a method that has one map for a whole caption.

    Args:
        method: of the model that is evaluated.
        batch_size: pairs that are attributed at a time; bounds memory.
    """

    def __init__(self, method: AttributionMethod, batch_size: int) -> None:
        self.method = method
        self.grid = method.grid
        self._batch_size = batch_size

    def listen(self) -> None:
        """Take what the model's own forward pass makes, from now on; nothing, where a method needs its own pass."""

    def forget(self) -> None:
        """Let go of what was taken, and take what comes next."""

    def take(self, batch: Batch) -> None:
        """Keep what the forward pass of a batch, which has just run, has made; `maps` of this batch needs it."""

    def close(self) -> None:
        """Leave the model as it was."""

    def maps(self, batch: Batch, wanted: Wanted) -> BatchMaps:
        """Attribute what is wanted of a batch whose forward pass has just run."""
        image = text = None
        if wanted.captions:
            parts = [
                self.method.attribute(batch.images[batch.caption_image[rows]], batch.tokens[rows])
                for rows in self._chunks(len(batch.tokens))
            ]
            image = torch.cat([part.image for part in parts]) if parts else self._none(batch)
            text = torch.cat([part.text for part in parts]) if parts else batch.images.new_zeros(batch.tokens.shape)
        phrases, negatives = batch.phrases, batch.negatives
        asked = [(int(phrases.image_row[row]), phrases.text[row]) for row in wanted.phrases.tolist()]
        if negatives is not None:
            for words in (negatives.text, negatives.replacement):
                asked += [(int(negatives.image_row[row]), words[row]) for row in wanted.negatives.tolist()]
        maps = self._of_words(batch, asked)
        sizes = [len(wanted.phrases), len(wanted.negatives), len(wanted.negatives)]
        own, true, replacements = torch.split(maps, sizes)
        return BatchMaps(own, true, replacements, image, text)

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


class PairMapMaker(MapMaker):
    """Likewise with a method that tells pairs apart, from hidden states that the model's own forward pass makes."""

    method: PairwiseMethod

    def __init__(self, method: PairwiseMethod, batch_size: int) -> None:
        super().__init__(method, batch_size)
        self._hooks = ExitStack()
        self._captured = Captured()
        self._references: References | None = None
        self._states: HiddenStates | None = None

    def listen(self) -> None:
        """Take the hidden states of the model's own forward passes, from now on."""
        self.forget()

    def forget(self) -> None:
        """Let go of hidden states from before the batch."""
        self._hooks.close()
        self._states = None
        self._captured = self._hooks.enter_context(self.method.capturing())

    def take(self, batch: Batch) -> None:
        """Keep the hidden states where the forward pass was just images and captions; else those of an own pass."""
        self._hooks.close()
        self._states = self.method.hidden_states(batch.images, batch.tokens, self._captured)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()
        self._captured = Captured()
        self._references = self._states = None

    def maps(self, batch: Batch, wanted: Wanted) -> BatchMaps:
        """Attribute what is wanted of a batch whose forward pass has just run."""
        states = self._states
        assert states is not None, "take() comes before maps()"
        if self._references is None:
            self._references = self.method.references()
        phrases, negatives = batch.phrases, batch.negatives
        captions, masks = phrases.caption_row[wanted.phrases], phrases.span_mask[wanted.phrases]
        true_count = 0
        if negatives is not None:
            true_count = len(wanted.negatives)
            captions = torch.cat([captions, negatives.caption_row[wanted.negatives]])
            masks = torch.cat([masks, negatives.true_mask[wanted.negatives]])
        image = text = None
        if wanted.captions:
            image, text, maps = self._of_captions(batch, states, captions, masks)
        else:
            maps = self._of_spans(batch, states, captions, masks)
        own, true = torch.split(maps, [len(captions) - true_count, true_count])
        return BatchMaps(own, true, self._replacements(batch, states, wanted.negatives), image, text)

    def _of_captions(
        self, batch: Batch, states: HiddenStates, captions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of all captions, and those of spans as sums over their pairs."""
        assert self._references is not None
        spans = batch.images.new_zeros(len(captions), *self.grid)
        images, texts = [self._none(batch)], [batch.images.new_zeros(0, batch.tokens.shape[1])]
        for rows in self._chunks(len(batch.tokens)):
            chosen = torch.arange(len(batch.tokens), device=captions.device)[rows]
            result = self.method.attribute_states(states.pairs(batch.caption_image[chosen], chosen), self._references)
            images.append(result.image)
            texts.append(result.text)
            here = ((captions >= rows.start) & (captions < rows.stop)).nonzero()[:, 0]
            pairs = result.interactions[captions[here] - rows.start]
            spans[here] = torch.einsum("rl,rlhw->rhw", masks[here].to(pairs), pairs).to(spans)
        return torch.cat(images), torch.cat(texts), spans

    def _of_spans(self, batch: Batch, states: HiddenStates, captions: Tensor, masks: Tensor) -> Tensor:
        """Maps of spans alone, far cheaper."""
        assert self._references is not None
        maps = [self._none(batch)]
        for rows in self._chunks(len(captions)):
            chosen = captions[rows]
            maps.append(
                self.method.span_map_of(
                    states.pairs(batch.caption_image[chosen], chosen), masks[rows], self._references
                )
            )
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
            text = self.method.text_states(tokens)
            image = states.image[negatives.image_row[chosen]]
            maps.append(
                self.method.span_map_of(HiddenStates(image, text, tokens), negatives.mask[chosen], self._references)
            )
        return torch.cat(maps)


def map_maker(method: AttributionMethod, batch_size: int) -> MapMaker:
    """The maker that fits a method."""
    if isinstance(method, PairwiseMethod):
        return PairMapMaker(method, batch_size)
    return MapMaker(method, batch_size)
