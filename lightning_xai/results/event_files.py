"""Numbers in TensorBoard's event files, read while these are written.

A file is a sequence of records: the length of an event (8 bytes), a checksum of it (4), the event, its checksum (4).
TensorBoard's own readers compute checksums in Python, those of pictures included, which takes seconds for a long run.
Here records of other numbers are not parsed, those of pictures not even read, and none twice.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

__all__ = ["EVENT_FILES", "EventFile"]

EVENT_FILES = "events.out.tfevents.*"
"""Names of event files; in the order of their names, the files of later starts come later."""
_HEAD, _CHECKSUM = struct.Struct("<QI"), 4
_LARGEST = 4096  # bytes of an event of one number, which has fewer than a hundred and its name


class EventFile:
    """The numbers of some names in an event file that may still grow.

    Args:
        path: the file.
        names: of the numbers, as they are logged.
    """

    def __init__(self, path: Path, names: Collection[str]) -> None:
        self._path = path
        self._names = {name: name.encode() for name in names}
        self._numbers: dict[str, dict[int, float]] = {}
        self._end = 0  # of the records that have been read, in bytes

    def numbers(self) -> Mapping[str, Mapping[int, float]]:
        """Name -> step -> the finite number that was logged last for it; names without a number are not there.

        Reads what was added since the last time. A record that is not whole yet is left for the next time; where the
        file is broken, it ends there.
        """
        try:
            with self._path.open("rb") as file:
                for event in self._records(file):
                    self._add(event)
        except OSError:  # deleted meanwhile
            pass
        return self._numbers

    def _records(self, file: BinaryIO) -> Iterator[bytes]:
        """Events from the last place on that may have one of the numbers."""
        size, place = self._path.stat().st_size, self._end
        if size < place:  # it has been cut, or begun again
            self._numbers, place = {}, 0
        while place < size:
            file.seek(place)
            head = file.read(_HEAD.size)
            length = _HEAD.unpack(head)[0] if len(head) == _HEAD.size else 0
            following = place + _HEAD.size + length + _CHECKSUM
            if not length or following > size:  # no event is empty: the rest of the file is not there, or still zero
                break
            if length <= _LARGEST:
                event = file.read(length)
                if any(name in event for name in self._names.values()):
                    yield event
            place = following
        self._end = place

    def _add(self, record: bytes) -> None:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # has none
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped] # has none

        try:
            event = Event.FromString(record)
        except DecodeError:
            return
        for value in event.summary.value:
            if value.tag in self._names and value.HasField("simple_value") and math.isfinite(value.simple_value):
                self._numbers.setdefault(value.tag, {})[event.step] = value.simple_value
