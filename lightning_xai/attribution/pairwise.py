"""Methods with token-patch attributions, which map a phrase within its caption to patches.

A new pairwise method derives from `PairwiseMethod` and implements `_attribute`. Everything else has a default that
works; overriding `image_states`, `text_states` and what uses them saves the work that questions of a batch share.

Shape suffixes: B pairs, L caption tokens, H x W the patch grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_xai.attribution.base import AttributionMethod, InteractionAttribution, check_batch, check_finite
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
    """

    image: Tensor
    text: Tensor
    tokens: Tensor

    def __getitem__(self, rows: slice) -> HiddenStates:
        return HiddenStates(self.image[rows], self.text[rows], self.tokens[rows])

    def pairs(self, images: Tensor, captions: Tensor) -> HiddenStates:
        """The states of pairs, given the rows [N] of their images and of their captions."""
        return HiddenStates(self.image[images], self.text[captions], self.tokens[captions])


@dataclass(frozen=True)
class Captured:
    """Inputs of a layer, one for each forward pass through it, as `TowerAtLayer.features_before` returns them.

    Attributes:
        image: those of the image tower.
        text: those of the text tower.
    """

    image: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)

    @staticmethod
    def only(kept: list[Tensor], count: int) -> Tensor | None:
        """The one input kept, if it is of `count` images or captions; else the pass that is meant is not known."""
        return as_constant(kept[0]) if len(kept) == 1 and len(kept[0]) == count else None


@contextmanager
def capture(image: TowerAtLayer, text: TowerAtLayer) -> Iterator[Captured]:
    """Inside, keep what enters both towers' layers, without graph; the hooks are removed also after an exception.

    Example:
        >>> with capture(image, text) as captured:  # doctest: +SKIP
        ...     model(images, tokens)
        >>> hidden = Captured.only(captured.image, len(images))  # doctest: +SKIP

    Raises:
        ValueError: the layer is the head, which has no block.
    """
    captured, handles = Captured(), []
    try:
        for tower, kept in ((image, captured.image), (text, captured.text)):
            if tower.block is None:
                raise ValueError(
                    f"layer {tower.layer} is the head, which has no block to listen to; take a layer before"
                )

            def keep(_: object, inputs: tuple[Tensor, ...], at: TowerAtLayer = tower, to: list[Tensor] = kept) -> None:
                to.append(at.captured(inputs[0]).detach())

            handles.append(tower.block.register_forward_pre_hook(keep))
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

    A method that implements `attribute_images` and `attribute_texts` sets `intra_modal`.
    """

    pairwise = True

    def attribute(self, images: Tensor, tokens: Tensor) -> InteractionAttribution:
        """Explain the similarity of each image and its caption by pairs of token and patch.

        See `AttributionMethod.attribute`.
        """
        result = super().attribute(images, tokens)
        assert isinstance(result, InteractionAttribution)  # `AttributionMethod.attribute` has checked it
        return result

    @abstractmethod
    def _attribute(self, images: Tensor, tokens: Tensor) -> InteractionAttribution:
        """`attribute` of a batch that has been checked, with the model ready for derivatives."""

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
        return HiddenStates(
            self.image_states(images) if image is None else image,
            self.text_states(tokens) if text is None else text,
            tokens,
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
