"""What an explorer shows: photos, their captions, and what methods say of both. Plain numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_xai.report.explanation import Token
from lightning_xai.report.plots import Scale

Values = NDArray[np.floating]
Frame = tuple[float, float, float, float]


@dataclass(frozen=True)
class ExplorerReading:
    """What one method says of an image and a caption of n tokens, read at one pair of layers.

    Attributes:
        method: its name.
        where: the layers that it was read at; empty for methods without.
        tokens_by_patches: [n, H, W], what each pair of token and patch adds; None for methods without interactions.
        image: [H, W], the map of the whole caption.
        text: [n], the values of the tokens with the whole image; None where only the map is known.
        similarity: the cosine similarity that is explained; None where it is not known.
        completeness_error: None for methods that have none.
        scale: how values become colours.
        note: a line about it, such as its gamma.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    method: str
    where: str
    tokens_by_patches: Values | None
    image: Values
    text: Values | None
    similarity: float | None
    completeness_error: float | None = None
    scale: Scale = "signed"
    note: str = ""

    def __post_init__(self) -> None:
        pairs, count = self.tokens_by_patches, 0 if self.text is None else len(self.text)
        if self.image.ndim != 2 or not self.image.size:
            raise ValueError(f"image: expected [H, W] patches, got the shape {self.image.shape}")
        if pairs is not None and pairs.shape != (count, *self.image.shape):
            raise ValueError(
                f"tokens_by_patches: expected {(count, *self.image.shape)}, as text and image have, got {pairs.shape}"
            )

    def map_of(self, words: Sequence[int]) -> Values:
        """The map [H, W] of some tokens by their places; of the whole caption without any, or without interactions."""
        if self.tokens_by_patches is None or not len(words):
            return self.image
        return np.asarray(self.tokens_by_patches[list(words)].sum(axis=0))


@dataclass(frozen=True)
class ExplorerCaption:
    """A caption and what methods say of it.

    Attributes:
        text: the caption.
        tokens: its tokens, [n]; those of the phrase that is asked about are marked.
        readings: at least one, in the order in which they are offered.

    Raises:
        ValueError: no reading, or not one value for each token.
    """

    text: str
    tokens: Sequence[Token]
    readings: Sequence[ExplorerReading]

    def __post_init__(self) -> None:
        if not self.readings:
            raise ValueError("readings: expected at least one, got none")
        for each in self.readings:
            if each.text is not None and each.text.shape != (len(self.tokens),):
                raise ValueError(f"text: expected a value for each of {len(self.tokens)} tokens, got {each.text.shape}")

    @property
    def phrase(self) -> list[int]:
        """Places of the marked tokens."""
        return [place for place, token in enumerate(self.tokens) if token.marked]


@dataclass(frozen=True)
class ExplorerItem:
    """A photo with its captions.

    Attributes:
        key: names it, such as the file's name.
        photo: [height, width, 3] uint8.
        captions: the caption, then those that it is compared with.
        frame: `(x0, y0, x1, y1)` of what maps cover, in pixels of `photo`; parts may lie outside of it (padding). None:
            the whole photo.
        box: `(x0, y0, x1, y1)` that is asked about, or that an object has, in pixels of `photo`; None without one.
        asks_box: whether the words are coloured by the box at first; else it is only drawn.
        label: what distinguishes the item from others of its group, such as `"epoch 3"`; shown next to it.
        group: items of one group share a slider in the mode `"time"`; by default those with the same key.

    Raises:
        ValueError: no such photo, no caption, or no box to ask about.
    """

    key: str
    photo: NDArray[np.uint8]
    captions: Sequence[ExplorerCaption]
    frame: Frame | None = None
    box: Frame | None = None
    asks_box: bool = False
    label: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        shape, kind = np.shape(self.photo), self.photo.dtype
        if len(shape) != 3 or shape[2] != 3 or not self.photo.size or kind != np.uint8:
            raise ValueError(f"photo: expected [height, width, 3] of uint8, got the shape {shape} of {kind}")
        if not self.captions:
            raise ValueError("captions: expected at least one, got none")
        if self.asks_box and self.box is None:
            raise ValueError("asks_box: there is no box to ask about; give one")

    @property
    def series(self) -> str:
        """The name of the group that the item belongs to."""
        return self.group or self.key
