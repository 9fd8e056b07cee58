"""Counts by reason of what could not be used: of a data set's own files, of prepared shards, and in a run.

Nothing that cannot be used stops the rest: it is excluded, counted under its reason, and shown. A data set's reader
counts reasons (`Counter[str]`); readers of shards count pairs of shard and reason (`ExcludedByShard`).
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

__all__ = [
    "BrokenRecordWarning",
    "ExcludedByShard",
    "ExcludedError",
    "Fault",
    "FaultCounter",
    "TooManyBrokenRecordsError",
    "counting",
    "excluded_as",
    "shard_table",
    "worst_shards",
]

BROKEN_RECORD = "broken record"
CORRUPT_IMAGE = "corrupt image"
DUPLICATE_KEY = "duplicate key"
MISSING_SHARD = "missing shard"
UNKNOWN_MEMBER = "unknown member"
UNPAIRED_MEMBER = "member without its pair"
UNREADABLE_SHARD = "unreadable shard"
WRONG_CHECKSUM = "wrong checksum"
WRONG_COUNT = "wrong count"
WRONG_SIZE = "wrong size"

_SHOWN_SHARDS = 10
_SHOWN_FAULTS = 10

ExcludedByShard = Counter[tuple[str, str]]
"""(name of a shard, reason) -> how many."""


class ExcludedError(Exception):
    """A region, a caption or an image is excluded; the message is the reason under which it is counted."""


@contextmanager
def counting(excluded: Counter[str]) -> Iterator[None]:
    """Count the reason of an `ExcludedError`, and go on after the block.

    >>> excluded = Counter()
    >>> for side in (2, 0):
    ...     with counting(excluded):
    ...         if not side:
    ...             raise ExcludedError("box_without_area")
    >>> excluded
    Counter({'box_without_area': 1})
    """
    try:
        yield
    except ExcludedError as reason:
        excluded[str(reason)] += 1


@contextmanager
def excluded_as(reason: str, errors: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """Raise errors of the block as an `ExcludedError`."""
    try:
        yield
    except errors as error:
        raise ExcludedError(reason) from error


@dataclass(unsafe_hash=True)  # not frozen: Lightning sets the fields of a copy where it converts a batch's precision
class Fault:
    """One thing that is wrong with a shard or a record.

    Attributes:
        index: the record's global index in its split, which gives its shard; -1 for a whole shard.
        kind: the reason under which it is counted, a constant of this module.
        message: what is wrong where, and what to do.
    """

    index: int
    kind: str
    message: str


class BrokenRecordWarning(UserWarning):
    """A record of a shard could not be used and is excluded."""


class TooManyBrokenRecordsError(RuntimeError):
    """More records are broken than `max_fault_fraction` allows."""


class FaultCounter:
    """The broken records of one split that this rank has met in one pass, a training epoch or an evaluation.

    Args:
        split: its name, for messages.
        place: where its shards lie, for messages.
        shards: name -> number of records of each shard, in order.
        records: how many records a pass reads, over all ranks.
        fraction: share of broken records, 0 to 1, that is allowed; one record always is, unless it is 0.

    Attributes:
        counts: broken records by shard and reason.
        read: records so far, broken ones included.
    """

    def __init__(self, split: str, place: str, shards: Mapping[str, int], records: int, fraction: float) -> None:
        self.counts: ExcludedByShard = Counter()
        self.read = 0
        self._where = f"{split} ({place})"
        self._split = split
        self._shards = list(shards)
        self._stops = list(accumulate(shards.values()))
        self._records = records
        self._fraction = fraction
        self._shown: set[str] = set()

    def begin(self) -> None:
        """Start a pass from nothing."""
        self.read = 0
        self.counts.clear()

    def add(self, faults: Sequence[Fault], read: int) -> None:
        """Count what a batch of `read` records, padding not included, could not use; the first few faults are shown.

        Raises:
            TooManyBrokenRecordsError: already this rank's are more than the records of all ranks allow.
        """
        self.read += read
        for fault in faults:
            shard = self._shards[bisect_right(self._stops, fault.index)]
            self.counts[shard, fault.kind] += 1
            message = f"{self._split}: excluded sample {fault.index} of {shard}: {fault.message}"
            if message not in self._shown and len(self._shown) < _SHOWN_FAULTS:
                self._shown.add(message)
                more = "; further ones are counted, not shown" if len(self._shown) == _SHOWN_FAULTS else ""
                warnings.warn(message + more, BrokenRecordWarning, stacklevel=2)
        if faults:
            self._check(self.counts, self._records, f"the {self._records:,} records of a pass are broken already")

    def check_sum(self, counts: ExcludedByShard, read: int) -> None:
        """Decide on the counts of all ranks at the end of a pass, in which they have read `read` records together.

        Raises:
            TooManyBrokenRecordsError: they are more than allowed; the message names the shards.
        """
        self._check(counts, read, f"{read:,} records are broken")

    def state(self) -> dict[str, Any]:
        """The pass so far, as plain values."""
        counts = [[shard, reason, count] for (shard, reason), count in sorted(self.counts.items())]
        return {"read": self.read, "counts": counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a pass whose `state` this was."""
        self.read = state["read"]
        self.counts = Counter({(shard, reason): count for shard, reason, count in state["counts"]})

    def _check(self, counts: ExcludedByShard, records: int, so_many: str) -> None:
        allowed = max(1, int(self._fraction * records)) if self._fraction else 0
        if counts.total() > allowed:
            raise TooManyBrokenRecordsError(
                f"{self._where}: {counts.total():,} of {so_many}, and max_fault_fraction={self._fraction} allows "
                f"{allowed:,}. They are in {worst_shards(counts)}. Copy these shards again, or prepare the data again "
                "(`python -m lightning_xai verify` gives details), or raise max_fault_fraction to go on without them"
            )


def shard_table(counts: ExcludedByShard) -> str:
    """The shards with most faults, as lines to read.

    >>> one, two = ("a.tar", "corrupt image"), ("b.tar", "corrupt image")
    >>> print(shard_table(Counter({one: 2, two: 1, ("b.tar", "duplicate key"): 9})))
    shard  fault          count
    b.tar  duplicate key      9
           corrupt image      1
    a.tar  corrupt image      2
    """
    ranked = _ranked(counts)
    rows = [("shard", "fault", "count")]
    for shard, reasons in ranked[:_SHOWN_SHARDS]:
        names = [shard] + [""] * (len(reasons) - 1)
        rows += [(name, kind, f"{count:,}") for name, (kind, count) in zip(names, reasons.most_common(), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}" for name, kind, count in rows]
    if rest := ranked[_SHOWN_SHARDS:]:
        faults = sum(reasons.total() for _, reasons in rest)
        lines.append(f"and {len(rest):,} more shard{_s(len(rest))} with {faults:,} fault{_s(faults)}")
    return "\n".join(lines)


def worst_shards(counts: ExcludedByShard) -> str:
    """The shards with most faults, in one line.

    >>> one, two = ("a.tar", "corrupt image"), ("b.tar", "corrupt image")
    >>> worst_shards(Counter({one: 2, two: 1, ("b.tar", "duplicate key"): 9}))
    'b.tar (9 duplicate key, 1 corrupt image), a.tar (2 corrupt image)'
    """
    ranked = _ranked(counts)
    named = [
        f"{shard} ({', '.join(f'{count:,} {reason}' for reason, count in reasons.most_common())})"
        for shard, reasons in ranked[:_SHOWN_SHARDS]
    ]
    rest = len(ranked) - _SHOWN_SHARDS
    return ", ".join(named) + (f" and {rest:,} more shard{_s(rest)}" if rest > 0 else "")


def _ranked(counts: ExcludedByShard) -> list[tuple[str, Counter[str]]]:
    """Shards with their counts by reason, worst first; equally bad ones by name, so that all ranks say the same."""
    shards: dict[str, Counter[str]] = {}
    for (shard, reason), count in sorted(counts.items()):
        shards.setdefault(shard, Counter())[reason] += count
    return sorted(shards.items(), key=lambda item: (-item[1].total(), item[0]))


def _s(count: int) -> str:
    return "" if count == 1 else "s"
