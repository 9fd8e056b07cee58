"""Counts the broken records of a split by shard, and says when they are too many."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from lightning_xai.data.faults import Fault, FaultCounts, worst_shards
from lightning_xai.data.shard_store import ShardStore
from lightning_xai.data.shards import Manifest

__all__ = ["BrokenRecordWarning", "FaultCounter", "TooManyBrokenRecordsError"]

_SHOWN_FAULTS = 10


class BrokenRecordWarning(UserWarning):
    """A record of a shard could not be used and is left out."""


class TooManyBrokenRecordsError(RuntimeError):
    """More records are broken than `max_fault_fraction` allows."""


class FaultCounter:
    """The broken records of one split that this rank has met in one pass, a training epoch or an evaluation.

    Args:
        split: its name, for messages.
        store: where its shards lie, for messages.
        manifest: tells which shard a record is of.
        records: how many records a pass reads, over all ranks.
        fraction: share of broken records, 0 to 1, that is allowed; one record always is, unless it is 0.

    Attributes:
        counts: broken records by shard and kind.
        read: records so far, broken ones included.
    """

    def __init__(self, split: str, store: ShardStore, manifest: Manifest, records: int, fraction: float) -> None:
        self.counts: FaultCounts = Counter()
        self.read = 0
        self._where = f"{split} ({store})"
        self._split = split
        self._shards = [entry.name for entry in manifest.shards]
        self._stops = list(accumulate(entry.samples for entry in manifest.shards))
        self._records = records
        self._fraction = fraction
        self._epoch = 0
        self._shown: set[str] = set()

    def begin(self, epoch: int = 0) -> None:
        """Start a pass from nothing."""
        self._epoch, self.read = epoch, 0
        self.counts.clear()

    def continue_in(self, epoch: int) -> None:
        """Go on with an epoch, or begin it where the last records were another one's."""
        if epoch != self._epoch:
            self.begin(epoch)

    def add(self, faults: Sequence[Fault], read: int) -> None:
        """Count what a batch of `read` records, padding left out, could not use; the first few faults are shown.

        Raises:
            TooManyBrokenRecordsError: already this rank's are more than the records of all ranks allow.
        """
        self.read += read
        for fault in faults:
            shard = self._shards[bisect_right(self._stops, fault.index)]
            self.counts[shard, fault.kind] += 1
            message = f"{self._split}: left out sample {fault.index} of {shard}: {fault.message}"
            if message not in self._shown and len(self._shown) < _SHOWN_FAULTS:
                self._shown.add(message)
                more = "; further ones are counted, not shown" if len(self._shown) == _SHOWN_FAULTS else ""
                warnings.warn(message + more, BrokenRecordWarning, stacklevel=2)
        if faults:
            self._check(self.counts, self._records, f"the {self._records:,} records of a pass are broken already")

    def check_sum(self, counts: FaultCounts, read: int) -> None:
        """Decide on the counts of all ranks at the end of a pass, in which they have read `read` records together.

        Raises:
            TooManyBrokenRecordsError: they are more than allowed; the message names the shards.
        """
        self._check(counts, read, f"{read:,} records are broken")

    def state(self) -> dict[str, Any]:
        """The pass so far, as plain values."""
        counts = [[shard, kind, count] for (shard, kind), count in sorted(self.counts.items())]
        return {"epoch": self._epoch, "read": self.read, "counts": counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a pass whose `state` this was."""
        self._epoch, self.read = state["epoch"], state["read"]
        self.counts = Counter({(shard, kind): count for shard, kind, count in state["counts"]})

    def _check(self, counts: FaultCounts, records: int, so_many: str) -> None:
        allowed = max(1, int(self._fraction * records)) if self._fraction else 0
        if counts.total() > allowed:
            raise TooManyBrokenRecordsError(
                f"{self._where}: {counts.total():,} of {so_many}, and max_fault_fraction={self._fraction} allows "
                f"{allowed:,}. They are in {worst_shards(counts)}. Copy these shards again, or prepare the data again "
                "(`python -m lightning_xai verify` tells more), or raise max_fault_fraction to go on without them"
            )
