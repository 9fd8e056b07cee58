"""Stores of shards: a folder of this machine, or an object store that webdataset opens as a stream.

Streams of a store break off in practice: servers restart, connections are cut. Then the file is opened again, and the
stream goes on after the bytes that were already given out, so that a reader notices nothing but the delay.
"""

from __future__ import annotations

import io
import logging
import os
import select
import shutil
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from webdataset.gopen import Pipe, gopen, gopen_ais, gopen_curl, gopen_gsutil, gopen_hf, gopen_htgs, gopen_schemes

__all__ = ["LocalStore", "Place", "RemoteStore", "ShardStore", "open_file", "open_store"]

_NAME = "{}"
_EXAMPLE = "pipe:aws s3 cp s3://BUCKET/FOLDER/{} -"
_BUFFER = 1 << 16
_SILENCE = 120.0  # seconds without a byte after which a stream is opened again
# What gopen runs to open an address.
_PROGRAMS = {gopen_curl: "curl", gopen_htgs: "curl", gopen_hf: "curl", gopen_gsutil: "gsutil", gopen_ais: "ais"}
_CURL_REASONS = {
    6: "the host's name was not found",
    7: "no connection",
    18: "the connection was cut",
    22: "the server answered with an error: 404 says that there is no such file, 403 that access is not allowed",
    28: "no answer in time",
}

_log = logging.getLogger(__name__)


class ShardStore(Protocol):
    """The place of the files of a set of shards; its text is for messages. Stores can be pickled."""

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """Open a file of the set to read.

        Args:
            name: of the file; a shard's name is one that `ShardEntry` has let through.
            size: bytes that it is known to have.

        Raises:
            OSError: there is no such file, as far as that is known before reading, or it cannot be opened. Reading may
                raise it, too.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where that is not known before it is read.

        Raises:
            FileNotFoundError: there is no such file.
        """

    def locate(self, name: str) -> str:
        """A file's path or address, for messages."""


Place: TypeAlias = "str | Path | ShardStore"
"""The place of shards: a folder, or a text as `open_store` takes it."""


def open_store(place: Place, retries: int = 3) -> ShardStore:
    """The store at a place.

    Args:
        place: a folder; an address of a scheme that webdataset opens (`https://HOST/coco/train`,
            `gs://BUCKET/coco/train`), below which the files lie, or in which `{}` stands for a file's name
            (`https://HOST/coco/train/{}?token=...`); or a shell command that writes a file to its standard output, with
            `{}` for the name (`pipe:aws s3 cp s3://BUCKET/coco/train/{} -`). It is run as it stands: never take
            one from somebody else.
        retries: how often a stream that broke off is opened again.

    Raises:
        ValueError: no such scheme, or a command without `{}`.
    """
    if isinstance(place, Path):
        return LocalStore(place)
    if not isinstance(place, str):
        return place
    scheme, colon, _ = place.partition(":")
    if scheme == "pipe" and colon:
        if _NAME not in place:
            raise ValueError(f"{place}: the command has to hold {_NAME} where a file's name goes, as in {_EXAMPLE}")
        return RemoteStore(place, retries)
    if "://" not in place:
        return LocalStore(Path(place))
    known = sorted(set(gopen_schemes) - {"__default__", "pipe"})
    if scheme not in known:
        raise ValueError(
            f"{_shown(place)}: webdataset opens {', '.join(known)}, not {scheme}; give a folder's path without a "
            f"scheme, or a command that writes a file to its standard output: {_EXAMPLE}"
        )
    if urlsplit(place).query and _NAME not in place:
        raise ValueError(f"{_shown(place)}: an address with a query has to hold {_NAME} where a file's name goes")
    return RemoteStore(place if _NAME in place else f"{place.rstrip('/')}/{_NAME}", retries)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read.

    Raises:
        FileNotFoundError: there is none; opening a pipe or a device could block for ever.
    """
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    return path.open("rb")


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine.

    Attributes:
        folder: the folder.
    """

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """See `ShardStore`."""
        return open_file(self.folder / name)

    def size(self, name: str) -> int:
        """See `ShardStore`."""
        status = (self.folder / name).stat()  # one question for each shard: servers of large file systems answer few
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError("it is no file")
        return status.st_size

    def locate(self, name: str) -> str:
        """See `ShardStore`."""
        return str(self.folder / name)


@dataclass(frozen=True)
class RemoteStore:
    """Files that webdataset's `gopen` opens.

    Attributes:
        pattern: an address, or `pipe:` and a command, with `{}` for a file's name.
        retries: how often one file is opened again after its stream broke off.
        delay: seconds before the first time; each further one waits twice as long.
    """

    pattern: str
    retries: int = 3
    delay: float = 1.0

    def __str__(self) -> str:
        return self.locate("").rstrip("/")

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """See `ShardStore`; nothing is opened before the first byte is read."""
        handler = gopen_schemes.get(self.pattern.partition(":")[0])
        program = _PROGRAMS.get(handler, "sh")
        if shutil.which(program) is None:
            raise OSError(
                f"webdataset opens such addresses with the program {program}, which is not on the PATH: install it, or "
                "give a command instead, 'pipe:COMMAND' with {} for a file's name"
            )
        # The stream is buffered here; a raw one may also hand out fewer bytes than it is asked for.
        return io.BufferedReader(_RetriedStream(self, name, size), _BUFFER)

    def size(self, name: str) -> None:
        """See `ShardStore`; not known."""
        return

    def locate(self, name: str) -> str:
        """See `ShardStore`; without what an address could hold that is secret."""
        return _shown(self.pattern.replace(_NAME, name))

    def address(self, name: str) -> str:
        """The address that `gopen` opens."""
        return self.pattern.replace(_NAME, name)


class _RetriedStream(io.RawIOBase):
    """The bytes of one file, over as many streams as that takes."""

    def __init__(self, store: RemoteStore, name: str, size: int | None) -> None:
        self._store = store
        self._name = name
        self._size = size
        self._source: Any = None
        self._given = 0
        self._failures = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = len(buffer) if self._size is None else min(len(buffer), self._size - self._given)
        while left:
            try:
                data = self._read(left)
            except OSError as error:
                self._prepare_retry(error)
                continue
            buffer[: len(data)] = data
            self._given += len(data)
            return len(data)
        return 0

    def close(self) -> None:
        self._leave()
        super().close()

    def _read(self, size: int) -> bytes:
        """The next bytes, at least one; none where the file ends, as it may where its size is not known."""
        if self._source is None:
            self._source = gopen(self._store.address(self._name), "rb", bufsize=_BUFFER)
            passed = 0
            while passed < self._given:
                passed += len(self._take(min(self._given - passed, _BUFFER)))
        return self._take(size, may_end=self._size is None)

    def _take(self, size: int, may_end: bool = False) -> bytes:
        # Not Pipe.read: that throws away the last bytes of a command that fails.
        data = _read_from(self._source.stream, size) if isinstance(self._source, Pipe) else self._source.read(size)
        if data:
            return bytes(data)
        status = _status_of(self._source.proc) if isinstance(self._source, Pipe) else 0
        if status:
            curl = not self._store.pattern.startswith("pipe:")
            reason = f" ({_CURL_REASONS[status]})" if curl and status in _CURL_REASONS else ""
            raise OSError(f"the command that opens it ended with status {status}{reason}")
        if not may_end:
            raise OSError(f"the stream ended early, the file has {self._size:,} bytes")
        return b""

    def _prepare_retry(self, error: OSError) -> None:
        self._leave()
        self._failures += 1
        if self._failures > self._store.retries:
            raise OSError(f"{error}; attempt {self._failures} of {self._failures}") from error
        delay = self._store.delay * 2 ** (self._failures - 1)
        _log.warning(
            "%s broke off after %s bytes: %s. Retry %d of %d in %g s",
            self._store.locate(self._name),
            f"{self._given:,}",
            error,
            self._failures,
            self._store.retries,
            delay,
        )
        time.sleep(delay)

    def _leave(self) -> None:
        """Close what is open, and end the command; what it has started itself ends when it writes the next time."""
        source, self._source = self._source, None
        if not isinstance(source, Pipe):
            if source is not None:
                source.close()
            return
        # Not Pipe.close: that waits two hours for a command that hangs, and takes an early end for an error.
        # Not terminate: workers hold SIGTERM back, and so do the commands that they start.
        source.stream.close()
        source.proc.kill()
        source.proc.wait()


def _read_from(pipe: BinaryIO, size: int) -> bytes:
    """At least one byte of what a command writes; none where it has ended."""
    if hasattr(select, "poll"):  # Windows cannot wait for a pipe
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        if not waiting.poll(1e3 * _SILENCE):
            raise OSError(f"no byte came in {_SILENCE:g} s")
    return os.read(pipe.fileno(), size)  # past Python's buffer, which could not be waited for


def _status_of(command: subprocess.Popen[bytes]) -> int:
    """The exit status of a command that has closed its output."""
    try:
        return command.wait(_SILENCE)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the command that opens it does not end, {_SILENCE:g} s after its last byte") from error


def _shown(address: str) -> str:
    """An address without the parts that may be secret: user, password and query."""
    if address.startswith("pipe:"):
        return address
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
