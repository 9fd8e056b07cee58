"""Methods with token-patch attributions, which map a phrase within its caption to patches.

A new pairwise method derives from `PairwiseMethod` and implements `_attribute`. Everything else has a default that
works; overriding `image_states`, `text_states` and what uses them saves the work that questions of a batch share.

Shape suffixes: B pairs, L caption tokens, H x W the patch grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_xai.attribution.base import (
    AttributionMethod,
    InteractionAttribution,
    OtherCaptions,
    check_batch,
    check_finite,
)
from lightning_xai.attribution.score import Question
from lightning_xai.attribution.targets import SIMILARITY, Target
from lightning_xai.models.at_layer import TowerAtLayer, as_constant, differentiable

__all__ = ["Captured", "HiddenStates", "IntraModalAttribution", "PairwiseMethod", "References", "capture"]


@dataclass(frozen=True)
class IntraModalAttribution:
    """The contribution of the parts of two images, or of two captions, to their similarity.

    Attributes:
        interactions: [B, H, W, H, W] for images, [B, L, L] for captions: parts of the first input, then of the second;
            signed, in units of the similarity. CLS, registers and padding are left out. An image and a sound have each
            a grid of their own.
        similarity: [B], the cosine similarity that is explained, in [-1, 1].
        completeness_error: [B], as for `Attribution`.
    """

    interactions: Tensor
    similarity: Tensor
    completeness_error: Tensor

    @property
    def first(self) -> Tensor:
        """[B, H, W] or [B, L]: contribution of each part of the first input, with the whole second one."""
        return self.interactions.sum(dim=tuple(range(self.interactions.ndim // 2 + 1, self.interactions.ndim)))

    @property
    def second(self) -> Tensor:
        """[B, H, W] or [B, L]: contribution of each part of the second input, with the whole first one."""
        return self.interactions.sum(dim=tuple(range(1, self.interactions.ndim // 2 + 1)))


@dataclass(frozen=True)
class HiddenStates:
    """The part of explaining B pairs that depends on each input alone: made by a forward pass, or captured from one.

    Attributes:
        image: [B, ...], as `PairwiseMethod.image_states` returns it.
        text: [B, ...], as `PairwiseMethod.text_states` returns it.
        tokens: [B, L], the captions' token ids.
        image_embeddings: [B, K], not normalised, where the pass that made `image` went on to them.
    """

    image: Tensor
    text: Tensor
    tokens: Tensor
    image_embeddings: Tensor | None = None

    def __getitem__(self, rows: slice) -> HiddenStates:
        return HiddenStates(self.image[rows], self.text[rows], self.tokens[rows], self._embeddings_of(rows))

    def _embeddings_of(self, images: slice | Tensor) -> Tensor | None:
        return None if self.image_embeddings is None else self.image_embeddings[images]

    def pairs(self, images: Tensor, captions: Tensor) -> HiddenStates:
        """The states of pairs, given the rows [N] of their images and of their captions."""
        embeddings = self._embeddings_of(images)
        return HiddenStates(self.image[images], self.text[captions], self.tokens[captions], embeddings)


@dataclass(frozen=True)
class Captured:
    """Inputs of a layer, one for each forward pass through it, as `TowerAtLayer.features_before` returns them.

    Attributes:
        image: those of the image tower.
        text: those of the text tower.
        image_embeddings: what the image tower gave in the end, not normalised.
    """

    image: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)
    image_embeddings: list[Tensor] = field(default_factory=list)

    @staticmethod
    def only(kept: list[Tensor], count: int) -> Tensor | None:
        """The one input kept, if it is of `count` images or captions; else the pass that is meant is not known."""
        return as_constant(kept[0]) if len(kept) == 1 and len(kept[0]) == count else None


@contextmanager
def capture(image: TowerAtLayer, text: TowerAtLayer, *, graph: bool = False) -> Iterator[Captured]:
    """Inside, keep what enters both towers' layers; the hooks are removed also after an exception.

    Args:
        image: whose layer is listened to.
        text: likewise.
        graph: keep the graph of what enters, so that derivatives go on to the layers before.

    Example:
        >>> with capture(image, text) as captured:  # doctest: +SKIP
        ...     model(images, tokens)
        >>> hidden = Captured.only(captured.image, len(images))  # doctest: +SKIP
    """
    captured, handles = Captured(), []
    try:
        for tower, kept in ((image, captured.image), (text, captured.text)):

            def keep(hidden: Tensor, to: list[Tensor] = kept) -> None:
                to.append(hidden if graph else hidden.detach())

            handles.append(tower.listen(keep))
        if image.whole is not None and not graph:

            def keep_embedding(_: object, inputs: object, output: object) -> None:
                if isinstance(output, Tensor):
                    captured.image_embeddings.append(output.detach())

            handles.append(image.whole.register_forward_hook(keep_embedding))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class References:
    """Hidden states of the two uninformative references, [1, ...] each; valid while the weights stay as they are."""

    image: Tensor
    text: Tensor


class PairwiseMethod(AttributionMethod):
    """A method whose results have `interactions`, so that a phrase is explained within its caption.

    A method that implements `attribute_images` and `attribute_texts` sets `intra_modal`. Interactions of a linear
    target are those of each caption's similarity, times its factor in the target.
    """

    pairwise = True
    explains = "linear"

    def attribute(self, images: Tensor, tokens: Tensor, target: Target = SIMILARITY) -> InteractionAttribution:
        """Explain the similarity of each image and its caption, or a linear target, by pairs of token and patch.

        See `AttributionMethod.attribute`.
        """
        result = super().attribute(images, tokens, target)
        assert isinstance(result, InteractionAttribution)  # `AttributionMethod.attribute` has checked it
        return result

    @abstractmethod
    def _attribute(self, images: Tensor, tokens: Tensor) -> InteractionAttribution:
        """`attribute` of a batch that has been checked, with the model ready for derivatives."""

    def _attribute_to(self, images: Tensor, question: Question) -> InteractionAttribution:
        return self._to_target(self.image_states(images), question)

    def _to_target(self, image: Tensor, question: Question) -> InteractionAttribution:
        """The interactions of all captions with images whose states are given."""
        found = []
        for tokens in question.captions:
            states = HiddenStates(image, self.text_states(tokens), tokens)
            found.append(self.attribute_states(states, self.references(tokens.shape[1])))
        return self._combined(found, question)

    def _combined(self, found: Sequence[InteractionAttribution], question: Question) -> InteractionAttribution:
        """The attribution to a linear target, of those to the similarity of each caption."""
        first, *rest = found
        similarity_BC = torch.stack([each.similarity for each in found], dim=1)
        factors_BC = question.coefficients(similarity_BC)
        others = None
        if question.others is not None:
            factors_BM = factors_BC[:, 1:, None]
            interactions = torch.stack([each.interactions for each in rest], 1) * factors_BM[..., None, None]
            prefix = torch.stack([each.prefix for each in rest], 1) * factors_BM
            text, counted = interactions.sum(dim=(3, 4)), question.counted[:, 1:]
            others = OtherCaptions(question.others, counted, similarity_BC[:, 1:], text, interactions, prefix)
        errors = [each.completeness_error for each in found if each.completeness_error is not None]
        own_B = factors_BC[:, 0]
        return replace(
            first,
            image=weighted([each.image for each in found], factors_BC),
            text=own_B[:, None] * first.text,
            interactions=own_B[:, None, None, None] * first.interactions,
            prefix=own_B[:, None] * first.prefix,
            completeness_error=weighted(errors, factors_BC) if errors else None,
            explained=question.target.value(similarity_BC, question.pair(similarity_BC)),
            others=others,
        )

    def image_map(self, images: Tensor, tokens: Tensor, target: Target = SIMILARITY) -> Tensor:
        """The image map of `attribute` alone, [B, H, W]: for feature pairs at the cost of a span map."""
        return self.attribute(images, tokens, target).image

    def span_map(self, images: Tensor, tokens: Tensor, span_mask: Tensor) -> Tensor:
        """Attribute to the patches what the tokens of a span, together, match: the sum of their rows of `attribute`.

        Args:
            images: [B, 3, H, W].
            tokens: [B, L] token ids.
            span_mask: [B, L] bool, the tokens of the span.

        Returns:
            [B, H, W], signed, in units of the similarity.

        Raises:
            ValueError: shapes do not match, a row selects no token of its caption, or the map is not finite.
        """
        check_batch(images, tokens)
        self._check_images(images)
        if span_mask.shape != tokens.shape:
            raise ValueError(
                f"span_mask has to be of the tokens' shape {tuple(tokens.shape)}; got {tuple(span_mask.shape)}"
            )
        self._check_span(tokens, span_mask)
        with differentiable(self.encoder):
            references = self.references(tokens.shape[1])
            every = torch.arange(len(images), device=tokens.device)
            parts = []
            for rows in self._chunks(len(images)):
                states, own = self.hidden_states(images[rows], tokens[rows]), every[: len(images[rows])]
                parts.append(self.span_maps_of(states, own, own, span_mask[rows], references))
        maps = torch.cat(parts)
        check_finite(maps, "span map", self.label)
        return maps

    def _check_span(self, tokens: Tensor, span_mask: Tensor) -> None:
        empty = ~(span_mask & self._visible(tokens)).any(dim=1)
        if empty.any():
            raise ValueError(f"rows {empty.nonzero()[:, 0].tolist()} of span_mask select no token of their caption")

    def _visible(self, tokens: Tensor) -> Tensor:
        return self.encoder.text_at_layer().visible(tokens)

    def capturing(self) -> AbstractContextManager[Captured]:
        """Inside, keep what the model's own forward passes compute and `hidden_states` would compute again.

        By default nothing.

        Example:
            >>> with method.capturing() as captured:  # doctest: +SKIP
            ...     model(images, tokens)
            >>> states = method.hidden_states(images, tokens, captured)  # doctest: +SKIP
        """
        return nullcontext(Captured())

    def hidden_states(self, images: Tensor, tokens: Tensor, captured: Captured | None = None) -> HiddenStates:
        """States of images [B, 3, H, W] and captions [C, L]: captured where one pass was just these, else computed."""
        captured = captured or Captured()
        image, text = Captured.only(captured.image, len(images)), Captured.only(captured.text, len(tokens))
        embeddings = None if image is None else Captured.only(captured.image_embeddings, len(images))
        return HiddenStates(
            self.image_states(images) if image is None else image,
            self.text_states(tokens) if text is None else text,
            tokens,
            embeddings,
        )

    def image_states(self, images: Tensor) -> Tensor:
        """The part of explaining that depends on the image alone; by default the image itself."""
        return images

    def text_states(self, tokens: Tensor) -> Tensor:
        """The part of explaining that depends on the caption alone; by default its token ids."""
        return tokens

    def references(self, length: int | None = None) -> References:
        """The states that all pairs are compared with, of the text's first `length` tokens; by default none."""
        return References(torch.empty(1, 0), torch.empty(1, 0))

    def attribute_states(self, states: HiddenStates, references: References) -> InteractionAttribution:
        """`attribute` of states that have been computed."""
        return self.attribute(states.image, states.tokens)

    def span_maps_of(
        self, states: HiddenStates, images: Tensor, captions: Tensor, span_masks: Tensor, references: References
    ) -> Tensor:
        """`span_map` of R spans of states that have been computed; what spans share is computed once.

        Args:
            states: of images and of captions, which need not be pairs here.
            images: [R], row of each span's image in `states.image`.
            captions: [R], row of its caption in `states.text`.
            span_masks: [R, L] bool.
            references: of the method.

        Returns:
            [R, H, W]
        """
        if not len(images):
            return states.image.new_zeros(0, *self.grid)
        pairs, place = torch.unique(torch.stack([images, captions], dim=1), dim=0, return_inverse=True)
        interactions = self.attribute_states(states.pairs(*pairs.unbind(dim=1)), references).interactions
        return torch.einsum("rl,rlhw->rhw", span_masks.to(interactions), interactions[place])

    def attribute_images(self, images: Tensor, others: Tensor) -> IntraModalAttribution:
        """All pairs of patches of two images, by the image tower alone.

        Args:
            images: [B, 3, height, width].
            others: [B, 3, height, width]; other i is compared with image i.

        Raises:
            NotImplementedError: the method only explains images by captions; `intra_modal` is false.
        """
        raise NotImplementedError(f"{self.label} does not compare two images; use FeaturePairAttribution")

    def attribute_texts(self, tokens: Tensor, others: Tensor) -> IntraModalAttribution:
        """All pairs of tokens of two captions, by the text tower alone.

        Args:
            tokens: [B, L] token ids.
            others: [B, L]; other i is compared with caption i.

        Raises:
            NotImplementedError: as for `attribute_images`.
        """
        raise NotImplementedError(f"{self.label} does not compare two captions; use FeaturePairAttribution")


def weighted(parts: Sequence[Tensor], factors_BC: Tensor) -> Tensor:
    """The sum of parts [B, ...], each times its factor."""
    return torch.einsum("bc,bc...->b...", factors_BC.to(parts[0]), torch.stack(list(parts), dim=1))
