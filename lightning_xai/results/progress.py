"""What a training has measured so far, read from its folder while it goes on.

`grounding/summary.csv` has a line for each measurement. It is written whole each time, from the history that
checkpoints carry, so that a run that was killed and goes on has one line for each step. Nothing here needs torch.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from lightning_xai.atomic_file import read_json
from lightning_xai.results.event_files import EVENT_FILES, EventFile
from lightning_xai.results.examples import EXAMPLES_NAME, WORDS_NAME, ExampleRecord, read_examples, read_words
from lightning_xai.results.record import RESULT_NAME, ResultError, ResultRecord, read_record, state_name

__all__ = [
    "LARGEST",
    "RUN_NAME",
    "RUN_VERSION",
    "Example",
    "FollowedFolder",
    "FollowedRun",
    "Loss",
    "Measured",
    "Progress",
    "RunState",
    "find_run",
]

RUN_NAME = "run.json"
RUN_VERSION = 1
SUMMARY = "grounding/summary.csv"
LOGGED = "metrics.csv"
"""What a CSVLogger logs; the parts of earlier starts are `metrics-1.csv` and so on."""
_LOSSES = ("train/loss", "train/loss_step", "train_loss", "train_loss_step")
_MOST_POINTS = 400  # of the curve of the loss
_MARKS = (RUN_NAME, "config.yaml", "hparams.yaml", "lock.owner")
LARGEST = 2**26
"""Bytes of a file that is read whole; those of a run have fewer."""
_MOST_PARSED = 512  # files that are kept in memory
_NAMES = 5  # of runs in a message

T = TypeVar("T")


def find_run(path: Path) -> Path:
    """The folder of the run that a path means: itself, or the only run below it.

    Raises:
        ResultError: it is no folder, holds no run or several, or an evaluation; the message says what to give.
    """
    if not path.is_dir():
        raise ResultError(f"{path} is not a folder; give that of a training run, such as runs/demo/version_0")
    if (path / RESULT_NAME).is_file():
        raise ResultError(f"{path} holds a finished evaluation, which does not change; read it with `report`")
    if _is_run(path):
        return path
    below = sorted(found for depth in ("*", "*/*") for found in path.glob(depth) if _is_run(found))
    if len(below) == 1:
        return below[0]
    if below:
        more = f" and {len(below) - _NAMES} more" if len(below) > _NAMES else ""
        names = ", ".join(map(str, below[:_NAMES]))
        raise ResultError(f"{path} holds {len(below)} runs, of which one can be watched; give one of {names}{more}")
    raise ResultError(
        f"{path} holds no training run: expected {RUN_NAME}, config.yaml or grounding/ in it, which `fit` writes when "
        "it starts; give the folder of a run"
    )


def _is_run(path: Path) -> bool:
    return (path / "grounding").is_dir() or any((path / name).is_file() for name in _MARKS)


class FollowedFolder:
    """Files of one folder that change from time to time; each is parsed again only after it has changed.

    Args:
        root: the folder; no file outside of it is read, not even through a link.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._parsed: dict[tuple[Path, str], tuple[tuple[int, ...], Any]] = {}

    def file(self, name: str) -> Path | None:
        """The regular file of a name relative to the folder; None where there is none inside of it."""
        if "\0" in name:
            return None
        try:
            path = (self.root / name).resolve()
            return path if path.is_relative_to(self.root) and path.is_file() else None
        except (OSError, RuntimeError, ValueError):  # names too long, links in a circle
            return None

    def signature(self, name: str) -> tuple[int, ...]:
        """What changes when a file does; empty where there is none."""
        return _signature(self.file(name))

    def read(self, name: str, parse: Callable[[Path], T]) -> T | None:
        """A file's content; None where there is no such file.

        Raises:
            ResultError: it is too large; and what `parse` raises.
        """
        path = self.file(name)
        signature = _signature(path)
        # A link to another name: parsers that take the folder would read the file of the first one there.
        if path is None or not signature or path.name != name.rpartition("/")[2]:
            return None
        if signature[1] > LARGEST:
            raise ResultError(f"{path} has more than {LARGEST:,} bytes, which no file of a run has; check the folder")
        key = (path, parse.__qualname__)
        kept = self._parsed.pop(key, None)
        # Taken before reading: a file that is replaced meanwhile is read again.
        content: T = kept[1] if kept is not None and kept[0] == signature else parse(path)
        self._parsed[key] = (signature, content)
        while len(self._parsed) > _MOST_PARSED:
            del self._parsed[next(iter(self._parsed))]
        return content


def _signature(path: Path | None) -> tuple[int, ...]:
    try:
        found = None if path is None else path.stat()
    except OSError:  # deleted meanwhile
        return ()
    return () if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


class RunState(msgspec.Struct, frozen=True):
    """What a training's own record says, as far as it concerns who follows it.

    Attributes:
        version: of the record.
        finished: whether training has come to its end.
        best: its best model: `monitor`, `score` and `step`.
        changes: what has changed on the way, a sentence for each.
        longer: how training was extended, a sentence for each.
    """

    version: int = 0
    finished: bool = False
    best: dict[str, Any] | None = None
    changes: tuple[str, ...] = ()
    longer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A measurement.

    Attributes:
        state: "before", "epoch 3" or "step 40".
        step: optimizer steps before it.
        folder: its result folder, relative to the run's.
        values: a number for each numeric column of the summary; None where it has none.
        texts: columns of words, such as the layers.
    """

    state: str
    step: int
    folder: str
    values: Mapping[str, float | None]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Example:
    """An example of a measurement.

    Attributes:
        record: its phrase and the map of that.
        words: [n, H, W], the maps of all words of its caption; None where they were not kept.
    """

    record: ExampleRecord
    words: NDArray[np.float32] | None


@dataclass(frozen=True)
class Progress:
    """What a run has measured so far.

    Attributes:
        state: what the run's record says; None for a run without one.
        measured: one for each step, in order.
        columns: of the summary, in its order.
        record: of the last measurement; None without any.
        written: time of the last change of the summary in seconds since 1970; None before the first measurement.
    """

    state: RunState | None = None
    measured: Sequence[Measured] = ()
    columns: Sequence[str] = ()
    record: ResultRecord | None = None
    written: float | None = None


@dataclass(frozen=True)
class Loss:
    """The training loss by step, as a CSVLogger or a TensorBoardLogger has kept it.

    Attributes:
        steps: optimizer steps taken, of the last value that a point is the mean of.
        values: a point for each, at most 400.
        values_each: logged values that a point is the mean of; the last point may have fewer.
    """

    steps: Sequence[int] = ()
    values: Sequence[float] = ()
    values_each: int = 1


class FollowedRun:
    """A training's folder, to be asked again and again.

    Args:
        root: the run's folder, see `find_run`.
    """

    def __init__(self, root: Path) -> None:
        self.folder = FollowedFolder(root)
        self._last: tuple[Any, Progress] = (None, Progress())
        self._last_loss: tuple[Any, Loss] = (None, Loss())
        self._events: dict[tuple[str, int], EventFile] = {}

    def progress(self) -> Progress:
        """What has been measured so far; the same object as long as nothing changes.

        Raises:
            ResultError: a file is broken, or of another version.
        """
        seen = tuple(map(self.folder.signature, (SUMMARY, RUN_NAME)))
        if self._last[0] == seen:
            return self._last[1]
        state = self.folder.read(RUN_NAME, _read_state)
        columns, lines = self.folder.read(SUMMARY, _read_summary) or ((), [])
        grounding = self.folder.root / "grounding"
        within = {path.name for path in grounding.iterdir()} if lines else set()
        measured = [_measured(line, within) for line in lines]
        record = self.folder.read(f"{measured[-1].folder}/{RESULT_NAME}", _read_record) if measured else None
        written = seen[0][0] / 1e9 if seen[0] else None
        self._last = (seen, Progress(state, measured, columns, record, written))
        return self._last[1]

    def loss(self) -> Loss:
        """The training loss so far, the same object as long as nothing changes.

        It has no point where neither a CSVLogger nor a TensorBoardLogger has logged it into the folder. Where both
        have, a step has the CSVLogger's value, whose digits are those of the loss.

        Raises:
            ResultError: a file is too large.
        """
        tables = [path.name for path in self.folder.root.glob("metrics-*.csv") if path.stem[8:].isdecimal()]
        tables = [*sorted(tables, key=lambda name: int(name[8:-4])), LOGGED]
        events = sorted(path.name for path in self.folder.root.glob(EVENT_FILES))
        seen = [(name, self.folder.signature(name)) for name in (*tables, *events)]
        if self._last_loss[0] != seen:
            found = self._logged_events(events)
            for name in tables:
                found |= self.folder.read(name, _read_losses) or {}  # a step that came again counts once
            self._last_loss = (seen, _thinned(sorted(found.items())))
        return self._last_loss[1]

    def _logged_events(self, names: Sequence[str]) -> dict[int, float]:
        """Steps taken -> the loss in event files, each of which is that of a start."""
        found: dict[int, float] = {}
        for name in names:
            path = self.folder.file(name)
            signature = _signature(path)
            if path is None or not signature or path.name != name:  # as in `FollowedFolder.read`
                continue
            # A file that takes the place of another one has another number, and is read from its start.
            file = self._events.setdefault((name, signature[2]), EventFile(path, _LOSSES))
            numbers = file.numbers()
            own = next((numbers[each] for each in _LOSSES if each in numbers), {})
            # What an earlier start has logged after the checkpoint that this one began with did not come to pass.
            begin = min(own, default=math.inf)
            found = {step: value for step, value in found.items() if step <= begin}
            found |= {step + 1: value for step, value in own.items()}
        return found

    def examples(self, measured: Measured) -> dict[str, list[Example]]:
        """Label of a reading -> the fixed examples of a measurement; empty where none were kept.

        Raises:
            ResultError: a file is broken, or of another version.
        """
        record = self.folder.read(f"{measured.folder}/{RESULT_NAME}", _read_record)
        found: dict[str, list[Example]] = {}
        for label in () if record is None else record.methods:
            records = self.folder.read(f"{measured.folder}/{label}/{EXAMPLES_NAME}", _read_examples) or []
            words = self.folder.read(f"{measured.folder}/{label}/{WORDS_NAME}", _read_words) or {}
            if records:
                found[label] = [Example(each, words.get(place)) for place, each in enumerate(records)]
        return found


def _read_state(path: Path) -> RunState:
    try:
        state = read_json(path, RunState)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read ({error}); restore it, or delete it") from error
    if state.version != RUN_VERSION:
        raise ResultError(
            f"{path}: version {state.version} of a run's record, this release reads {RUN_VERSION}; watch the run with "
            "the release of lightning_xai that trains it"
        )
    return state


def _read_record(path: Path) -> ResultRecord:
    return read_record(path.parent)


def _read_examples(path: Path) -> list[ExampleRecord]:
    return read_examples(path.parent)


def _read_words(path: Path) -> dict[int, NDArray[np.float32]]:
    return read_words(path.parent)


def _read_summary(path: Path) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The columns and the lines, the last one of each step, in the order of steps."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            names = tuple(reader.fieldnames or ())
            lines = list(reader)
        if "targets" not in names:
            raise ResultError(
                f"{path}: version 1 of the result format, or no summary of a training; run `fit` again, into a new "
                "folder, to write it in the new format"
            )
        by_step = {int(line["step"]): line for line in lines}
        for line in lines:
            int(line.get("epoch") or 0)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        if isinstance(error, ResultError):
            raise
        raise ResultError(f"{path}: no table of measurements ({error}); restore it, or let the run go on") from error
    for line in lines:
        line.pop(None, None)  # cells without a column
    return names, [by_step[step] for step in sorted(by_step)]


def _read_losses(path: Path) -> dict[int, float]:
    """Steps taken -> the loss; rows that are being written, or have none, are left out."""
    found: dict[int, float] = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file, restval="")
            name = next((each for each in _LOSSES if each in (reader.fieldnames or ())), None)
            for line in reader if name is not None else ():
                value, step = _number(line[name or ""]), line.get("step", "")
                if isinstance(value, float) and step.isdecimal():
                    found[int(step) + 1] = value  # a row's step is the last one taken, from 0
    except (OSError, csv.Error):
        return {}
    return found


def _thinned(logged: Sequence[tuple[int, float]]) -> Loss:
    """Means of as many values as leave 400 points."""
    each = max(1, math.ceil(len(logged) / _MOST_POINTS))
    parts = [logged[start : start + each] for start in range(0, len(logged), each)]
    means = [sum(value for _, value in part) / len(part) for part in parts]
    return Loss([part[-1][0] for part in parts], means, each)


def _measured(line: Mapping[str, str], folders: set[str]) -> Measured:
    step, epoch = int(line["step"]), int(line.get("epoch") or 0)
    within = f"step={step:08d}"
    folder = within if within in folders else f"epoch={epoch:03d}"
    state = state_name({"epoch": epoch, "step": step} | ({"batch": 1} if folder == within else {}))
    numbers = {name: _number(text) for name, text in line.items()}
    values = {name: None if isinstance(number, str) else number for name, number in numbers.items()}
    texts = {name: number for name, number in numbers.items() if isinstance(number, str)}
    return Measured(state, step, f"grounding/{folder}", values, texts)


def _number(text: str) -> float | str | None:
    """A cell as a number, or else as its text; None for an empty one and for what is not finite."""
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else None
