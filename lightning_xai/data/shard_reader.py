"""Shards streamed from any position, as samples."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import accumulate

from lightning_xai.data.faults import DUPLICATE_KEY, MISSING_SHARD, UNPAIRED_MEMBER, UNREADABLE_SHARD
from lightning_xai.data.sample import IMAGE_MEMBERS, RecordError, Sample, decode_sample
from lightning_xai.data.shard_store import Place, ShardStore, open_store
from lightning_xai.data.shards import Manifest, ShardEntry
from lightning_xai.data.tar_records import TarRecord, TarRecords

RECORD_MEMBERS = frozenset((*IMAGE_MEMBERS, "json"))


def read_samples(
    place: Place, manifest: Manifest, order: Sequence[int], start: int, stop: int, passed_over: Collection[int] = ()
) -> Iterator[tuple[int, Sample | RecordError]]:
    """Stream the positions `start` to `stop` (exclusive) of the shards laid end to end in `order`.

    Only shards that hold a position to read are opened, and other records are passed over by the headers of their
    members alone. A record that cannot be used, or that a damaged shard no longer holds, comes as the `RecordError`
    that says why, so that exactly as many items come as were asked for, whatever the files hold.

    Args:
        place: where the shards lie, see `open_store`.
        manifest: their manifest.
        order: indices into `manifest.shards`.
        start: first position, from 0.
        stop: position after the last.
        passed_over: positions between that are not read.

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
    return _read_slice(open_store(place), manifest, tuple(order), range(start, stop), sorted(passed_over))


def _read_slice(
    store: ShardStore, manifest: Manifest, order: tuple[int, ...], positions: range, passed_over: list[int]
) -> Iterator[tuple[int, Sample | RecordError]]:
    first_index = list(accumulate((entry.samples for entry in manifest.shards), initial=0))
    begin = 0
    for shard in order:
        entry = manifest.shards[shard]
        wanted = range(max(positions.start - begin, 0), min(positions.stop - begin, entry.samples))
        passed = passed_over[bisect_left(passed_over, begin) : bisect_left(passed_over, begin + entry.samples)]
        own = frozenset(position - begin for position in passed if position - begin in wanted)
        if len(own) < len(wanted):
            for record, item in _read_shard(store, entry, wanted, own):
                yield first_index[shard] + record, item
        begin += entry.samples


def _read_shard(
    store: ShardStore, entry: ShardEntry, wanted: range, passed_over: Collection[int]
) -> Iterator[tuple[int, Sample | RecordError]]:
    """Number and content of the records of one shard that are wanted and not passed over; always all of them."""
    origin = store.locate(entry.name)
    records = TarRecords(
        partial(store.open, entry.name, entry.bytes), RECORD_MEMBERS, wanted.start, wanted.stop, passed_over
    )
    positions = (position for position in wanted if position not in passed_over)
    for _, item in decode_records(origin, records):
        yield next(positions), item
    reason = records.damage or f"the shard ends after {records.seen} records"
    for missing in positions:
        yield (
            missing,
            RecordError(
                f"{origin}: record {missing} (counted from 0) cannot be read ({reason}); copy the shard again or "
                "prepare it again",
                kind=MISSING_SHARD if records.missing else UNREADABLE_SHARD,
            ),
        )


def decode_records(origin: str, records: TarRecords) -> Iterator[tuple[str, Sample | RecordError]]:
    """Key and sample of each of a shard's records, or what is wrong with it; images are not decoded.

    Args:
        origin: the shard, for messages.
        records: its records; the last one is left out where only a part of it lies before damage.
    """
    for record in records:
        item = _decode(origin, record)
        if records.damage and isinstance(item, RecordError) and item.kind == UNPAIRED_MEMBER:
            return
        yield record.key, item


def _decode(origin: str, record: TarRecord) -> Sample | RecordError:
    if record.fault:
        message = f"{origin}, record {record.key}: {record.fault}; prepare the shard again"
        return RecordError(message, kind=DUPLICATE_KEY)
    try:
        return decode_sample(record.key, record.members, origin)
    except RecordError as error:
        return error
