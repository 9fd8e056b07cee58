"""Records of tar files: members with one name and several extensions, as webdataset lays them out.

A tar file may come from anywhere. So webdataset, which would run the URL `pipe:...` as a shell command, unpickle `.pyd`
members and unpack compressed tars, never sees a URL or a file here: it is handed members with known extensions only, as
bytes, and groups them.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext, group_by_keys

_BLOCK = 512


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

    Records are counted from 0 by the names of their members, also those that are passed over unread.

    Args:
        path: the file.
        extensions: lower-case extensions of the members to read; all others are ignored.
        start: first record to read.
        stop: record after the last to read; None: to the end.

    Attributes:
        damage: once it was iterated: why nothing more can be read; empty where the file ended as it should.
    """

    def __init__(self, path: Path, extensions: Collection[str], start: int = 0, stop: int | None = None) -> None:
        self.damage = ""
        self._path = path
        self._extensions = frozenset(extensions)
        self._start = start
        self._stop = sys.maxsize if stop is None else stop
        self._selector = _Selector(self._extensions, start, self._stop)

    @property
    def seen(self) -> int:
        """Number of records so far, those that were passed over included."""
        return self._selector.records

    def __iter__(self) -> Iterator[TarRecord]:
        groups = islice(self._groups(), self._stop - self._start)
        for position, group in enumerate(groups, self._start):
            members = {name: data for name, data in group.items() if name in self._extensions}
            yield TarRecord(group["__key__"], members, self._selector.faults.get(position, ""))

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        """Selected members by record, through webdataset; ends early, with the reason, where the file is damaged."""
        if not self._path.is_file():  # opening a pipe or a device could block for ever
            self.damage = "there is no such file"
            return
        with self._path.open("rb") as stream:
            header = stream.read(_BLOCK)
            if len(header) == _BLOCK and not any(header):
                return  # a tar file without members
            if header[257:262] != b"ustar":
                self.damage = "it is not an uncompressed tar file"
                return
            stream.seek(0)
            yield from group_by_keys(self._members(stream))

    def _members(self, stream: BinaryIO) -> Iterator[dict[str, Any]]:
        """The selected members in the form that webdataset groups."""
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for entry in tar:
                    # Few bytes of a sparse member can stand for any number of zeros.
                    if entry.isreg() and not entry.issparse() and self._selector(entry.name):
                        file = tar.extractfile(entry)
                        assert file is not None  # it is a regular one
                        yield {"fname": entry.name, "data": file.read(), "__url__": self._path.name}
                    tar.members.clear()  # type: ignore[attr-defined] # it would remember them all
        except Exception as error:  # damaged headers make tarfile raise what they like
            self.damage = str(error) or type(error).__name__


class _Selector:
    """Chooses by member name what is read: known extensions of the wanted records.

    It also notes what the names alone show to be wrong, by record: a member that comes twice (webdataset would give up
    on the file), and a key that comes back after another one.
    """

    def __init__(self, extensions: Collection[str], start: int, stop: int) -> None:
        self.faults: dict[int, str] = {}
        self.records = 0
        self._known = extensions
        self._wanted = range(start, stop + 1)  # one record more: it tells webdataset that the last wanted one is whole
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
        return position in self._wanted

    def _begin(self, key: str) -> None:
        self.records += 1
        self._key, self._extensions = key, set()
        if key in self._keys:
            self.faults[self.records - 1] = "its key comes twice in the shard, with others between"
        self._keys.add(key)
