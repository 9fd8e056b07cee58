"""Files that a reader sees whole or not at all, and JSON in them."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

__all__ = ["as_read", "plain", "put_in_place", "read_json", "replaced_at_once", "write_json"]

T = TypeVar("T")


@contextmanager
def replaced_at_once(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder to write to; it replaces `path` at the end and is deleted after an error.

    The folder is created if needed. The suffix is kept, since some writers choose the format by it.

    Args:
        path: the file to write.
        durable: flush it to the disk before it replaces the old one, so that it survives a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process numbers repeat: containers on several machines share one folder.
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield part
        if durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            put_in_place(part, path)
        else:
            part.replace(path)
    finally:
        with suppress(OSError):  # must not hide the first error
            part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a complete file so that it keeps its new name after a power failure."""
    part.replace(path)
    if os.name == "nt":
        return  # Windows opens no folders
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # The name is an entry of the folder: without this, only the content is on the disk.
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write plain values as JSON, NaN as null; a reader sees the whole file or the one before it.

    Through the standard library: msgspec refuses lone surrogates, which paths that are no UTF-8 bring.
    """
    with replaced_at_once(path, durable=durable) as part:
        text = json.dumps(plain(record), indent=2, ensure_ascii=False, default=str, allow_nan=False)
        # Lone surrogates, which are no UTF-8, become JSON's escapes.
        part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file, and check that it holds what `kind` says.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or a field is missing or of another type; the message says which.
    """
    try:
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), kind)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def as_read(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as `write_json` and `read_json` give it back, to compare it with one that was read.

    >>> as_read({"betas": (0.9, 0.98), "out": Path("runs")})
    {'betas': [0.9, 0.98], 'out': 'runs'}
    """
    read: dict[str, Any] = json.loads(json.dumps(plain(record), default=str))
    return read


def plain(value: Any) -> Any:
    """Return the value with null in place of numbers that JSON does not know, and text keys.

    >>> plain({1: (0.5, float("nan"))})
    {'1': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
