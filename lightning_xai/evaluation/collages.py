"""Collages of two by two images: one is a caption's own, the other three show nothing that the caption names."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_xai.data.batch import Batch
from lightning_xai.data.sample import stable_hash

__all__ = ["POOL", "Collage", "Collages"]

POOL = 64
"""Images of a split that others are taken from, drawn with the seed of the data."""
_QUARTERS = 4


@dataclass(frozen=True)
class Collage:
    """A collage of four images, each of half the height and width.

    Attributes:
        image: [channels, h, w], of the model's size.
        quarter: the place of the caption's own image: 0 and 1 above, 2 and 3 below, from left to right.
        others: the keys of the other images, joined by spaces.
        passed_over: how many images were drawn, and not taken since they show a class that the caption names.
    """

    image: Tensor
    quarter: int
    others: str
    passed_over: int = 0

    def inside(self, grid: tuple[int, int]) -> Tensor:
        """The share of each patch [H, W] that lies in the quarter: a half along the middle of an odd grid."""
        halves = []
        for count, length, second in zip(grid, self.image.shape[1:], divmod(self.quarter, 2), strict=True):
            edge = length // 2 / length * count
            first = (edge - torch.arange(count, dtype=torch.float64)).clamp(0, 1)
            halves.append(1 - first if second else first)
        return halves[0][:, None] * halves[1]


class Collages:
    """Makes collages with images of the same split.

    Args:
        others: the images. Those that are broken, are the caption's own or, where classes are known, show one that the
            caption names are passed over.
    """

    def __init__(self, others: Batch) -> None:
        self._others = others
        rows, labels = others.phrases.image_row.tolist(), others.phrases.label.tolist()
        self._shown = {(row, label) for row, label in zip(rows, labels, strict=True)}
        self._index = others.index.tolist()

    def of(self, batch: Batch) -> list[Collage | None]:
        """The collage of each caption of a batch; None where fewer than three of the others can be taken.

        Which, and where each is, depends on key and number of the caption and on the others alone.
        """
        named: dict[int, set[int]] = {}
        for caption, label in zip(batch.phrases.caption_row.tolist(), batch.phrases.label.tolist(), strict=True):
            named.setdefault(caption, set()).add(label)
        captions = zip(batch.caption_image.tolist(), batch.caption_index.tolist(), strict=True)
        index = batch.index.tolist()
        collages: list[Collage | None] = []
        for caption, (image, number) in enumerate(captions):
            drawn = random.Random(stable_hash("collage", batch.keys[image], number))
            quarter = drawn.randrange(_QUARTERS)
            order = drawn.sample(range(len(self._index)), len(self._index))
            candidates = [other for other in order if self._index[other] not in (-1, index[image])]
            taken = self._taken(candidates, named.get(caption, set()))
            if len(taken) < _QUARTERS - 1:
                collages.append(None)
                continue
            pictures = [self._others.images[other] for other in taken]
            pictures.insert(quarter, batch.images[image])
            keys = " ".join(self._others.keys[other] for other in taken)
            passed_over = candidates.index(taken[-1]) + 1 - len(taken)
            collages.append(Collage(_joined(pictures), quarter, keys, passed_over))
        return collages

    def _taken(self, candidates: Sequence[int], named: Set[int]) -> list[int]:
        """The first three rows of the others that show no class that is named."""
        fitting = (row for row in candidates if not any((row, label) in self._shown for label in named))
        return list(islice(fitting, _QUARTERS - 1))


def _joined(pictures: list[Tensor]) -> Tensor:
    height, width = pictures[0].shape[1:]
    rows, columns = (height // 2, height - height // 2), (width // 2, width - width // 2)
    parts = [
        interpolate(picture[None], (rows[place // 2], columns[place % 2]), mode="bilinear", antialias=True)[0]
        for place, picture in enumerate(pictures)
    ]
    return torch.cat([torch.cat(parts[:2], dim=2), torch.cat(parts[2:], dim=2)], dim=1)
