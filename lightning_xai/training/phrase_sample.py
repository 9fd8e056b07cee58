"""A sample of an evaluation's phrases that is the same on any number of processes and in batches of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightning_xai.data.batch import Batch
from lightning_xai.data.sample import stable_hash
from lightning_xai.evaluation.method_run import from_first, gather_to_first
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import measurable

__all__ = ["PhraseSample"]

_Place = tuple[int, int, int]
"""An image: the hash that orders it, its index in the split, and how many of its phrases can be measured."""


class PhraseSample:
    """Whole images, in the order of a hash of the seed and their key, until they have so many phrases to measure.

    Of the last one only the first phrases are taken, so that the sample has exactly `count` phrases, or all where there
    are fewer. Phrases of one image are sampled together because they share most of what attributing costs. How many
    phrases a split has is not known before its end: until then, the images that may be chosen are kept in memory, on
    the CPU, at most `count` of them.

    Args:
        count: phrases; None: all.
        seed: of the order.
        grid: rows and columns of the patches, which decide what can be measured.
    """

    def __init__(self, count: int | None, seed: int, grid: tuple[int, int]) -> None:
        self._count, self._seed, self._grid = count, seed, grid
        self._places: list[_Place] = []
        self._kept: list[Batch] = []

    def add(self, batch: Batch) -> Iterator[Batch]:
        """Take note of a batch; what is certain to be sampled comes back at once, which is all of it or nothing."""
        if self._count is None:
            yield batch
            return
        phrases = torch.bincount(batch.phrases.image_row[self._measured(batch)], minlength=len(batch.images)).tolist()
        hashes = [stable_hash("phrase sample", self._seed, key) for key in batch.keys]
        new = [place for place in zip(hashes, batch.index.tolist(), phrases, strict=True) if place[2]]
        self._places = _first(self._places + new, self._count)
        chosen = {index for _, index, _ in self._places}
        parts = [_with(part, chosen) for part in self._kept] + [_with(batch, chosen).to("cpu")]
        self._kept = [part for part in parts if len(part.images)]

    def finish(self, device: torch.device) -> Iterator[Batch]:
        """The rest of the sample, on a device; every process has to call this."""
        if self._count is None:
            return
        most = self._count
        parts = gather_to_first(self._places)
        chosen = from_first(lambda: _first([place for part in parts for place in part], most))
        over = sum(count for _, _, count in chosen) - most
        last = chosen[-1] if chosen else None
        kept, self._kept = self._kept, []
        for part in kept:
            found = _with(part, {index for _, index, _ in chosen})
            if last is not None and over > 0:
                found = self._shortened(found, last[1], last[2] - over)
            if len(found.images):
                yield found.to(device)

    def _measured(self, batch: Batch) -> Tensor:
        size = (batch.images.shape[2], batch.images.shape[3])
        reason = measurable(batch.phrases.reason, batch.phrases.boxes, self._grid, size)
        return reason == Exclusion.MEASURED

    def _shortened(self, batch: Batch, index: int, most: int) -> Batch:
        """The batch with no more than the first phrases that can be measured of one image."""
        own = batch.index[batch.phrases.image_row] == index
        measured = self._measured(batch) & own
        # The rows after them go as well: a phrase is numbered by those before it.
        kept = ~own | (measured.cumsum(dim=0) - measured.long() < most)
        return replace(batch, phrases=batch.phrases.only(kept.nonzero()[:, 0]))


def _first(places: list[_Place], most: int) -> list[_Place]:
    """The first images that have `most` phrases together."""
    found, total = [], 0
    for place in sorted(places):
        if total >= most:
            break
        found.append(place)
        total += place[2]
    return found


def _with(batch: Batch, indices: set[int]) -> Batch:
    """The batch with no other images than these of the split."""
    rows = [row for row, index in enumerate(batch.index.tolist()) if index in indices]
    if len(rows) == len(batch.images):
        return batch
    return batch.only(torch.tensor(rows, dtype=torch.int64, device=batch.index.device))
