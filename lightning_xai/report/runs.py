"""The runs that a report is about: what lies in their folders, read once, with names that tell them apart.

A run is the folder of an evaluation or of ROAR+ (`results`), or that of a training with grounding measured in it, as
`GroundingCallback` writes it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from lightning_xai.report.results import (
    RESULT_NAME,
    TABLES,
    EvaluationResult,
    ExampleRecord,
    ResultError,
    RoarResult,
    load_result,
    read_examples,
)
from lightning_xai.report.tables import epoch_name, read_csv

__all__ = ["CONTROLS", "FEATURE_PAIR", "Grounding", "Run", "Training", "by_data", "load_runs"]

CONTROLS = ("random", "gaussian")
"""Methods that know nothing of the model."""
FEATURE_PAIR = "feature_pair"
"""What training measures grounding with."""

Row = dict[str, str]

_LARGEST_CONFIG = 2**20
_GROUNDING = ("key", "caption_index", "caption", "phrase", "label", "reason", "gamma", "hit")


@dataclass(frozen=True, eq=False)  # each is itself; tables are long to compare
class Grounding:
    """The grounding of one model, in one state, by one method on one data set.

    Attributes:
        run: name of the run.
        name: tells it apart from the other groundings by the same method: the run, the state, or both.
        label: of the method.
        method: its name.
        options: its options, where they are known.
        state: of a training: "before", "epoch 3", "validate", ...; empty for an evaluation.
        rows: one for each phrase, measured or not; of the first seed.
        data: name of the data set.
        fingerprint: of the data set, where it is known.
        file: where the rows were read.
    """

    run: str
    name: str
    label: str
    method: str
    options: Mapping[str, Any]
    state: str
    rows: tuple[Row, ...]
    data: str
    fingerprint: str | None
    file: Path

    @property
    def is_control(self) -> bool:
        """Whether the method knows nothing of the model."""
        return self.method in CONTROLS

    @cached_property
    def gammas(self) -> NDArray[np.float64]:
        """Of all measured phrases.

        Raises:
            ResultError: one of them is no number in [0, 1].
        """
        texts = [row["gamma"] for row in self.rows if row["reason"] == "measured"]
        try:
            gammas = np.array([float(text) for text in texts], dtype=np.float64)
        except ValueError as error:
            raise ResultError(f"{self.file}: gamma is not a number ({error}); evaluate again") from error
        if not ((gammas >= 0) & (gammas <= 1)).all():
            raise ResultError(f"{self.file}: expected gamma in [0, 1] where measured; evaluate again")
        return gammas

    @cached_property
    def phrases(self) -> str:
        """A digest of which phrases were asked for, measured or not."""
        asked = sorted(
            "\x1f".join((row["key"], row["caption_index"], row["phrase"], row["label"])) for row in self.rows
        )
        return hashlib.sha256("\x1e".join(asked).encode("utf-8", "surrogatepass")).hexdigest()

    def same_data(self, other: Grounding) -> bool:
        """Whether both were asked for the same phrases, and nothing says that their data differ."""
        known = {each.fingerprint for each in (self, other) if each.fingerprint is not None}
        return self.phrases == other.phrases and len(known) < 2


def by_data(groundings: Iterable[Grounding]) -> list[list[Grounding]]:
    """Those on the same data together, in order of first appearance."""
    groups: list[list[Grounding]] = []
    for each in groundings:
        group = next((group for group in groups if all(each.same_data(other) for other in group)), None)
        if group is None:
            groups.append([each])
        else:
            group.append(each)
    return groups


@dataclass(frozen=True)
class Training:
    """What a training run wrote of its grounding.

    Attributes:
        summary: one row for each measurement, as `tables.grounding_table` takes it.
        config: Lightning's config.yaml as text; empty where there is none.
        settings: the same as plain values.
        picture: the sheet of heat maps; None where there is none.
    """

    summary: tuple[Mapping[str, Any], ...]
    config: str
    settings: Mapping[str, Any]
    picture: Path | None


@dataclass(frozen=True)
class Run:
    """A folder of results.

    Attributes:
        name: tells it apart from the other runs of the report.
        folder: where it lies.
        evaluation: what it measured of explanations, where it did.
        roar: its ROAR+, where there is one.
        training: its training, where there is one.
        groundings: of the evaluation's methods, or of the training's measurements.
        tables: label -> metric -> rows of all seeds, of the other metrics of an evaluation.
        examples: label -> examples with heat maps.
        files: every file that was read, and its size in bytes.
        missing: what should be there and is not, in sentences.
    """

    name: str
    folder: Path
    evaluation: EvaluationResult | None = None
    roar: RoarResult | None = None
    training: Training | None = None
    groundings: tuple[Grounding, ...] = ()
    tables: Mapping[str, Mapping[str, Sequence[Row]]] = field(default_factory=dict)
    examples: Mapping[str, Sequence[ExampleRecord]] = field(default_factory=dict)
    files: Mapping[Path, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """What the model is called, as far as the results say."""
        if self.training is not None:
            given = _section(self.training.settings, "model")
            return model_name({**given, "name": given.get("model")})
        result = self.evaluation or self.roar
        return model_name(result.model) if result is not None else ""

    @property
    def data(self) -> str:
        """What the data set is called, as far as the results say."""
        if self.training is not None:
            return _training_data(self.training.settings)
        result = self.evaluation or self.roar
        return str(result.data.get("name") or "unnamed data") if result is not None else ""

    def of_class(self, method: str | None = None) -> Grounding | None:
        """What tells about classes: by a method, or by feature pairs, or else the first; of a training the last."""
        found = [each for each in self.groundings if method is None or each.label == method]
        own = [each for each in found if each.label == FEATURE_PAIR] or [each for each in found if not each.is_control]
        if self.training is not None or not own:
            return own[-1] if own else None
        return own[0]


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


def model_name(model: Mapping[str, Any]) -> str:
    """A short name of a model from what a result says of it.

    >>> model_name({"name": "ViT-B-16", "pretrained": "openai"})
    'ViT-B-16, openai'
    >>> model_name({"name": "runs/demo/best-grounding.ckpt", "pretrained": None, "architecture": "shapes_vit"})
    'shapes_vit, best-grounding.ckpt'
    """
    name = str(model.get("name") or "unnamed model")
    is_file = name.endswith((".ckpt", ".json"))
    short = Path(name).name if is_file else name
    if name.endswith(".ckpt") and model.get("architecture"):
        short = f"{model['architecture']}, {short}"
    pretrained = model.get("pretrained")
    return f"{short}, {Path(str(pretrained)).name}" if pretrained else short


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
            own = tuple(row for row in rows if row["seed"] == first)
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
                    file=path,
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
        rows = tuple(reader.table(path, _GROUNDING))
        state, data = epoch_name(epoch), _training_data(settings)
        shown = state if alone else f"{name}, {state}"
        groundings.append(Grounding(name, shown, FEATURE_PAIR, FEATURE_PAIR, {}, state, rows, data, None, path))
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


def _training_data(settings: Mapping[str, Any]) -> str:
    given = _section(settings, "data")
    place = next((str(given[key]) for key in ("val", "root", "test") if given.get(key)), "")
    path = Path(place)
    return "/".join(path.parts[-2:]) if path.name in ("val", "test") else path.name or "unnamed data"


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The options of the model or the data in Lightning's config."""
    section = settings.get(name)
    given = section.get("init_args") if isinstance(section, Mapping) else None
    return given if isinstance(given, Mapping) else {}


def _tail(folder: Path, depth: int) -> str:
    return "/".join(folder.parts[-depth:])
