"""Samples from shards, streamed from any position; and records of any tar files in webdataset's layout.

A record is the members with one name and several extensions. A tar file may come from anywhere. So webdataset, which
would run the URL `pipe:...` as a shell command, unpickle `.pyd` members and unpack compressed tars, never sees a URL or
a file here: it is handed members with known extensions only, as bytes, and groups them.

Records are skipped by the headers of their members. Plain ones, as `write_shards` and most tools write them, are parsed
here, several times faster than by `tarfile`; from the first other header on, `tarfile` reads the file.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tarfile
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext, group_by_keys

from lightning_xai.data.excluded import DUPLICATE_KEY, MISSING_SHARD, UNPAIRED_MEMBER, UNREADABLE_SHARD
from lightning_xai.data.sample import IMAGE_MEMBERS, RecordError, Sample, decode_sample
from lightning_xai.data.shard_store import Place, ShardStore, open_store
from lightning_xai.data.shards import Manifest, ShardEntry

__all__ = ["RECORD_MEMBERS", "TarRecord", "TarRecords", "decode_records", "read_samples"]

RECORD_MEMBERS = frozenset((*IMAGE_MEMBERS, "json"))

_BLOCK = 512
_CHUNK = 1 << 20
_OCTAL = re.compile(rb"([0-7]+)[ \0]*")
_NAME = re.compile(rb"([ -~]+)\0*")


def read_samples(
    place: Place, manifest: Manifest, order: Sequence[int], start: int, stop: int, skipped: Collection[int] = ()
) -> Iterator[tuple[int, Sample | RecordError]]:
    """Stream the positions `start` to `stop` (exclusive) of the shards laid end to end in `order`.

    Only shards that hold a position to read are opened, and other records are skipped by the headers of their
    members alone. A record that cannot be used, or that a corrupt shard no longer holds, comes as the `RecordError`
    that says why, so that exactly as many items come as were asked for, whatever the files hold.

    Args:
        place: where the shards lie, see `open_store`.
        manifest: their manifest.
        order: indices into `manifest.shards`.
        start: first position, from 0.
        stop: position after the last.
        skipped: positions between that are not read.

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
    return _read_slice(open_store(place), manifest, tuple(order), range(start, stop), sorted(skipped))


def _read_slice(
    store: ShardStore, manifest: Manifest, order: tuple[int, ...], positions: range, skipped: list[int]
) -> Iterator[tuple[int, Sample | RecordError]]:
    first_index = list(accumulate((entry.samples for entry in manifest.shards), initial=0))
    begin = 0
    for shard in order:
        entry = manifest.shards[shard]
        wanted = range(max(positions.start - begin, 0), min(positions.stop - begin, entry.samples))
        passed = skipped[bisect_left(skipped, begin) : bisect_left(skipped, begin + entry.samples)]
        own = frozenset(position - begin for position in passed if position - begin in wanted)
        if len(own) < len(wanted):
            for record, item in _read_shard(store, entry, wanted, own):
                yield first_index[shard] + record, item
        begin += entry.samples


def _read_shard(
    store: ShardStore, entry: ShardEntry, wanted: range, skipped: Collection[int]
) -> Iterator[tuple[int, Sample | RecordError]]:
    """Number and content of the records of one shard that are wanted and not skipped; always all of them."""
    origin = store.locate(entry.name)
    records = TarRecords(
        partial(store.open, entry.name, entry.bytes), RECORD_MEMBERS, wanted.start, wanted.stop, skipped
    )
    positions = (position for position in wanted if position not in skipped)
    for _, item in decode_records(origin, records):
        yield next(positions), item
    reason = records.error or f"the shard ends after {records.seen} records"
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
        records: its records; the last one is not among them where the file is corrupt within it.
    """
    for record in records:
        item = _decode(origin, record)
        if records.error and isinstance(item, RecordError) and item.kind == UNPAIRED_MEMBER:
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


# Tar files


@dataclass(frozen=True)
class TarRecord:
    """One record.

    Attributes:
        key: the members' common name without extension.
        members: extension in lower case -> bytes.
        fault: what the names alone show to be wrong with it; empty where that is nothing.
    """

    key: str
    members: Mapping[str, bytes]
    fault: str


class TarRecords:
    """The records of one tar file, streamed; iterate once.

    Records are counted from 0 by the names of their members, also those that are skipped. Of these only the headers
    are read, where the stream can seek.

    Args:
        opened: opens the file, as a stream of bytes; an error of it counts as corruption.
        extensions: lower-case extensions of the members to read; all others are ignored.
        start: first record to read.
        stop: record after the last to read; None: to the end.
        skipped: records from `start` to `stop` that are not read, either.

    Attributes:
        error: once it was iterated: why nothing more can be read; empty where the file ended as it should.
        missing: whether that is because there is no such file.
    """

    def __init__(
        self,
        opened: Callable[[], BinaryIO],
        extensions: Collection[str],
        start: int = 0,
        stop: int | None = None,
        skipped: Collection[int] = frozenset(),
    ) -> None:
        self.error = ""
        self.missing = False
        self._opened = opened
        self._extensions = frozenset(extensions)
        self._wanted = range(start, sys.maxsize if stop is None else stop)
        self._skipped = skipped
        self._selector = _Selector(self._extensions, self._wanted, skipped)

    @property
    def seen(self) -> int:
        """Number of records so far, those that were skipped included."""
        return self._selector.records

    def __iter__(self) -> Iterator[TarRecord]:
        positions = (position for position in self._wanted if position not in self._skipped)
        # In this order: no group is asked for after the last position.
        for position, group in zip(positions, self._groups(), strict=False):
            members = {name: data for name, data in group.items() if name in self._extensions}
            yield TarRecord(group["__key__"], members, self._selector.faults.get(position, ""))

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        """Selected members by record, through webdataset; ends early, with the reason, where the file is corrupt."""
        yield from group_by_keys(self._marked_members())

    def _marked_members(self) -> Iterator[dict[str, Any]]:
        """The selected members in webdataset's form, with its mark, `{}`, at the end of each record."""
        record = 0
        for name, data in self._members():
            if self._selector.records > record:
                record = self._selector.records
                yield {}
            if data is not None:
                yield {"fname": name, "data": data, "__url__": ""}

    def _members(self) -> Iterator[tuple[str, bytes | None]]:
        try:
            with self._opened() as stream:
                yield from _members(stream, self._selector)
        except Exception as error:  # corrupt headers make tarfile raise errors of any type
            self.error = str(error) or type(error).__name__
            self.missing = isinstance(error, FileNotFoundError)


class _Selector:
    """Chooses by member name what is read: known extensions of the wanted records.

    It also notes what the names alone show to be wrong, by record: a member that comes twice (webdataset would give up
    on the file), and a key that comes back after another one.
    """

    def __init__(self, extensions: Collection[str], wanted: range, skipped: Collection[int]) -> None:
        self.faults: dict[int, str] = {}
        self.records = 0
        self._known = extensions
        self._wanted = wanted
        self._skipped = skipped
        self._key: str | None = None
        self._extensions: set[str] = set()
        self._keys: set[str] = set()

    def __call__(self, member: str) -> bool:
        key, extension = base_plus_ext(member)
        if key is None or extension.lower() not in self._known:
            return False
        if key != self._key:
            self._begin(key)
        position = self.records - 1
        if extension.lower() in self._extensions:
            self.faults[position] = f"its .{extension.lower()} member comes twice"
            return False
        self._extensions.add(extension.lower())
        return position in self._wanted and position not in self._skipped

    def _begin(self, key: str) -> None:
        self.records += 1
        self._key, self._extensions = key, set()
        if key in self._keys:
            self.faults[self.records - 1] = "its key comes twice in the shard, with others between"
        self._keys.add(key)


def _members(stream: BinaryIO, selected: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of the regular members; None in place of the bytes where they are not selected."""
    plain = _PlainMembers(stream)
    first = True
    while (header := plain.next_header()) is not None:
        first = False
        name, size = header
        if selected(name):
            yield name, plain.read(size)
        else:
            plain.skip(size)
            yield name, None
    if first:
        if len(plain.unread) == _BLOCK and not any(plain.unread):
            return  # a tar file without members
        if plain.unread[257:262] != b"ustar":
            raise tarfile.ReadError("it is not an uncompressed tar file")
        rest = _Chained(plain.unread, stream)
    else:
        # What is wrong at the very beginning of a file is an error for tarfile, and its end anywhere else.
        rest = _Chained(tarfile.TarInfo(".").tobuf() + plain.unread, stream)
    with tarfile.open(fileobj=rest, mode="r|") as tar:
        for entry in tar:
            # Few bytes of a sparse member can stand for any number of zeros.
            if entry.isreg() and not entry.issparse():
                file = tar.extractfile(entry) if selected(entry.name) else None
                yield entry.name, None if file is None else file.read()
            tar.members.clear()  # type: ignore[attr-defined] # it would remember them all


class _PlainMembers:
    """Regular members whose headers hold nothing unusual, one after the other, up to the first other header.

    Attributes:
        unread: where that one was met: what was taken off the stream since the last plain member.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.unread = b""
        self._stream = stream
        self._left: int | None = None  # bytes of the file after the stream's position, where it can seek
        self._padding = 0
        if stream.seekable():
            self._left = stream.seek(0, os.SEEK_END)
            stream.seek(0)

    def next_header(self) -> tuple[str, int] | None:
        """Name and size of the next member; None where its header is not plain, or the file ends."""
        self.skip(0)
        block = self.unread = self._take(_BLOCK)
        name = ""
        if (header := _parse(block, b"L")) and 0 < header[1] <= _BLOCK:
            # GNU tar's long name: a separate member, before the one that it names.
            text, block = self._take(_BLOCK), self._take(_BLOCK)
            self.unread += text + block
            if len(text) == _BLOCK and text.isascii():
                name = text.partition(b"\0")[0].decode()
        plain = _parse(block, b"0")
        if plain is None or (len(self.unread) > _BLOCK and not name):
            return None
        return name or plain[0], plain[1]

    def read(self, size: int) -> bytes:
        """The bytes of the member, which has to be read or skipped before the next header."""
        chunks = []
        left = size
        while left:  # in pieces: what a header promises need not be there
            chunks.append(self._take(min(left, _CHUNK)))
            if not chunks[-1]:
                raise _end_of_data()
            left -= len(chunks[-1])
        self._padding = -size % _BLOCK
        return b"".join(chunks)

    def skip(self, size: int) -> None:
        """Go on after the member, without reading it where the stream can seek."""
        size = self._padding + size + (-size % _BLOCK if size else 0)
        self._padding = 0
        if size and self._left is not None:
            if size > self._left:
                raise _end_of_data()
            self._left -= size
            self._stream.seek(size, os.SEEK_CUR)
            return
        while size:
            passed = len(self._take(min(size, _CHUNK)))
            if not passed:
                raise _end_of_data()
            size -= passed

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        if self._left is not None:
            self._left -= len(data)
        return data


def _parse(block: bytes, kind: bytes) -> tuple[str, int] | None:
    """Name and size of a plain header of that type; None for any other block.

    Plain: a GNU or ustar header with the right checksum, an ASCII name and no prefix to it, an octal size.
    """
    if len(block) != _BLOCK or block[156:157] != kind or block[257:262] != b"ustar" or block[345]:
        return None
    name, size, checksum = _NAME.fullmatch(block, 0, 100), _OCTAL.fullmatch(block, 124, 136), _checksum(block)
    if name is None or size is None or checksum is None or checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        return None
    return name[1].decode(), int(size[1], 8)


def _checksum(block: bytes) -> int | None:
    stated = _OCTAL.fullmatch(block, 148, 156)
    return None if stated is None else int(stated[1], 8)


def _end_of_data() -> tarfile.ReadError:
    return tarfile.ReadError("unexpected end of data")  # as tarfile says it


class _Chained(io.RawIOBase):
    """Bytes, then a stream."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        head, self._head = self._head[:size], self._head[size:]
        return head or self._stream.read(size)
