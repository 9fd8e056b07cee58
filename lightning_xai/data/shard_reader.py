"""Samples from shards, streamed from any position; and records of any tar files in webdataset's layout.

A record is the members with one name and several extensions. A tar file may come from anywhere. So webdataset, which
would run the URL `pipe:...` as a shell command, unpickle `.pyd` members and unpack compressed tars, never sees a URL or
a file here: `tarfile` reads uncompressed files, and of these only members with known extensions.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from tarfile import (  # type: ignore[attr-defined] # not in the types of the standard library
    EmptyHeaderError,
    InvalidHeaderError,
    ReadError,
    TruncatedHeaderError,
)
from typing import IO, Any, BinaryIO, Literal

from typing_extensions import Self
from webdataset.tariterators import base_plus_ext

from lightning_xai.data.excluded import DUPLICATE_KEY, MISSING_SHARD, UNPAIRED_MEMBER, UNREADABLE_SHARD
from lightning_xai.data.sample import IMAGE_MEMBERS, RecordError, Sample, decode_sample
from lightning_xai.data.shard_store import Place, ShardStore, open_store
from lightning_xai.data.shards import Manifest, ShardEntry

__all__ = ["RECORD_MEMBERS", "TarRecord", "TarRecords", "decode_records", "read_samples"]

RECORD_MEMBERS = frozenset((*IMAGE_MEMBERS, "json"))

_CHUNK = 1 << 20


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
    return _read_slice(open_store(place), manifest, tuple(order), range(start, stop), frozenset(skipped))


def _read_slice(
    store: ShardStore, manifest: Manifest, order: tuple[int, ...], positions: range, skipped: frozenset[int]
) -> Iterator[tuple[int, Sample | RecordError]]:
    first_index = list(accumulate((entry.samples for entry in manifest.shards), initial=0))
    begin = 0
    for shard in order:
        entry = manifest.shards[shard]
        end = begin + entry.samples
        part = range(max(positions.start, begin), min(positions.stop, end))
        wanted = [position - begin for position in part if position not in skipped]
        if wanted:
            for record, item in _read_shard(store, entry, wanted):
                yield first_index[shard] + record, item
        begin = end


def _read_shard(
    store: ShardStore, entry: ShardEntry, wanted: Sequence[int]
) -> Iterator[tuple[int, Sample | RecordError]]:
    """Number and content of the records of one shard that are wanted; always all of them."""
    origin = store.locate(entry.name)
    records = TarRecords(partial(store.open, entry.name, entry.bytes), RECORD_MEMBERS, frozenset(wanted))
    read = 0
    # In this order: nothing is read after the last record that is wanted.
    for position, (_, item) in zip(wanted, decode_records(origin, records), strict=False):
        read += 1
        yield position, item
    reason = records.error or f"the shard ends after {records.seen} records{records.unknown_text}"
    for missing in wanted[read:]:
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
        item: Sample | RecordError
        try:
            if record.fault:
                message = f"{origin}, record {record.key}: {record.fault}; prepare the shard again"
                raise RecordError(message, kind=DUPLICATE_KEY)
            item = decode_sample(record.key, record.members, origin)
        except RecordError as error:
            if records.error and error.kind == UNPAIRED_MEMBER:
                return
            item = error
        yield record.key, item


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
        wanted: numbers of the records to read; None: all.

    Attributes:
        error: once it was iterated: why nothing more can be read; empty where the file ended as it should.
        missing: whether that is because there is no such file.
        seen: number of records so far, those that were skipped included.
    """

    def __init__(
        self, opened: Callable[[], BinaryIO], extensions: Collection[str], wanted: Container[int] | None = None
    ) -> None:
        self.error = ""
        self.missing = False
        self.seen = 0
        self._opened = opened
        self._extensions = frozenset(extensions)
        self._wanted = wanted
        self._keys: set[str] = set()
        self._others: dict[str, list[str]] = {}  # key -> names of members that are not known
        self._offset = 0

    def __iter__(self) -> Iterator[TarRecord]:
        keys = self._keys
        for key, members in groupby(self._members(), key=lambda member: member[0]):
            position = self.seen
            self.seen += 1
            fault = "its key comes twice in the shard, with others between" if key in keys else ""
            keys.add(key)
            if self._wanted is not None and position not in self._wanted:
                continue
            found: dict[str, bytes] = {}
            with self._noting_damage():
                for _, extension, file in members:
                    if extension in found:
                        fault = f"its .{extension} member comes twice"
                    else:
                        # In pieces: what a header promises need not be there.
                        found[extension] = b"".join(iter(partial(file.read, _CHUNK), b""))
            if found:
                yield TarRecord(key, found, fault)
            if self.error:
                return

    @property
    def unknown(self) -> int:
        """Number of records so far that were not read, as none of their members has a known extension.

        A name ends at its first dot, as webdataset has it: `a.b.jpg` is `a` with the extension `b.jpg`. Hidden files
        (`._a.jpg`) and names without extension are one each. Further members of a record that is read, such as
        `a.mask.png`, are none.
        """
        return sum(self._count_unknown(key, names) for key, names in self._others.items())

    def _count_unknown(self, key: str, names: Sequence[str]) -> int:
        if key not in self._keys:
            # The names of a record differ in their last extension: `a.1.jpg`, `a.1.txt`, `a.2.jpg` are two.
            return max(Counter(name.rpartition(".")[2] for name in names).values())
        # `a.1.jpg` and `a.1.txt` next to `a.jpg` are another one.
        known = (name.rpartition(".") for name in names)
        stems = Counter(stem for stem, _, last in known if last.lower() in self._extensions)
        return sum(count > 1 for count in stems.values())

    @property
    def unknown_text(self) -> str:
        """The number of these and a name, to follow another text; empty where there is none."""
        first = next((names[0] for key, names in self._others.items() if self._count_unknown(key, names)), "")
        advice = "a name ends at its first dot, and an extension that is known has to follow"
        return first and f"; not read: {self.unknown:,}, {first!r} the first ({advice})"

    def keys_behind(self) -> set[str]:
        """After an error: the keys of the records that lie after the damage, as far as their headers can be read.

        Only for streams that can seek.
        """
        keys = set()
        with suppress(OSError), self._opened() as stream:
            for name in _names_from(stream, self._offset):
                key, extension = base_plus_ext(name)
                if key is not None and extension.lower() in self._extensions:
                    keys.add(key)
        return keys

    def _members(self) -> Iterator[tuple[str, str, IO[bytes]]]:
        """Key, lower-case extension and content of the members that are known."""
        with self._noting_damage(), self._opened() as stream, _open_tar(stream) as tar:
            for entry in tar:
                self._offset = tar.offset
                if tar.offset < entry.offset_data:  # else a negative size could send it back for ever
                    raise ReadError("a member has a negative size")
                key, extension = base_plus_ext(entry.name)
                # Few bytes of a sparse member can stand for any number of zeros.
                if key is not None and extension.lower() in self._extensions and entry.isreg() and not entry.issparse():
                    file = tar.extractfile(entry)
                    assert file is not None
                    yield key, extension.lower(), file
                elif not entry.isdir():
                    self._others.setdefault(key or entry.name, []).append(entry.name)
                tar.members.clear()  # type: ignore[attr-defined] # it would remember them all
            if any(chunk.strip(b"\0") for chunk in iter(partial(stream.read, _CHUNK), b"")):
                raise ReadError("it goes on after the mark that closes a tar file")

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        """End the block where the file cannot be read any further, and keep the reason."""
        try:
            yield
        except Exception as error:  # corrupt headers make tarfile raise errors of any type
            self.error = str(error) or type(error).__name__
            self.missing = isinstance(error, FileNotFoundError)


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error: `tarfile` itself takes it for the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except (EmptyHeaderError, TruncatedHeaderError) as error:
            if tarfile.offset == 0:
                raise
            raise ReadError("it is cut off: it ends without the mark that closes a tar file") from error
        except InvalidHeaderError as error:
            if tarfile.offset == 0:
                raise
            raise ReadError("a header is damaged") from error


def _names_from(stream: BinaryIO, offset: int) -> Iterator[str]:
    """The names of all members whose headers can be found from a place of a damaged tar file on."""
    while len(block := _block(stream, offset)) == tarfile.BLOCKSIZE:
        offset += tarfile.BLOCKSIZE
        with suppress(Exception):  # corrupt headers make tarfile raise errors of any type
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            stream.seek(offset - tarfile.BLOCKSIZE)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for entry in tar:
                    if tar.offset < entry.offset_data:
                        break
                    offset = tar.offset
                    yield entry.name
                    tar.members.clear()  # type: ignore[attr-defined]


def _block(stream: BinaryIO, offset: int) -> bytes:
    stream.seek(offset)
    return stream.read(tarfile.BLOCKSIZE)


def _open_tar(stream: BinaryIO) -> tarfile.TarFile:
    try:
        # Never "r", which would unpack compressed files. Block by block: what came before a stream broke off is kept.
        mode: Literal["r:", "r|"] = "r:" if stream.seekable() else "r|"
        return tarfile.open(fileobj=stream, mode=mode, bufsize=tarfile.BLOCKSIZE, tarinfo=_Member)
    except ReadError as error:
        raise ReadError(f"it is not an uncompressed tar file ({error})") from error
