"""Results kept on disk item by item, so that a run that is killed continues where it was.

Every process writes its own file, a line for each item, and reads the files of all on opening: the next run may have
another number of processes. A line that was cut off counts as not written.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning_xai.atomic_file import write_json
from lightning_xai.results.record import settings_that_differ

__all__ = ["CacheError", "ResultCache"]

_SETTINGS = "settings.json"


class CacheError(ValueError):
    """A folder holds results of other settings; the message names them, and says what to do."""


class ResultCache:
    """Records by the number of their item.

    Args:
        folder: of this cache alone; created if needed.
        settings: all that the records depend on, as plain values.

    Attributes:
        damaged: lines that could not be read, and whose items are computed again.

    Raises:
        CacheError: the folder's records were made with other settings, or nothing says with which.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: TextIO | None = None
        self._records: dict[int, dict[str, Any]] = {}
        self.damaged = 0
        paths = sorted(folder.glob("*.jsonl"))
        # NaN, which equals nothing, as text.
        self._check(json.loads(json.dumps(settings, default=str), parse_constant=str), empty=not paths)
        for path in paths:
            self._load(path)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, index: int) -> bool:
        return index in self._records

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def put(self, index: int, record: Mapping[str, Any]) -> None:
        """Keep a record of plain values; it is on disk after the next `flush`."""
        # This run goes on with what a later one would read, lists for tuples included.
        line = json.dumps({"index": index, "record": record}, ensure_ascii=True)
        if self._file is None:
            self._file = (self._folder / f"{uuid.uuid4().hex}.jsonl").open("w", encoding="ascii")
        self._file.write(line + "\n")
        self._records[index] = json.loads(line)["record"]

    def flush(self) -> None:
        """Hand what was put to the operating system: it then outlives the process."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _check(self, settings: dict[str, Any], *, empty: bool) -> None:
        path = self._folder / _SETTINGS
        if empty and not path.is_file():
            write_json(path, settings)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"{path}: cannot be read ({error}); delete {self._folder} to compute it again") from error
        changed = settings_that_differ(found if isinstance(found, dict) else {}, settings)
        if changed:
            raise CacheError(
                f"{self._folder} holds results of other settings: {'; '.join(changed)}. Choose another folder, or "
                "delete this one to compute all of it again"
            )

    def _load(self, path: Path) -> None:
        with path.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                try:
                    self._take(json.loads(line))
                # One cut-off line must not lose the others.
                except (ValueError, KeyError, TypeError, RecursionError):  # noqa: PERF203
                    self.damaged += 1

    def _take(self, item: Any) -> None:
        index, record = item["index"], item["record"]
        if type(index) is not int or not isinstance(record, dict):
            raise TypeError(f"expected the number and the record of an item; got {index!r} and {type(record)}")
        self._records[index] = record
