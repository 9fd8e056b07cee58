"""Checks of whether a set of shards holds what its manifest says."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lightning_xai.data.excluded import (
    DUPLICATE_KEY,
    MISSING_SHARD,
    UNKNOWN_MEMBER,
    UNREADABLE_SHARD,
    WRONG_CHECKSUM,
    WRONG_COUNT,
    ExcludedByShard,
    Fault,
)
from lightning_xai.data.sample import RecordError, Sample, decode_image, mask_faults
from lightning_xai.data.shard_reader import RECORD_MEMBERS, TarRecords, decode_records
from lightning_xai.data.shard_store import ShardStore
from lightning_xai.data.shards import MANIFEST_NAME, Manifest, ShardEntry, find_file_fault, hash_rest

__all__ = ["ShardReport", "Verification", "find_wrong_checksums", "read_reports"]

_BLOCK = 1 << 20
_KEPT_MESSAGES = 10
_KEY_BYTES = 16


@dataclass
class ShardReport:
    """The content of one shard, and what is wrong with it.

    Attributes:
        entry: the shard, as the manifest lists it.
        faults: what is wrong, and how often; lost records are one fault.
        captions: of its usable samples.
        labels: of its usable samples' regions.
        short_sides: pixels of the shorter side of its usable photos -> how many.
        keys: hashes of the keys of all its records, in order, [N] bytes.
    """

    entry: ShardEntry
    faults: list[tuple[Fault, int]] = field(default_factory=list)
    captions: int = 0
    labels: set[str] = field(default_factory=set)
    short_sides: Counter[int] = field(default_factory=Counter)
    keys: NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, dtype=f"S{_KEY_BYTES}"))


class Verification:
    """Sums up the reports of all shards of a set, and adds what is wrong between shards.

    Args:
        manifest: of the set.

    Attributes:
        counts: faults by shard and kind.
        findings: what was found, in as many messages.
        messages: of the first findings.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.counts: ExcludedByShard = Counter()
        self.findings = 0
        self.messages: list[str] = []
        self._manifest = manifest
        self._captions = 0
        self._labels: set[str] = set()
        self._short_sides: Counter[int] = Counter()
        self._keys: list[NDArray[np.bytes_]] = []

    def add(self, report: ShardReport) -> None:
        """Take up the next shard's report; in the order of the manifest."""
        for fault, count in report.faults:
            self._note(report.entry.name, fault.kind, fault.message, count)
        self._captions += report.captions
        self._labels |= report.labels
        self._short_sides += report.short_sides
        self._keys.append(report.keys)

    def compare(self) -> None:
        """After the last report of a full read: look for keys in several shards, and check the manifest's counts."""
        names = [entry.name for entry in self._manifest.shards]
        for shard, record, other, first in _repeated_keys(self._keys):
            message = f"{names[shard]}: record {record} has the key of record {first} of {names[other]} (from 0)"
            self._note(names[shard], DUPLICATE_KEY, message)
        if self.counts:
            return  # what could not be read is missing in the sums
        for name, stated, found in (
            ("captions", self._manifest.captions, self._captions),
            ("labels", self._manifest.labels, tuple(sorted(self._labels))),
            *self._photo_counts(),
        ):
            if stated != found:
                message = f"{MANIFEST_NAME} says {name}: {stated}, the shards hold {found}"
                self._note(MANIFEST_NAME, WRONG_COUNT, message)

    def _photo_counts(self) -> Iterator[tuple[str, int, int]]:
        photos, sides = self._manifest.photos, self._short_sides
        if photos is not None:
            smaller, larger = (
                sum(count for side, count in sides.items() if sign * side > sign * photos.short_side)
                for sign in (-1, 1)
            )
            yield f"photos with a short side below {photos.short_side} pixels", photos.smaller, smaller
            yield f"photos with a short side above {photos.short_side} pixels", 0, larger

    def _note(self, shard: str, kind: str, message: str, count: int = 1) -> None:
        self.counts[shard, kind] += count
        self.findings += 1
        if len(self.messages) < _KEPT_MESSAGES:
            self.messages.append(message)


def read_reports(
    store: ShardStore, manifest: Manifest, *, quick: bool = False, workers: int = 0
) -> Iterator[ShardReport]:
    """Check each shard by itself; reads everything once.

    Args:
        store: where the shards lie.
        manifest: what they should hold.
        quick: sizes and checksums only; records are not decoded.
        workers: processes that read; 0: this one. They start at once.

    Returns:
        One report per shard, in the manifest's order.
    """
    workers = min(workers, len(manifest.shards))
    return iter(DataLoader(_Reports(store, manifest, quick), batch_size=None, num_workers=workers))


def find_wrong_checksums(store: ShardStore, shards: Iterable[ShardEntry]) -> list[Fault]:
    """The shards that cannot be read, or whose content has another SHA-256 than the manifest states."""
    return [fault for entry in shards if (fault := _find_wrong_checksum(store, entry)) is not None]


@dataclass
class _Reports(Dataset[ShardReport]):
    store: ShardStore
    manifest: Manifest
    quick: bool

    def __len__(self) -> int:
        return len(self.manifest.shards)

    def __getitem__(self, shard: int) -> ShardReport:
        report = ShardReport(self.manifest.shards[shard])
        fault = find_file_fault(self.store, report.entry)
        same_size = fault is None
        if same_size and self.quick:
            fault = _find_wrong_checksum(self.store, report.entry)
        if fault is not None:
            report.faults.append((fault, 1))
        if not self.quick and (fault is None or fault.kind != MISSING_SHARD):
            _read_records(self.store, report, same_size)
        return report


def _read_records(store: ShardStore, report: ShardReport, same_size: bool) -> None:
    """Decode all records of a shard, and hash its bytes on the way."""
    entry = report.entry
    stream = _HashedStream(partial(store.open, entry.name, entry.bytes))
    records = TarRecords(lambda: io.BufferedReader(stream, _BLOCK), RECORD_MEMBERS)
    keys = []
    for key, item in decode_records(entry.name, records):
        keys.append(hashlib.blake2b(key.encode(), digest_size=_KEY_BYTES).digest())
        _look_at(item, report)
    report.keys = np.array(keys, dtype=f"S{_KEY_BYTES}")
    lost = max(entry.samples - len(keys), 0)
    if lost:  # else the checksum shows what follows the last record
        reason = records.error or f"it ends after {len(keys)} records{records.unknown_text}"
        message = f"{entry.name}: {lost:,} of {entry.samples:,} records are lost ({reason})"
        report.faults.append((Fault(-1, UNREADABLE_SHARD, message), lost))
    elif len(keys) > entry.samples:
        message = f"{entry.name} holds {len(keys):,} records, the manifest says {entry.samples:,}"
        report.faults.append((Fault(-1, WRONG_COUNT, message), len(keys) - entry.samples))
    if (more := records.unknown - lost) > 0:
        message = f"{entry.name} holds more than records{records.unknown_text}"
        report.faults.append((Fault(-1, UNKNOWN_MEMBER, message), more))
    if same_size and stream.ended and (fault := _compare(stream.sha256.hexdigest(), entry)) is not None:
        report.faults.append((fault, 1))


def _look_at(item: Sample | RecordError, report: ShardReport) -> None:
    try:
        if isinstance(item, RecordError):
            raise item
        decode_image(item)
        for fault in mask_faults(item):
            raise RecordError(f"record {item.key!r} ({item.source}): {fault}; prepare the shard again")
    except RecordError as error:
        message = str(error)
        message = message if report.entry.name in message else f"{report.entry.name}, {message}"
        report.faults.append((Fault(-1, error.kind, message), 1))
    else:
        report.captions += len(item.captions)
        report.labels.update(region.label for region in item.regions)
        report.short_sides[min(item.size)] += 1


def _find_wrong_checksum(store: ShardStore, entry: ShardEntry) -> Fault | None:
    try:
        with store.open(entry.name, entry.bytes) as stream:
            return _compare(hash_rest(stream), entry)
    except OSError as error:
        return Fault(-1, UNREADABLE_SHARD, f"{entry.name} cannot be read ({error})")


def _compare(found: str, entry: ShardEntry) -> Fault | None:
    if found == entry.sha256:
        return None
    return Fault(-1, WRONG_CHECKSUM, f"{entry.name} has the SHA-256 {found[:16]}..., not {entry.sha256[:16]}...")


class _HashedStream(io.RawIOBase):
    """The bytes of a file, which are hashed on the way; closing it reads what is left.

    Attributes:
        sha256: of the bytes so far.
        ended: whether these are all.
    """

    def __init__(self, opened: Callable[[], BinaryIO]) -> None:
        self.sha256 = hashlib.sha256()
        self.ended = False
        self._opened = opened
        self._source: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._source is None:
            self._source = self._opened()
        data = self._source.read(len(buffer))
        self.sha256.update(data)
        self.ended = not data
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self.closed:
            return
        try:
            while not self.ended:
                self.read(_BLOCK)
        finally:
            super().close()
            if self._source is not None:
                self._source.close()


def _repeated_keys(keys: list[NDArray[np.bytes_]]) -> Iterator[tuple[int, int, int, int]]:
    """Shard and record of each key that another shard before had, and that shard and record."""
    begins = np.cumsum([0, *(len(part) for part in keys)])
    _, first, rank = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
    first = first[rank]
    for place in np.flatnonzero(first != np.arange(len(first))):
        shard, other = np.searchsorted(begins, [place, first[place]], side="right") - 1
        if shard != other:  # otherwise it was found in the shard itself
            yield int(shard), int(place - begins[shard]), int(other), int(first[place] - begins[other])
