"""Shards streamed from any position, as samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from lightning_xai.data.sample import IMAGE_MEMBERS, RecordError, Sample, decode_sample
from lightning_xai.data.shards import Manifest
from lightning_xai.data.tar_records import TarRecord, TarRecords

_MEMBERS = frozenset((*IMAGE_MEMBERS, "json"))


def read_samples(
    folder: Path, manifest: Manifest, order: Sequence[int], start: int, stop: int
) -> Iterator[tuple[int, Sample | RecordError]]:
    """Stream the positions `start` to `stop` (exclusive) of the shards laid end to end in `order`.

    Only shards that overlap the slice are opened, and records before it are passed over unread. A record that cannot be
    used, or that a damaged shard no longer holds, comes as the `RecordError` that says why, so that exactly
    `stop - start` items come whatever the files hold.

    Args:
        folder: where the shards lie.
        manifest: their manifest.
        order: indices into `manifest.shards`.
        start: first position, from 0.
        stop: position after the last.

    Returns:
        Pairs of the sample's global index in manifest order (independent of `order`) and the sample or its error.

    Raises:
        ValueError: `order` names a shard that does not exist, or the slice leaves the shards.
    """
    if any(not 0 <= shard < len(manifest.shards) for shard in order):
        raise ValueError(f"order has to hold shard indices from 0 to {len(manifest.shards) - 1}; got {list(order)}")
    total = sum(manifest.shards[shard].samples for shard in order)
    if not 0 <= start <= stop <= total:
        raise ValueError(f"expected 0 <= start <= stop <= {total}; got start {start} and stop {stop}")
    return _read_slice(folder, manifest, tuple(order), start, stop)


def _read_slice(
    folder: Path, manifest: Manifest, order: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, Sample | RecordError]]:
    first_index = list(accumulate((entry.samples for entry in manifest.shards), initial=0))
    begin = 0
    for shard in order:
        entry = manifest.shards[shard]
        lower, upper = max(start - begin, 0), min(stop - begin, entry.samples)
        if lower < upper:
            records = _read_shard(folder / entry.name, lower, upper)
            yield from enumerate(records, first_index[shard] + lower)
        begin += entry.samples


def _read_shard(path: Path, start: int, stop: int) -> Iterator[Sample | RecordError]:
    """The records `start` to `stop` of one shard; always `stop - start` items."""
    records = TarRecords(path, _MEMBERS, start, stop)
    position = start
    for record in records:
        yield _decode(path, record)
        position += 1
    reason = records.damage or f"the shard ends after {records.seen} records"
    for missing in range(position, stop):
        yield RecordError(
            f"{path}: record {missing} (counted from 0) cannot be read ({reason}); copy the shard again or prepare it "
            "again"
        )


def _decode(path: Path, record: TarRecord) -> Sample | RecordError:
    if record.fault:
        return RecordError(f"{path}, record {record.key}: {record.fault}; prepare the shard again")
    try:
        return decode_sample(record.key, record.members, str(path))
    except RecordError as error:
        return error
