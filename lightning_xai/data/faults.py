"""Faults in the data: of which kind they are, and how they are counted and shown by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Fault", "FaultCounts", "fault_table", "worst_shards"]

BROKEN_RECORD = "broken record"
DAMAGED_IMAGE = "damaged image"
DUPLICATE_KEY = "duplicate key"
MISSING_SHARD = "missing shard"
UNPAIRED_MEMBER = "member without its pair"
UNREADABLE_SHARD = "unreadable shard"
WRONG_CHECKSUM = "wrong checksum"
WRONG_COUNT = "wrong count"
WRONG_SIZE = "wrong size"

_SHOWN_SHARDS = 10

FaultCounts = Counter[tuple[str, str]]
"""(name of a shard, kind of fault) -> how many."""


@dataclass(unsafe_hash=True)  # not frozen: Lightning sets the fields of a copy where it converts a batch's precision
class Fault:
    """One thing that is wrong with the data.

    Attributes:
        index: the record's global index in its split, by which the manifest tells its shard; -1 for a whole shard.
        kind: one of the kinds of this module, for counting.
        message: what is wrong where, and what to do.
    """

    index: int
    kind: str
    message: str


def fault_table(counts: Mapping[tuple[str, str], int]) -> str:
    """The shards with most faults, as lines to read.

    >>> one, two = ("a.tar", "damaged image"), ("b.tar", "damaged image")
    >>> print(fault_table({one: 2, two: 1, ("b.tar", "duplicate key"): 9}))
    shard  fault          count
    b.tar  duplicate key      9
           damaged image      1
    a.tar  damaged image      2
    """
    ranked = _ranked(counts)
    rows = [("shard", "fault", "count")]
    for shard, kinds in ranked[:_SHOWN_SHARDS]:
        names = [shard] + [""] * (len(kinds) - 1)
        rows += [(name, kind, f"{count:,}") for name, (kind, count) in zip(names, kinds.most_common(), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}" for name, kind, count in rows]
    if rest := ranked[_SHOWN_SHARDS:]:
        faults = sum(kinds.total() for _, kinds in rest)
        lines.append(f"and {len(rest):,} more shard{_s(len(rest))} with {faults:,} fault{_s(faults)}")
    return "\n".join(lines)


def worst_shards(counts: Mapping[tuple[str, str], int]) -> str:
    """The shards with most faults, in one line.

    >>> one, two = ("a.tar", "damaged image"), ("b.tar", "damaged image")
    >>> worst_shards({one: 2, two: 1, ("b.tar", "duplicate key"): 9})
    'b.tar (9 duplicate key, 1 damaged image), a.tar (2 damaged image)'
    """
    ranked = _ranked(counts)
    named = [
        f"{shard} ({', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())})"
        for shard, kinds in ranked[:_SHOWN_SHARDS]
    ]
    rest = len(ranked) - _SHOWN_SHARDS
    return ", ".join(named) + (f" and {rest:,} more shard{_s(rest)}" if rest > 0 else "")


def _ranked(counts: Mapping[tuple[str, str], int]) -> list[tuple[str, Counter[str]]]:
    """Shards with their faults by kind, worst first; equally bad ones by name, so that all ranks say the same."""
    shards: dict[str, Counter[str]] = {}
    for (shard, kind), count in sorted(counts.items()):
        shards.setdefault(shard, Counter())[kind] += count
    return sorted(shards.items(), key=lambda item: (-item[1].total(), item[0]))


def _s(count: int) -> str:
    return "" if count == 1 else "s"
