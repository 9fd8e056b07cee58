"""Methods that explain the input of one tower at a time, with the embeddings of all other inputs as they are.

Shape suffixes: B pairs, L tokens, H x W the patch grid, K embedding width, C captions (the pair's own first).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution.base import Attribution, AttributionMethod, Explains, OtherCaptions
from lightning_xai.attribution.perturbation import wide_dtype
from lightning_xai.attribution.score import Question, Score
from lightning_xai.attribution.targets import SIMILARITY
from lightning_xai.models.at_layer import TextTowerAtLayer, TowerAtLayer

__all__ = ["AtLayerMethod", "Input", "InputMethod", "Mapped", "OneTowerMethod"]

Mapped = tuple[Tensor, Tensor | None]
"""A map [B, H, W] or [B, L], and what its sum is off [B], of methods whose maps have a known sum."""


@dataclass(frozen=True)
class Input:
    """B images, or B captions, as a method has read them.

    Attributes:
        batch: images [B, 3, height, width], or token ids [B, L].
        embedding: [B, K], without graph.
        seen: what else the method keeps of the pass.
    """

    batch: Tensor
    embedding: Tensor
    seen: Any = None


class InputMethod(AttributionMethod):
    """A method that reads each image and each caption once, and explains any target by what it has read."""

    explains: ClassVar[Explains] = "any"
    _wide: ClassVar[bool] = False  # whether many scores are summed, in float32 at least

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        return self._attribute_to(images, Question.of(SIMILARITY, self.encoder, tokens))

    def _attribute_to(self, images: Tensor, question: Question) -> Attribution:
        parts = []
        for rows in self._chunks(len(images)):
            asked = question[rows]
            texts = [self._read_text(tokens) for tokens in asked.captions]
            parts.append(self._explain(self._read_image(images[rows]), texts, asked))
        return Attribution.concatenate(parts)

    @torch.no_grad()
    def _read_image(self, images: Tensor) -> Input:
        return Input(images, self._widened(self.encoder.encode_image(images)))

    @torch.no_grad()
    def _read_text(self, tokens: Tensor) -> Input:
        return Input(tokens, self._widened(self.encoder.encode_text(tokens)))

    def _widened(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(wide_dtype(embeddings)) if self._wide else embeddings

    @abstractmethod
    def _explain(self, image: Input, texts: Sequence[Input], asked: Question) -> Attribution:
        """The maps of images and of all their captions."""


class OneTowerMethod(InputMethod):
    """A method that asks how the target depends on one input, with all others as they are.

    It implements the maps of images and of captions for a score, a function of their embeddings.
    """

    def _explain(self, image: Input, texts: Sequence[Input], asked: Question) -> Attribution:
        embeddings = [text.embedding for text in texts]
        pair = asked.pair(similarities(image, texts))
        image_map, error = self._image_map(image, asked.score_of_image(embeddings, pair))
        maps = []
        for caption, text in enumerate(texts):
            score = asked.score_of_caption(image.embedding, pair, caption, signed=self.signed)
            text_map, text_error = self._text_map(text, score)
            maps.append(text_map)
            if error is not None and text_error is not None:
                error = torch.where(error.abs() > text_error.abs(), error, text_error)
        return answer(asked, pair.values, image_map, maps, error)

    @abstractmethod
    def _image_map(self, image: Input, score: Score) -> Mapped:
        """The map of B images for a score of their embeddings."""

    @abstractmethod
    def _text_map(self, text: Input, score: Score) -> Mapped:
        """The map of B captions for a score of their embeddings."""


class AtLayerMethod(OneTowerMethod):
    """A method that keeps the hidden states at a layer of each tower.

    Attributes:
        image: the image tower at its layer.
        text: the text tower at its layer.
    """

    image: TowerAtLayer
    text: TextTowerAtLayer

    @torch.no_grad()
    def _read_image(self, images: Tensor) -> Input:
        hidden = self.image.features_before(images)
        return Input(images, self.image.embed_from(hidden), hidden)

    @torch.no_grad()
    def _read_text(self, tokens: Tensor) -> Input:
        hidden = self.text.features_before(tokens)
        return Input(tokens, self.text.embed_from(hidden, tokens), hidden)


def similarities(image: Input, texts: Sequence[Input]) -> Tensor:
    """Cosine similarities [B, C] of images with each caption."""
    return cosine_similarity(image.embedding[:, None], torch.stack([text.embedding for text in texts], 1), dim=2)


def answer(
    asked: Question, similarities_BC: Tensor, image: Tensor, texts: Sequence[Tensor], error: Tensor | None = None
) -> Attribution:
    """An attribution of maps: of images [B, H, W], and of each caption [B, L]."""
    if asked.is_similarity:
        return Attribution(image, texts[0], similarities_BC[:, 0], completeness_error=error)
    others = None
    if asked.others is not None:
        counted = asked.counted[:, 1:]
        text = torch.stack(list(texts[1:]), dim=1) * counted[:, :, None]
        others = OtherCaptions(asked.others, counted, similarities_BC[:, 1:], text)
    value = asked.target.value(similarities_BC, asked.pair(similarities_BC))
    return Attribution(image, texts[0], similarities_BC[:, 0], completeness_error=error, explained=value, others=others)
