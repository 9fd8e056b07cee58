"""Broken input, drawn at random but the same in every run, and what has to come of it.

`LIGHTNING_XAI_FUZZ=5000` draws so many inputs for each test, from another seed in every run.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import lightning_xai

T = TypeVar("T")

_SECONDS = 20  # for one input, on a machine that is busy
_PACKAGE = Path(lightning_xai.__file__).parent
_ADVICE = re.compile(
    r"\b(again|allowed|allows?|check|choose|convert|copy|delete|download|drop|expected|give|it has|leave|lists?|make|"
    r"mend|prepare|rebuild|replace|restore|run|use)\b",
    re.IGNORECASE,
)

_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "\t", "a", "1", "nan", "\ud800", "é\u0301 漢字", "\0", "a\nb", "x" * 3000, "../../etc/passwd",
    "/etc/passwd", "<end_of_text>", "[b]not[/b] {x}", [], {}, [[]], [None], ["a"], [0, 0, 0, 0], [1, 2, 3, 4],
    [1e308] * 4, {"a": 1}, {"": None}, {"0": [[0, 1]]},
)  # fmt: skip


def fuzz(examples: int = 50) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on so many drawn inputs, always the same ones unless LIGHTNING_XAI_FUZZ is set."""
    more = int(os.environ.get("LIGHTNING_XAI_FUZZ", "0"))
    return settings(
        max_examples=more or examples,
        derandomize=not more,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=bool(more),
    )


@contextmanager
def in_time() -> Iterator[None]:
    """Fail a block that hangs."""

    def stop(signum: int, frame: Any) -> None:
        pytest.fail(f"not done within {_SECONDS} s")  # no Exception, so that nothing catches it

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def result_or_refusal(use: Callable[[], T], *refusals: type[Exception]) -> T | None:
    """What `use` returns, or None where it refuses its input as it should.

    A refusal is a ValueError (or one of `refusals`) that the package itself raises, with a word of what to do.
    """
    expected: tuple[type[Exception], ...] = (ValueError, *refusals)
    with in_time():
        try:
            return use()
        except expected as error:
            refusal = error
    place = Path(traceback.extract_tb(refusal.__traceback__)[-1].filename)
    assert place.is_relative_to(_PACKAGE), f"{refusal!r} comes from {place}"
    assert _ADVICE.search(str(refusal)), f"no advice in {refusal}"
    return None


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with up to three faults: bits flipped, a part cut out, doubled, zeroed or replaced, the end lost."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from((1, 2, 7, 100, 512, 600)))
        part = data[start : start + length]
        new = draw(
            st.sampled_from(
                (
                    bytes(byte ^ 0xFF for byte in part),
                    bytes(byte ^ 1 for byte in part),
                    b"",
                    part * 2,
                    bytes(len(part)),
                    None,
                    b"9" * len(part),
                )
            )
        )
        data = data[:start] if new is None else data[:start] + new + data[start + length :]
    return data


@st.composite
def broken_json(draw: st.DrawFn, content: Any) -> Any:
    """Plain values with up to three faults: one replaced by something strange, or by another one, lost or doubled."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            return draw(st.sampled_from(_STRANGE))
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("strange", "strange", "strange", "other", "lost", "doubled")))
        if change == "strange":
            holder[key] = copy.deepcopy(draw(st.sampled_from(_STRANGE)))
        elif change == "other":
            other, place = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other[place])
        elif change == "lost":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[draw(st.sampled_from((f"{key}0", "", "-1", "1")))] = copy.deepcopy(holder[key])
    return content


@st.composite
def broken_file(draw: st.DrawFn, data: bytes, suffix: str = ".json") -> bytes:
    """A file with faults in its bytes or, of JSON and CSV, in its values."""
    if not draw(st.integers(0, 3)):
        return draw(broken_bytes(data))
    if suffix == ".json":
        return json.dumps(draw(broken_json(json.loads(data)))).encode()
    if suffix == ".csv":
        rows = draw(broken_json(list(csv.reader(io.StringIO(data.decode())))))
        text = io.StringIO()
        csv.writer(text).writerows(row if isinstance(row, list) else [row] for row in rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    return draw(broken_bytes(data))


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key or index in nested values."""
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    for key, value in list(items):
        yield content, key
        yield from _places(value)
