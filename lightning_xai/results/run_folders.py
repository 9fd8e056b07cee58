"""Reads folders of results into `runs`: every file once, with names that tell the runs apart."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from lightning_xai.report.tables import epoch_name, read_csv
from lightning_xai.results.runs import FEATURE_PAIR, MEASURED, Grounding, Row, Run, Training, training_data
from lightning_xai.results.schema import (
    RESULT_NAME,
    TABLES,
    EvaluationResult,
    ExampleRecord,
    ResultError,
    RoarResult,
    load_result,
    read_examples,
)

__all__ = ["load_runs"]

_LARGEST_CONFIG = 2**20
_GROUNDING = ("key", "caption_index", "caption", "phrase", "label", "reason", "gamma", "hit")


def load_runs(folders: Sequence[Path], names: Sequence[str] = ()) -> list[Run]:
    """Read the runs of these folders.

    Args:
        folders: at least one; none twice.
        names: one for each folder; without any, each is called by as much of its path as tells it from the others.

    Raises:
        ResultError: a folder holds no results, or files that are broken, incomplete or of another version.
        ValueError: no folder, one twice, or other names than one different name for each.
    """
    if not folders:
        raise ValueError("give at least one folder of results")
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, number in Counter(resolved).items() if number > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; give each run once")
    if names and (len(names) != len(folders) or len(set(names)) != len(names) or not all(names)):
        raise ValueError(f"--names has to hold a different name for each of {len(folders)} runs; got {list(names)}")
    named = zip(folders, names or distinct_names(resolved), strict=True)
    return [load_run(folder, name, alone=len(folders) == 1) for folder, name in named]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell them apart; `version_0` alone says nothing.

    >>> distinct_names([Path("/a/x/one"), Path("/b/y/one"), Path("/b/two"), Path("/runs/demo/version_0")])
    ['x/one', 'y/one', 'two', 'demo/version_0']
    """
    depths = [2 if re.fullmatch(r"version_\d+", folder.name) else 1 for folder in folders]
    while True:
        names = [_tail(folder, depth) for folder, depth in zip(folders, depths, strict=True)]
        counts = Counter(names)
        again = [i for i, name in enumerate(names) if counts[name] > 1 and depths[i] < len(folders[i].parts)]
        if not again:
            return names
        for i in again:
            depths[i] += 1


def load_run(folder: Path, name: str, *, alone: bool = False) -> Run:
    """Read one run, which may be the only one.

    Raises:
        ResultError: the folder holds no results, or files that are broken, incomplete or of another version.
    """
    if (folder / RESULT_NAME).is_file():
        reader = _Reader(folder)
        result = load_result(folder)
        reader.note(folder / RESULT_NAME)
        if isinstance(result, RoarResult):
            return Run(name, folder, roar=result, files=reader.files)
        return _evaluation_run(reader, name, result)
    if (folder / "grounding").is_dir():
        return _training_run(_Reader(folder), name, alone)
    if not folder.is_dir():
        raise ResultError(f"{folder} is not a folder; give those of finished runs")
    near = sorted(
        {found.parent for found in folder.glob(f"*/{RESULT_NAME}")} | {g.parent for g in folder.glob("*/grounding")}
    )
    near = near or sorted(found.parent for found in folder.glob("*/*/grounding"))
    hint = f"; did you mean {', '.join(map(str, near[:3]))}?" if near else ""
    raise ResultError(
        f"{folder} holds no results: expected {RESULT_NAME} (of `test` with AttributionEvaluation, or of `roar`) or "
        f"grounding/ (of `fit` with GroundingCallback){hint}"
    )


class _Reader:
    """Reads tables of a run, and keeps account of the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, int] = {}

    def note(self, path: Path) -> None:
        self.files[path] = path.stat().st_size

    def table(self, path: Path, columns: Sequence[str]) -> list[Row]:
        """The rows of a table that has to have these columns."""
        rows = read_csv(path)
        self.note(path)
        missing = [column for column in columns if rows and column not in rows[0]]
        if missing:
            raise ResultError(f"{path}: the columns {', '.join(missing)} are missing; evaluate again")
        return rows


def _evaluation_run(reader: _Reader, name: str, result: EvaluationResult) -> Run:
    groundings: list[Grounding] = []
    tables: dict[str, dict[str, list[Row]]] = {}
    examples: dict[str, list[ExampleRecord]] = {}
    missing: list[str] = []
    for label, method in result.methods.items():
        folder = reader.folder / label
        tables[label] = {}
        for metric in method.counts:
            path = folder / f"{metric}.csv"
            if metric not in TABLES or not path.is_file():
                missing.append(f"{label}: {metric} was measured, but its table {path} is not there.")
                continue
            rows = reader.table(path, TABLES[metric])
            if metric != "grounding":
                tables[label][metric] = rows
                continue
            first = rows[0]["seed"] if rows else ""
            own = _checked([row for row in rows if row["seed"] == first], path)
            fingerprint = result.data.get("fingerprint")
            groundings.append(
                Grounding(
                    run=name,
                    name=name,
                    label=label,
                    method=method.method,
                    options=method.options,
                    state="",
                    rows=own,
                    data=str(result.data.get("name") or "unnamed data"),
                    fingerprint=None if fingerprint is None else str(fingerprint),
                )
            )
        examples[label] = read_examples(folder)
        if (folder / "examples.json").is_file():
            reader.note(folder / "examples.json")
    return Run(
        name,
        reader.folder,
        evaluation=result,
        groundings=tuple(groundings),
        tables=tables,
        examples=examples,
        files=reader.files,
        missing=tuple(missing),
    )


def _training_run(reader: _Reader, name: str, alone: bool) -> Run:
    folder = reader.folder / "grounding"
    config, settings = _config(reader)
    summary: list[Mapping[str, Any]] = []
    for path in (folder / "summary.csv", folder / "summary-validate.csv", folder / "summary-test.csv"):
        if path.is_file():
            summary += [_measurement(row, path) for row in reader.table(path, ("epoch", "pairs"))]
    if not summary:
        raise ResultError(f"{folder}: no measurement; expected summary.csv, which GroundingCallback writes")
    groundings, missing = [], []
    for row in summary:
        epoch = row["epoch"]
        path = folder / f"pairs-{f'epoch={epoch:03d}' if isinstance(epoch, int) else epoch}.csv"
        if not path.is_file():
            missing.append(f"{epoch_name(epoch)}: the table of its phrases {path} is not there.")
            continue
        rows = _checked(reader.table(path, _GROUNDING), path)
        state, data = epoch_name(epoch), training_data(settings)
        shown = state if alone else f"{name}, {state}"
        groundings.append(Grounding(name, shown, FEATURE_PAIR, FEATURE_PAIR, {}, state, rows, data, None))
    picture = next(
        (p for n in ("progress.png", "progress-validate.png", "progress-test.png") if (p := folder / n).is_file()), None
    )
    if picture is not None:
        reader.note(picture)
    training = Training(tuple(summary), config, settings, picture)
    return Run(
        name,
        reader.folder,
        training=training,
        groundings=tuple(groundings),
        files=reader.files,
        missing=tuple(missing),
    )


def _config(reader: _Reader) -> tuple[str, dict[str, Any]]:
    """Lightning's config as text and as plain values; both empty where there is none."""
    path = reader.folder / "config.yaml"
    if not path.is_file():
        return "", {}
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ResultError(f"{path}: larger than {_LARGEST_CONFIG} bytes, which no config is; check the folder")
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise ResultError(f"{path}: no YAML that can be read ({error}); restore it, or delete it") from error
    reader.note(path)
    return text, settings if isinstance(settings, dict) else {}


def _checked(rows: Sequence[Row], path: Path) -> tuple[Row, ...]:
    """The rows of a table of grounding, where all that are measured have a gamma and a hit."""
    for number, row in enumerate(rows, start=1):
        if row["reason"] != MEASURED:
            continue
        try:
            gamma = float(row["gamma"])
        except ValueError:
            gamma = math.nan
        if not 0 <= gamma <= 1 or row["hit"] not in ("0", "1"):
            found = f"gamma {row['gamma']!r}, hit {row['hit']!r}"
            raise ResultError(
                f"{path}, row {number} is measured: expected gamma in [0, 1], hit 0 or 1; got {found}; evaluate again"
            )
    return tuple(rows)


def _measurement(row: Row, path: Path) -> dict[str, Any]:
    """A line of a summary with its numbers as numbers."""
    epoch: int | str = int(row["epoch"]) if row["epoch"].isdecimal() else row["epoch"]
    if not isinstance(epoch, int) and epoch not in ("validate", "test"):
        raise ResultError(f"{path}: expected an epoch, or validate or test; got {epoch!r}")
    try:
        numbers = {key: float(value) if value else math.nan for key, value in row.items() if key != "epoch"}
        return {"epoch": epoch, **numbers, "pairs": int(row["pairs"])}
    except ValueError as error:
        raise ResultError(f"{path}: a number cannot be read ({error}); measure again") from error


def _tail(folder: Path, depth: int) -> str:
    return Path(*folder.parts[-depth:]).as_posix()
