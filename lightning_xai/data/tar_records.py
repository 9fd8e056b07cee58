"""Records of tar files: members with one name and several extensions, as webdataset lays them out.

A tar file may come from anywhere. So webdataset, which would run the URL `pipe:...` as a shell command, unpickle `.pyd`
members and unpack compressed tars, never sees a URL or a file here: it is handed members with known extensions only, as
bytes, and groups them.

Records are passed over by the headers of their members. Plain ones, as `write_shards` and most tools write them, are
parsed here, several times faster than by `tarfile`; from the first other header on, `tarfile` reads the file.
"""

from __future__ import annotations

import io
import os
import re
import sys
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext, group_by_keys

_BLOCK = 512
_CHUNK = 1 << 20
_OCTAL = re.compile(rb"([0-7]+)[ \0]*")
_NAME = re.compile(rb"([ -~]+)\0*")


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

    Records are counted from 0 by the names of their members, also those that are passed over. Of these only the headers
    are read, where the stream can seek.

    Args:
        opened: opens the file, as a stream of bytes; an error of it is the damage.
        extensions: lower-case extensions of the members to read; all others are ignored.
        start: first record to read.
        stop: record after the last to read; None: to the end.
        passed_over: records from `start` to `stop` that are not read, either.

    Attributes:
        damage: once it was iterated: why nothing more can be read; empty where the file ended as it should.
        missing: whether that is because there is no such file.
    """

    def __init__(
        self,
        opened: Callable[[], BinaryIO],
        extensions: Collection[str],
        start: int = 0,
        stop: int | None = None,
        passed_over: Collection[int] = frozenset(),
    ) -> None:
        self.damage = ""
        self.missing = False
        self._opened = opened
        self._extensions = frozenset(extensions)
        self._wanted = range(start, sys.maxsize if stop is None else stop)
        self._passed_over = passed_over
        self._selector = _Selector(self._extensions, self._wanted, passed_over)

    @property
    def seen(self) -> int:
        """Number of records so far, those that were passed over included."""
        return self._selector.records

    def __iter__(self) -> Iterator[TarRecord]:
        positions = (position for position in self._wanted if position not in self._passed_over)
        # In this order: no group is asked for behind the last position.
        for position, group in zip(positions, self._groups(), strict=False):
            members = {name: data for name, data in group.items() if name in self._extensions}
            yield TarRecord(group["__key__"], members, self._selector.faults.get(position, ""))

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        """Selected members by record, through webdataset; ends early, with the reason, where the file is damaged."""
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
        except Exception as error:  # damaged headers make tarfile raise what they like
            self.damage = str(error) or type(error).__name__
            self.missing = isinstance(error, FileNotFoundError)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read.

    Raises:
        FileNotFoundError: there is none; opening a pipe or a device could block for ever.
    """
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    return path.open("rb")


class _Selector:
    """Chooses by member name what is read: known extensions of the wanted records.

    It also notes what the names alone show to be wrong, by record: a member that comes twice (webdataset would give up
    on the file), and a key that comes back after another one.
    """

    def __init__(self, extensions: Collection[str], wanted: range, passed_over: Collection[int]) -> None:
        self.faults: dict[int, str] = {}
        self.records = 0
        self._known = extensions
        self._wanted = wanted
        self._passed_over = passed_over
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
        return position in self._wanted and position not in self._passed_over

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
            plain.pass_over(size)
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
        self._left: int | None = None  # bytes of the file behind the stream's position, where it can seek
        self._padding = 0
        if stream.seekable():
            self._left = stream.seek(0, os.SEEK_END)
            stream.seek(0)

    def next_header(self) -> tuple[str, int] | None:
        """Name and size of the next member; None where its header is not plain, or the file ends."""
        self.pass_over(0)
        block = self.unread = self._take(_BLOCK)
        name = ""
        if (header := _parse(block, b"L")) and 0 < header[1] <= _BLOCK:
            # GNU tar's long name: a member of its own, before that which it names.
            text, block = self._take(_BLOCK), self._take(_BLOCK)
            self.unread += text + block
            if len(text) == _BLOCK and text.isascii():
                name = text.partition(b"\0")[0].decode()
        plain = _parse(block, b"0")
        if plain is None or (len(self.unread) > _BLOCK and not name):
            return None
        return name or plain[0], plain[1]

    def read(self, size: int) -> bytes:
        """The bytes of the member, which has to be read or passed over before the next header."""
        chunks = []
        left = size
        while left:  # in pieces: what a header promises need not be there
            chunks.append(self._take(min(left, _CHUNK)))
            if not chunks[-1]:
                raise _end_of_data()
            left -= len(chunks[-1])
        self._padding = -size % _BLOCK
        return b"".join(chunks)

    def pass_over(self, size: int) -> None:
        """Go on behind the member, without reading it where the stream can seek."""
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
