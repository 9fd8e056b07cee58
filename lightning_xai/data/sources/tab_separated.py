"""Text files with one row a line and a tab between its fields, as several data sets keep their captions.

Nothing is quoted: a `"` is a character like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: Path, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """The rows of a file, one after the other: what stands before the first tab, and what stands behind it.

    Args:
        path: the file, UTF-8.
        left_out: filled while iterated: `row_not_utf8`, `row_malformed` (there is no tab).
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            try:
                text = (line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line).decode()
            except UnicodeDecodeError:
                left_out["row_not_utf8"] += 1
                continue
            first, tab, rest = text.rstrip("\r\n").partition("\t")
            if tab:
                yield first, rest
            else:
                left_out["row_malformed"] += 1
