"""The runs that a report is about: reads folders of results, each file once, with names that distinguish the runs.

A run is the folder of an evaluation or of ROAR+, which is a result folder, or that of a training, in whose `grounding/`
`GroundingCallback` writes a result folder for each measurement. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import pandas as pd
import yaml  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from lightning_xai.atomic_file import read_json
from lightning_xai.results.examples import EXAMPLES_NAME, ExampleRecord, read_examples
from lightning_xai.results.record import (
    RESULT_NAME,
    MethodRecord,
    MetricRecord,
    ResultError,
    ResultRecord,
    standard_error,
    state_name,
)
from lightning_xai.results.roar import roar_result
from lightning_xai.results.table import TARGETS_NAME, VALUES_NAME, ResultTable, read_result, score_table

__all__ = [
    "FEATURE_PAIR",
    "GROUNDING",
    "Estimate",
    "Grounding",
    "Measurement",
    "Run",
    "by_data",
    "by_method_and_data",
    "load_runs",
]

FEATURE_PAIR = "feature_pair"
"""The method that training measures grounding with, and that speaks for a run where it took part."""
GROUNDING = "grounding"
"""The metric whose distributions and classes are compared."""
_LARGEST_CONFIG = 2**20
_PICTURES = ("progress.png", "progress-validate.png", "progress-test.png")

Choice = Literal["best", "last"]
Measured = TypeVar("Measured", bound="Measurement")


@dataclass(frozen=True)
class Estimate:
    """A score that was measured once for each seed.

    Attributes:
        mean: over seeds; NaN without any.
        error: standard error of the mean; NaN below two seeds.
        count: measured values of the first seed.
    """

    mean: float
    error: float
    count: int


@dataclass(frozen=True, eq=False)  # each is itself; tables are long to compare
class Measurement:
    """A result folder: of an evaluation, of ROAR+, or of one state of a training.

    Attributes:
        run: name of the run.
        state: of a training: "before", "epoch 3", "step 40", "validate", ...; else empty.
        record: what the folder says of itself.
        table: its values.
        data: name of the data set.
    """

    run: str
    state: str
    record: ResultRecord
    table: ResultTable
    data: str

    @property
    def full_name(self) -> str:
        """The run, and the state where it has one."""
        return ", ".join(filter(None, (self.run, self.state)))

    def estimates(self, metric: str) -> dict[str, dict[str, Estimate]]:
        """Label -> score -> estimate over seeds, in the order of the record; only what has rows."""
        described = self.record.metrics.get(metric)
        if described is None:
            return {}
        values = self.table.values
        table = score_table(values[values["metric"].isin(described.values)], described.scores)
        found: dict[str, dict[str, Estimate]] = {label: {} for label in self.record.methods}
        for (label, score), part in table.groupby(["method", "score"], sort=False):
            own = part["value"].tolist()
            if label in found:
                found[label][score] = Estimate(statistics.fmean(own), standard_error(own), int(part["count"].iloc[0]))
        return {label: scores for label, scores in found.items() if scores}

    def first_seed(self, label: str, values: Iterable[str]) -> pd.DataFrame:
        """The rows of a method's first seed, of some metrics of the long table, with the columns of their targets."""
        frame = self.table.frame
        own = frame[(frame["method"] == label) & frame["metric"].isin(tuple(values))]
        return own[own["seed"] == own["seed"].min()]

    def sample(self, label: str, value: str) -> NDArray[np.float64]:
        """One of the metrics of the long table, where it was measured, of a method's first seed."""
        rows = self.first_seed(label, [value])
        return np.asarray(rows.loc[rows["excluded"] == "", "value"], dtype=np.float64)

    def same_data(self, other: Measurement, metric: str) -> bool:
        """True if both have the same targets of a metric, measured or not, and nothing says that their data differ."""
        known = {each.record.data.get("fingerprint") for each in (self, other)} - {None}
        asked = {_asked(each.table, each.record.metrics[metric].values) for each in (self, other)}
        return len(known) < 2 and len(asked) == 1


@lru_cache(maxsize=64)
def _asked(table: ResultTable, values: tuple[str, ...]) -> str:
    """A digest of the targets that some metrics of the long table were asked for."""
    names = table.values.loc[table.values["metric"].isin(values), "target"].unique()
    targets = table.targets[table.targets["target"].isin(names)]
    columns = [name for name in ("kind", "key", "caption_index", "phrase", "label") if name in targets]
    lines = sorted(map("\x1f".join, targets[columns].astype(str).to_numpy().tolist()))
    return hashlib.sha256("\x1e".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, eq=False)
class Grounding(Measurement):
    """The grounding of one model, in one state, by one method on one data set.

    Attributes:
        name: distinguishes it from the other groundings by the same method: the run, the state, or both.
        label: of the method.
    """

    name: str
    label: str

    @property
    def method(self) -> MethodRecord:
        """The method."""
        return self.record.methods[self.label]

    @property
    def shown_label(self) -> str:
        """The method with the layers that its maps are of."""
        return self.record.shown(self.label)

    @property
    def metric(self) -> MetricRecord:
        """The metric of grounding."""
        return self.record.metrics[GROUNDING]

    @property
    def value(self) -> str:
        """The value whose distribution is compared, the first that the metric sums up: "gamma"."""
        return self.metric.scores[0].value

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The values of the first seed, with the columns of their targets."""
        return self.first_seed(self.label, self.metric.values)

    @cached_property
    def gammas(self) -> NDArray[np.float64]:
        """`value` of all phrases that have it."""
        return self.sample(self.label, self.value)


@dataclass(frozen=True, eq=False)
class Run:
    """A folder of results.

    Attributes:
        name: distinguishes it from the other runs of the report.
        folder: its path.
        model: a short name of the model.
        measurements: one, or one for each state of a training, in their order.
        config: Lightning's config.yaml of a training as text; empty where there is none.
        picture: a training's sheet of heat maps; None where there is none.
        examples: label -> examples with heat maps.
        files: every file that was read, and its size in bytes.
        alone: whether it is the only run.
        method: label of the method that ranks classes; None: feature pairs, or else the first.
        best: of a training that is finished and keeps its best model: its `step`, `monitor` and `score`.
        choice: which state of a training ranks classes: its best model where it was measured, or the last one.
    """

    name: str
    folder: Path
    model: str
    measurements: tuple[Measurement, ...]
    config: str = ""
    picture: Path | None = None
    examples: Mapping[str, Sequence[ExampleRecord]] = field(default_factory=dict)
    files: Mapping[Path, int] = field(default_factory=dict)
    alone: bool = False
    method: str | None = None
    best: Mapping[str, Any] | None = None
    choice: Choice = "best"

    @property
    def record(self) -> ResultRecord:
        """Record of the latest measurement."""
        return self.measurements[-1].record

    @property
    def methods(self) -> list[str]:
        """Its methods with the layers that their maps are of."""
        return list(map(self.record.shown, self.record.methods))

    @property
    def is_training(self) -> bool:
        """True for a training."""
        return self.record.kind == "training"

    @property
    def data(self) -> str:
        """The name of the data set."""
        return self.measurements[-1].data

    @cached_property
    def groundings(self) -> tuple[Grounding, ...]:
        """Of the methods of an evaluation, or of the states of a training."""
        found = []
        for each in self.measurements:
            shown = each.state if self.alone and each.state else each.full_name
            values = each.record.metrics[GROUNDING].values if GROUNDING in each.record.metrics else ()
            there = set(each.table.values.loc[each.table.values["metric"].isin(values), "method"])
            about = (each.run, each.state, each.record, each.table, each.data)
            found += [Grounding(*about, shown, label) for label in each.record.methods if label in there]
        return tuple(found)

    @cached_property
    def shown(self) -> Grounding | None:
        """The grounding that ranks classes; of a training that of its best model, or else the last one."""
        own = [each for each in self.groundings if each.label == (self.method or FEATURE_PAIR)]
        if self.method is None:
            own = own or [each for each in self.groundings if not each.method.baseline]
        if not own or not self.is_training:
            return own[0] if own else None
        step = self.best["step"] if self.best and self.choice == "best" else None
        states = (each for each in own if isinstance(each.record.state.get("epoch"), int))
        return next((each for each in states if each.record.state.get("step") == step), own[-1])

    @property
    def shown_model(self) -> str:
        """Which model of a training ranks classes, in one line; empty for others."""
        if not self.is_training or self.shown is None:
            return ""
        if self.best and self.shown.record.state.get("step") == self.best["step"] and self.choice == "best":
            why = f"the run's best by {self.best['monitor']} ({self.best['score']:.4f}, after step {self.best['step']})"
        else:
            why = "the last state that was measured"
        return f"{self.shown.state}, {why}"


def by_data(measurements: Iterable[Measured], metric: str) -> list[list[Measured]]:
    """Those that asked a metric for the same targets together, in order of first appearance."""
    groups: list[list[Measured]] = []
    for each in measurements:
        group = next((group for group in groups if all(each.same_data(other, metric) for other in group)), None)
        if group is None:
            groups.append([each])
        else:
            group.append(each)
    return groups


def by_method_and_data(groundings: Sequence[Grounding]) -> list[list[Grounding]]:
    """Those by the same method, at the same layers, on the same data together."""
    labels = dict.fromkeys(each.shown_label for each in groundings)
    of_label = ([each for each in groundings if each.shown_label == label] for label in labels)
    return [group for own in of_label for group in by_data(own, GROUNDING)]


def model_name(model: Mapping[str, Any]) -> str:
    """A short name of a model from what a result says of it.

    >>> model_name({"name": "ViT-B-16", "pretrained": "openai"})
    'ViT-B-16, openai'
    >>> model_name({"name": "runs/demo/best-grounding.ckpt", "pretrained": None, "architecture": "shapes_vit"})
    'shapes_vit, best-grounding.ckpt'
    """
    name = str(model.get("name") or model.get("architecture") or "unnamed model")
    is_file = name.endswith((".ckpt", ".json"))
    short = Path(name).name if is_file else name
    if name.endswith(".ckpt") and model.get("architecture"):
        short = f"{model['architecture']}, {short}"
    pretrained = model.get("pretrained")
    return f"{short}, {Path(str(pretrained)).name}" if pretrained else short


def load_runs(
    folders: Sequence[Path], names: Sequence[str] = (), method: str | None = None, choice: Choice = "best"
) -> list[Run]:
    """Read the runs of these folders.

    Args:
        folders: at least one; none twice.
        names: one for each folder; without any, each is called by as much of its path as distinguishes it.
        method: label of the method that ranks classes; None: feature pairs, or else the first.
        choice: which state of a training ranks classes, see `Run`.

    Raises:
        ResultError: a folder holds no results, or files that are broken, incomplete or of another version.
        ValueError: no folder, one twice, other names than one different name for each, or none has the method.
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
    runs = [_load_run(folder, name, alone=len(folders) == 1, method=method, choice=choice) for folder, name in named]
    labels = {grounding.label for run in runs for grounding in run.groundings}
    if method is not None and method not in labels:
        raise ValueError(f"--method {method}: none of the runs has it; they have {', '.join(sorted(labels))}")
    return runs


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as distinguish them; `version_0` alone says nothing.

    >>> distinct_names([Path("/a/x/one"), Path("/b/y/one"), Path("/b/two"), Path("/runs/demo/version_0")])
    ['x/one', 'y/one', 'two', 'demo/version_0']
    """
    depths = [2 if re.fullmatch(r"version_\d+", folder.name) else 1 for folder in folders]
    while True:
        names = [Path(*folder.parts[-depth:]).as_posix() for folder, depth in zip(folders, depths, strict=True)]
        counts = Counter(names)
        again = [i for i, name in enumerate(names) if counts[name] > 1 and depths[i] < len(folders[i].parts)]
        if not again:
            return names
        for i in again:
            depths[i] += 1


def _load_run(folder: Path, name: str, **about: Any) -> Run:
    is_training = not (folder / RESULT_NAME).is_file()
    places = _states(folder) if is_training else [folder]
    config, settings = _config(folder) if is_training else ("", {})
    measurements = sorted((_measurement(place, name, settings) for place in places), key=_order)
    methods = () if is_training else measurements[0].record.methods
    pictures = [folder / "grounding" / each for each in _PICTURES]
    picture = next((path for path in pictures if is_training and path.is_file()), None)
    read = [place / each for place in places for each in (RESULT_NAME, VALUES_NAME, TARGETS_NAME)]
    read += [folder / label / EXAMPLES_NAME for label in methods]
    read += [
        path for path in (folder / "config.yaml", folder / "run.json", picture) if is_training and path is not None
    ]
    # The callback knows the architecture only: any module may use it. The command line's config says the rest.
    given = _options(settings, "model")
    model = {**given, "name": given["model"]} if given.get("model") else measurements[-1].record.model
    if measured := measurements[-1].record.model.get("checkpoint"):  # `test` of a run, which is about that file
        model = {"name": measured["path"], "architecture": measurements[-1].record.model.get("architecture")}
    return Run(
        name,
        folder,
        model_name(model),
        tuple(measurements),
        config=config,
        picture=picture,
        examples={label: read_examples(folder / label) for label in methods},
        files={path: path.stat().st_size for path in read if path.is_file()},
        best=_best(folder) if is_training else None,
        **about,
    )


class _Trained(msgspec.Struct):
    """What a training's own record says of its best model."""

    best: dict[str, Any] | None = None


def _best(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "run.json"
    try:
        best = read_json(path, _Trained).best
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read ({error}); restore it, or delete it") from error
    return best if best and {"step", "monitor", "score"} <= best.keys() else None


def _states(folder: Path) -> list[Path]:
    """The folders of a training's measurements."""
    root = folder / "grounding"
    if not folder.is_dir():
        raise ResultError(f"{folder} is not a folder; give those of finished runs")
    if not root.is_dir():
        results = [*folder.glob(f"*/{RESULT_NAME}"), *folder.glob("*/grounding")] or folder.glob("*/*/grounding")
        near = sorted({found.parent for found in results})
        hint = f"; did you mean {', '.join(map(str, near[:3]))}?" if near else ""
        raise ResultError(
            f"{folder} holds no results: expected {RESULT_NAME} (of `test` with AttributionEvaluation, or of `roar`) "
            f"or grounding/ (of `fit` with GroundingCallback){hint}"
        )
    found = sorted(path for path in root.iterdir() if (path / RESULT_NAME).is_file())
    if not found:
        old = any(root.glob("pairs-*.csv")) or (root / "summary.csv").is_file()
        raise ResultError(
            f"{root}: version 1 of the result format, this release reads a folder for each epoch; run `fit` or "
            "`validate` again to write it in the new format"
            if old
            else f"{root}: no measurement; expected epoch=000/{RESULT_NAME}, which GroundingCallback writes"
        )
    return found


def _order(measurement: Measurement) -> tuple[bool, int, int]:
    """A training's steps in their order, then validate, then test."""
    state = measurement.record.state
    epoch = state.get("epoch", "")
    if isinstance(epoch, int):
        return (False, epoch, int(state.get("batch", 0)))
    return (True, 0, int(epoch == "test"))


def _measurement(folder: Path, run: str, settings: Mapping[str, Any]) -> Measurement:
    record, table = read_result(folder)
    if record.kind == "roar":
        record, table = roar_result(record, table)
    data = str(record.data.get("name") or training_data(settings))
    return Measurement(run, state_name(record.state), record, table, data)


def _config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Lightning's config as text and as plain values; both empty where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return "", {}
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ResultError(f"{path}: larger than {_LARGEST_CONFIG} bytes, which no config is; check the folder")
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise ResultError(f"{path}: no YAML that can be read ({error}); restore it, or delete it") from error
    return text, settings if isinstance(settings, dict) else {}


def training_data(settings: Mapping[str, Any]) -> str:
    """The name of a training's data set, from Lightning's config."""
    given = _options(settings, "data")
    path = Path(next((str(given[key]) for key in ("val", "root", "test") if given.get(key)), ""))
    return "/".join(path.parts[-2:]) if path.name in ("val", "test") else path.name or "unnamed data"


def _options(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The options of the model or the data in Lightning's config."""
    section = settings.get(name)
    given = section.get("init_args") if isinstance(section, Mapping) else None
    return given if isinstance(given, Mapping) else {}
