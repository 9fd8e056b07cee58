"""What the live page of a run shows: a table, curves, what was excluded, and the fixed examples over time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.report.explanation import Token
from lightning_xai.report.explorer import ExplorerCaption, ExplorerItem, ExplorerReading, explorer_page
from lightning_xai.report.paper_table import LOGGED_COLUMNS, Column, score_column
from lightning_xai.results.examples import words_of
from lightning_xai.results.progress import Example, FollowedRun, Loss, Measured, Progress
from lightning_xai.results.record import ResultError, ResultRecord, Score, layers_in_words
from lightning_xai.results.runs import GROUNDING

__all__ = ["RunView"]

T = TypeVar("T")

_INPUT = "_input"
"""Ends the names of what was read at the inputs."""
_EXCLUDED = "excluded_"
_SHARE = re.compile(r"recall_at_\d+|accuracy")
_COUNT = re.compile(rf"(\w+_)?(targets|excluded|skipped|images|broken_records)({_INPUT})?|{_EXCLUDED}\w+")
_NO_CURVE = re.compile(rf"epoch|step|layers({_INPUT})?|{_COUNT.pattern}")
_MOST_SHOWN = 24  # measurements on the slider
_LARGEST_PICTURE = 4096 * 4096  # pixels
_LARGEST_MAP = 512
_PICTURES = {"curves.png": "Curves of the scores", "progress.png": "Heat maps of the examples"}
_STILL_ROWS = 20  # of the table for readers without a script


@dataclass(frozen=True)
class _Shown:
    """A column of the summary and how it is shown."""

    key: str
    column: Column


class RunView:
    """The live page of one run, and its data; each part is made again only after its files have changed.

    Args:
        run: the run.
        name: of the run, as the page calls it.
    """

    def __init__(self, run: FollowedRun, name: str) -> None:
        self._run = run
        self._name = name
        self._made: dict[str, tuple[Any, Any]] = {}

    def page(self) -> bytes:
        """The page as HTML, which holds what a reader without a script needs, too."""
        progress, fault = self._progress()
        pictures = {name: what for name, what in _PICTURES.items() if self._run.folder.file(f"grounding/{name}")}
        # A measurement's pictures come after its line of the summary.
        return self._kept("page", (progress, fault, *pictures), lambda: self._page(progress, fault, pictures))

    def data(self) -> bytes:
        """What the page's script asks for again and again, as JSON.

        `name`, `status`, `fault` (why a file cannot be read, or null), `notes`, `written` (seconds since 1970), `table`
        (`columns`, and `rows` of texts), `panels` of curves, `excluded`, and `examples`, which changes when
        the explorer does, or null.
        """
        progress, fault = self._progress()
        loss = self._loss()

        def made() -> bytes:
            # Losses come often, measurements do not.
            data = self._kept("measured", (progress, fault), lambda: self._data(progress, fault))
            return _as_json(data | {"panels": [*data["panels"], *_loss_panel(loss)]})

        return self._kept("data", (progress, fault, loss), made)

    def explorer(self) -> bytes:
        """The fixed examples in an explorer whose slider goes through the measurements, as HTML."""
        progress, fault = self._progress()
        return self._kept("explorer", (progress, fault), lambda: self._explorer(progress, fault))

    def _kept(self, part: str, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        before = self._made.get(part)
        if before is not None and before[0][0] is key[0] and before[0][1:] == key[1:]:
            kept: T = before[1]
            return kept
        made = make()
        self._made[part] = (key, made)
        return made

    def _progress(self) -> tuple[Progress, str]:
        """What was measured, and why nothing can be read."""
        try:
            return self._run.progress(), ""
        except (ResultError, OSError) as error:
            return _NOTHING, str(error)

    def _loss(self) -> Loss:
        """The training loss; without a point where it cannot be read, which the measured curves do not suffer from."""
        try:
            return self._run.loss()
        except (ResultError, OSError):
            return Loss()

    def _page(self, progress: Progress, fault: str, pictures: Mapping[str, str]) -> bytes:
        last = replace(progress, measured=progress.measured[-_STILL_ROWS:])
        data = self._data(last, fault) | {"status": _status(progress)}
        return _environment().get_template("page.html.j2").render(data=data, pictures=pictures).encode(errors="replace")

    def _data(self, progress: Progress, fault: str) -> dict[str, Any]:
        """All data but the training loss."""
        shown = _columns(progress)
        rows = [[each.state, f"{each.step:,}", *(_cell(each, one) for one in shown)] for each in progress.measured]
        columns = [Column("after", numeric=False), Column("step"), *(one.column for one in shown)]
        return {
            "name": self._name,
            "status": _status(progress),
            "fault": fault or None,
            "notes": [] if progress.state is None else [*progress.state.changes, *progress.state.longer],
            "written": progress.written,
            "table": {
                "columns": [{"group": c.group, "heading": c.heading, "numeric": c.numeric} for c in columns],
                "rows": rows,
            },
            "panels": list(_panels(progress, shown)),
            "excluded": _excluded(progress),
            "examples": self._version(progress),
        }

    def _version(self, progress: Progress) -> str | None:
        """What changes when the explorer does; None where there are no examples."""
        try:
            there = bool(progress.measured) and bool(self._run.examples(progress.measured[-1]))
        except ResultError:
            there = True  # the explorer says why it cannot show them
        return str(progress.written) if there else None

    def _explorer(self, progress: Progress, fault: str) -> bytes:
        try:
            items = [] if fault else list(self._items(progress))
        except (ResultError, ValueError) as error:
            items, fault = [], str(error)
        if not items:
            return _note(fault or "No examples were kept yet.")
        return explorer_page(items, title="The fixed examples", mode="time").encode()

    def _items(self, progress: Progress) -> Iterator[ExplorerItem]:
        """An item for each measurement and example, of those that the last measurement has, too."""
        last = self._run.examples(progress.measured[-1]) if progress.measured else {}
        asked = {_key(each) for each in next(iter(last.values()), ())}
        for measured in _thinned(progress.measured):
            found: dict[tuple[str, str, str], dict[str, Example]] = {}
            for label, examples in reversed(self._run.examples(measured).items()):  # inputs first
                for each in examples:
                    found.setdefault(_key(each), {})[label] = each
            for key, by_label in found.items():
                record = next(iter(by_label.values())).record
                photo = self._run.folder.read(f"grounding/{record.image}", _photo)
                if key in asked and photo is not None:
                    yield ExplorerItem(
                        key=record.key,
                        photo=photo,
                        captions=[_caption(by_label, progress.record)],
                        box=record.box,
                        label=measured.state,
                        group=f"{record.key}: {record.phrase}",
                    )


_NOTHING = Progress()


def _columns(progress: Progress) -> list[_Shown]:
    """How the columns of a summary are shown: scores first, at the inputs before, then what else was logged."""
    record, names = progress.record, progress.columns
    metric = record.metrics.get(GROUNDING) if record is not None else None
    scores: Sequence[Score] = () if metric is None else metric.scores
    found: dict[str, Column] = {}
    for suffix in (_INPUT, ""):
        group = _where(progress, suffix)
        own = {f"{score.name}{suffix}": score_column(score, group) for score in scores}
        own |= {f"targets{suffix}": Column("targets", group, digits=0)}
        found |= {name: column for name, column in own.items() if name in names}
    found |= {name: column for name, column in LOGGED_COLUMNS.items() if name in names}
    rest = [name for name in names if name not in (*found, "epoch", "step") and not name.startswith("layers")]
    for name in sorted(rest, key=lambda name: name.startswith(_EXCLUDED)):  # stable: others keep their order
        found[name] = _other_column(name, progress)
    return [_Shown(name, column) for name, column in found.items()]


def _other_column(name: str, progress: Progress) -> Column:
    if name.startswith(_EXCLUDED):
        suffix = _INPUT if name.endswith(_INPUT) else ""
        words = name.removeprefix(_EXCLUDED).removesuffix(suffix).replace("_", " ")
        return Column(words, f"excluded, {_where(progress, suffix)}", digits=0)
    share = _SHARE.search(name) is not None
    whole = _COUNT.fullmatch(name) is not None
    return Column(name.replace("_", " "), percent=share, digits=1 if share else 0 if whole else 4)


def _where(progress: Progress, suffix: str) -> str:
    """The layers that were read, in words and numbers: "inputs (0,0)"."""
    numbers = progress.measured[-1].texts.get(f"layers{suffix}", "") if progress.measured else ""
    label = f"feature_pair,{numbers}" if suffix else "feature_pair"
    method = None if progress.record is None else progress.record.methods.get(label)
    words = layers_in_words(method.options) if method is not None else ""
    words = "inputs" if suffix else words or "last blocks"
    return f"{words} ({numbers})" if numbers else words


def _cell(measured: Measured, shown: _Shown) -> str:
    return measured.texts.get(shown.key) or shown.column.text(measured.values.get(shown.key))


def _status(progress: Progress) -> str:
    """In one or two sentences, how far the run is."""
    count, state = len(progress.measured), progress.state
    if not count:
        return "Nothing measured yet."
    last = progress.measured[-1]
    words = f"{count} measurement{'s' if count > 1 else ''}, the last: {last.state}, step {last.step:,}."
    if state is None or not state.finished:
        return words
    best, score = state.best or {}, (state.best or {}).get("score")
    kept = f" Best by {best.get('monitor')}: {score:.4f}, step {best.get('step')}." if isinstance(score, float) else ""
    return f"Finished. {words}{kept}"


def _panels(progress: Progress, shown: Sequence[_Shown]) -> Iterator[dict[str, Any]]:
    """Curves that share axes: scores by where they were read, other shares, and each other number alone."""
    record = progress.record
    dashed = {score.name for score in record.scores.values() if not score.percent} if record is not None else set()
    groups: dict[tuple[str, str], list[_Shown]] = {}
    for each in shown:
        if _NO_CURVE.fullmatch(each.key):
            continue
        grouped = each.column.group
        percent = bool(grouped) or each.column.percent
        title = grouped or ("retrieval and other tasks" if percent else each.column.name)
        groups.setdefault((title, "%" if percent else ""), []).append(each)
    steps = [each.step for each in progress.measured]
    for (title, unit), own in groups.items():
        lines = [_line(progress, each, 100 if unit else 1, dashed) for each in own]
        if any(value is not None for line in lines for value in line["values"]):
            yield {"title": title, "unit": unit, "steps": steps, "lines": lines}


def _line(progress: Progress, shown: _Shown, factor: float, dashed: Collection[str]) -> dict[str, Any]:
    """One curve: a value for each measurement, in the unit of its panel, of five digits."""
    numbers = (measured.values.get(shown.key) for measured in progress.measured)
    values = [None if number is None else float(f"{factor * number:.5g}") for number in numbers]
    return {"name": shown.column.name, "dashed": shown.key.removesuffix(_INPUT) in dashed, "values": values}


def _loss_panel(loss: Loss) -> Iterator[dict[str, Any]]:
    """The curve of the training loss, over its own steps; none without a point."""
    if loss.steps:
        means = "" if loss.values_each == 1 else f", means of {loss.values_each} values"
        values = [float(f"{value:.5g}") for value in loss.values]
        line = {"name": f"train/loss{means}", "dashed": False, "values": values}
        yield {"title": "training loss", "unit": "", "steps": list(loss.steps), "lines": [line]}


def _excluded(progress: Progress) -> list[dict[str, Any]]:
    """What the last measurement left out, by place and reason."""
    found: list[dict[str, Any]] = []
    values = progress.measured[-1].values if progress.measured else {}
    for suffix in (_INPUT, ""):
        names = [
            name
            for name in values
            if name.startswith(_EXCLUDED) and name.endswith(_INPUT) == bool(suffix) and values[name]
        ]
        reasons = [
            (name.removeprefix(_EXCLUDED).removesuffix(suffix).replace("_", " "), int(values[name] or 0))
            for name in names
        ]
        if f"targets{suffix}" in values:
            found.append(
                {
                    "where": _where(progress, suffix),
                    "measured": int(values[f"targets{suffix}"] or 0),
                    "reasons": reasons,
                }
            )
    broken = values.get("broken_records")
    if broken:
        found.append({"where": "records of the data", "measured": None, "reasons": [("broken records", int(broken))]})
    return found


def _thinned(measured: Sequence[Measured]) -> list[Measured]:
    """At most 25 measurements, with the first and the last one.

    The step between them doubles as they become more, so that those shown before are among those shown now.
    """
    step = 2 ** max(0, math.ceil(math.log2(max(len(measured) - 1, 1) / _MOST_SHOWN)))
    shown = list(measured[::step])
    return shown if not shown or shown[-1] is measured[-1] else [*shown, measured[-1]]


def _key(example: Example) -> tuple[str, str, str]:
    return example.record.key, example.record.caption, example.record.phrase


def _caption(by_label: Mapping[str, Example], record: ResultRecord | None) -> ExplorerCaption:
    """A caption with its words, or the phrase alone where only its map was kept."""
    first = next(iter(by_label.values())).record
    whole = all(each.words is not None for each in by_label.values())
    text, spans = (first.caption, first.spans) if whole else (first.phrase, ((0, len(first.phrase)),))
    tokens = [
        Token(text[start:end], marked=any(start < other_end and other < end for other, other_end in spans))
        for start, end in words_of(text)
    ]
    readings = [_reading(label, each, record, len(tokens) if whole else 0) for label, each in by_label.items()]
    return ExplorerCaption(text, tokens, readings)


def _reading(label: str, example: Example, record: ResultRecord | None, words: int) -> ExplorerReading:
    """A map as the explorer takes it, with those of so many words."""
    known = example.record
    sizes = {len(row) for row in known.heat}
    if len(sizes) != 1 or not 0 < max(sizes) <= _LARGEST_MAP or len(known.heat) > _LARGEST_MAP:
        raise ResultError(f"the map of {known.key}, {label}, has rows of {sorted(sizes)} values; let the run go on")
    image = np.array(known.heat, dtype=np.float32)
    pairs = example.words if words else None
    if pairs is not None and pairs.shape != (words, *image.shape):
        raise ResultError(f"the maps of the words of {known.key}, {label}, are {pairs.shape}; let the run go on")
    method = record.methods.get(label) if record is not None else None
    gamma = "no γ" if known.gamma is None else f"γ = {known.gamma:.3f}"
    hit = "inside" if known.hit else "outside of"
    return ExplorerReading(
        method=method.name if method is not None else label,
        where=layers_in_words(method.options) if method is not None else "",
        tokens_by_patches=pairs,
        image=image if pairs is None else pairs.sum(axis=0),
        text=None if pairs is None else pairs.sum(axis=(1, 2)),
        similarity=None,
        scale="signed",
        note=f"“{known.phrase}”: {gamma}, the largest entry is {hit} the box",
    )


def _photo(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:  # others start programs, such as Ghostscript
            if picture.width * picture.height > _LARGEST_PICTURE:
                raise ValueError(f"it has {picture.width} x {picture.height} pixels, which is too many")
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ResultError(f"{path} is no picture ({error}); the next measurement writes it again") from error


def _as_json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _note(text: str) -> bytes:
    return _environment().get_template("note.html.j2").render(text=text).encode(errors="replace")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("lightning_xai.report", "watch"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def own_file(name: str) -> bytes:
    """A file of the page that the package holds; the style begins with what all pages share."""
    report = files("lightning_xai.report")
    shared = report.joinpath("base.css").read_bytes() if name.endswith(".css") else b""
    return shared + report.joinpath("watch").joinpath(name).read_bytes()
