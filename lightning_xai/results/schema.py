"""Result files: what evaluations write and reports read, in one place, so that both sides always agree.

An evaluation's folder holds

- `result.json`: an `EvaluationResult` or a `RoarResult`, with kind and version of the schema;
- for each method of an evaluation a folder `LABEL/` with one table for each metric (`TABLES`), a line for each thing
  measured, and `classes.csv`;
- `LABEL/examples.json`: `ExampleRecord`s, whose images lie in `examples/`.

Numbers are fractions (never percent), losses in nats, similarities in [-1, 1]. Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning_xai.atomic_file import plain, write_json
from lightning_xai.results.labels import check_label, method_of
from lightning_xai.results.record import package_versions

__all__ = [
    "CONTROLS",
    "MODALITIES",
    "RESULT_NAME",
    "TABLES",
    "VERSION",
    "Estimate",
    "EvaluationResult",
    "ExampleRecord",
    "MethodResult",
    "ResultError",
    "RoarMethod",
    "RoarResult",
    "check_label",
    "load_result",
    "method_of",
    "package_versions",
    "read_examples",
    "write_examples",
    "write_json",
]

VERSION = 1
RESULT_NAME = "result.json"
EXAMPLES_NAME = "examples.json"
MODALITIES = ("image", "text")
CONTROLS = ("random", "gaussian")
"""Methods that know nothing of the model."""
_WHERE = ("seed", "index", "key", "caption_index", "caption")
_BOX = ("x0", "y0", "x1", "y1")
TABLES: dict[str, tuple[str, ...]] = {
    "grounding": (*_WHERE, "phrase", "label", "reason", "gamma", "hit", *_BOX),
    "other_objects": (*_WHERE, "phrase", "label", "other_label", "own", "other"),
    "hard_negatives": (*_WHERE, "negative_caption", "phrase", "replacement", "label", "positive", "negative", "delta"),
    "confidence": (*_WHERE, "similarity", "image_kept", "text_kept"),
    "localization": (*_WHERE, "boxes", "iou"),
}
"""Name of a metric -> the columns of its table `LABEL/METRIC.csv`.

`seed` is the method's, `index` the sample's place in its split. grounding: `reason` is "measured" or why not; gamma in
[0, 1], hit 0 or 1, both empty where not measured. other_objects: the phrase's total attribution to its own box and to
the other object's. hard_negatives: the attribution to the true object's box of the true phrase (positive) and of its
replacement (negative); delta is negative - positive. confidence: cosine similarity of the pair, and with only the
important part of the image (text) kept. localization: IoU of the binarised map with the union of `boxes` boxes.
"""
_R = TypeVar("_R", "EvaluationResult", "RoarResult")


class ResultError(ValueError):
    """A result file that cannot be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Estimate:
    """A number that was measured once for each seed.

    Attributes:
        values: one for each seed; NaN where nothing could be measured.

    >>> drop = Estimate((0.1, 0.2, 0.3))
    >>> round(drop.mean, 6), round(drop.standard_error, 6)
    (0.2, 0.057735)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN without any."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over seeds, s / sqrt(n) with s of n - 1 degrees; NaN below two seeds."""
        if len(self.values) < 2 or any(math.isnan(value) for value in self.values):
            return math.nan
        return statistics.stdev(self.values) / math.sqrt(len(self.values))


@dataclass(frozen=True)
class MethodResult:
    """What one method got in an evaluation.

    Attributes:
        method: its name.
        options: every option.
        signed: whether its maps tell for from against.
        seeds: one for each repetition.
        metrics: name -> one value for each seed. `gamma_mean`, `gamma_above_50`, `gamma_above_80`, `rho`;
            `own_positive`, `other_negative`; `delta_negative`, `delta_mean`; `image_drop`, `image_increase`,
            `text_drop`, `text_increase`; `localization_iou`: those that were measured.
        counts: what was measured and left out, by metric: `{"grounding": {"measured": 10, "several_instances": 2}}`,
            summed over the seeds.
    """

    method: str
    options: Mapping[str, Any]
    signed: bool
    seeds: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...]]
    counts: Mapping[str, Mapping[str, int]]

    def estimate(self, metric: str) -> Estimate:
        """A metric over seeds; without values where it was not measured."""
        return Estimate(tuple(self.metrics.get(metric, ())))


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation of one model on one split by several methods.

    Attributes:
        model: `name`, `pretrained`, `architecture`, `fingerprint` (of the weights), ...
        data: `name`, `folder`, `samples`, `captions`, ...
        settings: every option of the evaluation.
        versions: package -> version.
        methods: label -> what it got.
        speed: `pairs_per_second` and the like; says nothing about the model.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    methods: Mapping[str, MethodResult]
    speed: Mapping[str, float] = field(default_factory=dict)
    kind: str = "evaluation"
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write `folder/result.json`."""
        _save(self, folder)

    @classmethod
    def load(cls, folder: Path) -> EvaluationResult:
        """Read `folder/result.json`.

        Raises:
            ResultError: it is missing, broken, of another kind or of another version.
        """
        return _load(cls, folder)


@dataclass(frozen=True)
class RoarMethod:
    """The losses after retraining on data that a method degraded.

    Attributes:
        method: its name.
        options: every option.
        losses: modality (`"image"`, `"text"`) -> seed -> validation loss l_c on the original data.
    """

    method: str
    options: Mapping[str, Any]
    losses: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class RoarResult:
    """ROAR+ of several methods (M2IB paper, section 4.4).

    Attributes:
        model: as for `EvaluationResult`.
        data: as for `EvaluationResult`.
        settings: every option of the retraining.
        versions: package -> version.
        original: seed -> validation loss l_o after retraining on the original data.
        methods: label -> losses.
        missing: cells that have not been run yet, as `"LABEL/MODALITY/SEED"`.
        grid: option -> values, where the methods are the points of a grid; else empty.
        base_loss: validation loss of the base model before any retraining.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    original: Mapping[int, float]
    methods: Mapping[str, RoarMethod]
    missing: tuple[str, ...] = ()
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    base_loss: float = math.nan
    kind: str = "roar"
    version: int = VERSION

    def score(self, label: str, modality: str) -> Estimate:
        """(l_c - l_o) / l_o for each seed of which both losses are there, a fraction; higher is better.

        NaN where retraining diverged, or left no loss to compare with.

        Raises:
            KeyError: there is no such method.
        """
        losses = self.methods[label].losses.get(modality, {})
        pairs = [(losses[seed], self.original[seed]) for seed in sorted(losses.keys() & self.original.keys())]
        return Estimate(tuple((degraded - loss) / loss if loss else math.nan for degraded, loss in pairs))

    def label_at(self, point: Mapping[str, Any]) -> str | None:
        """The label of the first method with these options, compared as values: 1 is 1.0; None where there is none.

        >>> methods = {"m2ib,beta=1": RoarMethod("m2ib", {"beta": 1.0, "steps": 10}, {})}
        >>> RoarResult({}, {}, {}, {}, {}, methods).label_at({"beta": 1})
        'm2ib,beta=1'
        """
        wanted = plain(point)
        for label, method in self.methods.items():
            if wanted.keys() <= method.options.keys() and plain({o: method.options[o] for o in wanted}) == wanted:
                return label
        return None

    def save(self, folder: Path) -> None:
        """Write `folder/result.json`."""
        _save(self, folder)

    @classmethod
    def load(cls, folder: Path) -> RoarResult:
        """Read `folder/result.json`.

        Raises:
            ResultError: it is missing, broken, of another kind or of another version.
        """
        return _load(cls, folder)


@dataclass(frozen=True)
class ExampleRecord:
    """A phrase whose heat map is worth a look.

    Attributes:
        why: of `"fixed"` (the first ones of the split, whatever the model), `"class"` (the first ones of each class)
            and `"failure"` (lowest gamma) those that apply.
        image: file name below the evaluation's folder.
        key: the sample's key.
        caption: the whole caption.
        phrase: the words that are explained.
        spans: their characters in the caption.
        label: class of the object.
        box: `(x0, y0, x1, y1)` in pixels of the image.
        gamma: in [0, 1]; NaN where the map has nothing positive.
        hit: whether the largest entry lies inside the box.
        heat: [h][w], the map at patch resolution.
    """

    why: tuple[str, ...]
    image: str
    key: str
    caption: str
    phrase: str
    spans: tuple[tuple[int, int], ...]
    label: str
    box: tuple[float, float, float, float]
    gamma: float
    hit: bool
    heat: tuple[tuple[float, ...], ...]


def load_result(folder: Path) -> EvaluationResult | RoarResult:
    """The result in a folder, of whichever kind it is.

    Raises:
        ResultError: there is none, or none that this release reads.
    """
    kind = _read(folder / RESULT_NAME).get("kind")
    return RoarResult.load(folder) if kind == "roar" else EvaluationResult.load(folder)


def write_examples(folder: Path, examples: Sequence[ExampleRecord]) -> None:
    """Write `folder/examples.json`."""
    write_json(folder / EXAMPLES_NAME, {"version": VERSION, "examples": [asdict(example) for example in examples]})


def read_examples(folder: Path) -> list[ExampleRecord]:
    """Read `folder/examples.json`; no examples where there is no such file.

    Raises:
        ResultError: the file is broken, of another version, or names an image outside of the evaluation's folder.
    """
    path = folder / EXAMPLES_NAME
    if not path.is_file():
        return []
    record = _read(path)
    _check_version(record, path)
    try:
        return [_example(item) for item in record["examples"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ResultError(f"{path}: field missing or of the wrong type ({error!r}); evaluate again") from error


def _example(item: Mapping[str, Any]) -> ExampleRecord:
    image = str(item["image"])
    # Windows takes backslashes and drives as well, and no system a NUL.
    if image.startswith("/") or ".." in image.split("/") or not set(image).isdisjoint("\\:\0"):
        raise ValueError(f"the image {image!r} lies outside of the evaluation's folder")
    x0, y0, x1, y1 = (float(value) for value in item["box"])
    return ExampleRecord(
        why=tuple(map(str, item["why"])),
        image=image,
        key=str(item["key"]),
        caption=str(item["caption"]),
        phrase=str(item["phrase"]),
        spans=tuple((int(start), int(end)) for start, end in item["spans"]),
        label=str(item["label"]),
        box=(x0, y0, x1, y1),
        gamma=_number(item["gamma"]),
        hit=bool(item["hit"]),
        heat=tuple(tuple(_number(value) for value in row) for row in item["heat"]),
    )


def _save(result: EvaluationResult | RoarResult, folder: Path) -> None:
    write_json(folder / RESULT_NAME, asdict(result))


def _load(cls: type[_R], folder: Path) -> _R:
    path = folder / RESULT_NAME
    record = _read(path)
    kind = "roar" if cls is RoarResult else "evaluation"
    if record.get("kind") != kind:
        raise ResultError(f"{path}: expected a result of kind {kind!r}, found {record.get('kind')!r}; check the path")
    _check_version(record, path)
    try:
        result: Any = _parse_roar(record) if cls is RoarResult else _parse_evaluation(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ResultError(f"{path}: field missing or of the wrong type ({error!r}); run it again") from error
    return result  # type: ignore[no-any-return]


def _parse_evaluation(record: Mapping[str, Any]) -> EvaluationResult:
    methods = {
        check_label(label): MethodResult(
            method=str(item["method"]),
            options=dict(item["options"]),
            signed=bool(item["signed"]),
            seeds=tuple(int(seed) for seed in item["seeds"]),
            metrics={name: tuple(_number(value) for value in values) for name, values in item["metrics"].items()},
            counts={
                name: {why: int(count) for why, count in counts.items()} for name, counts in item["counts"].items()
            },
        )
        for label, item in record["methods"].items()
    }
    return EvaluationResult(
        **_described(record), methods=methods, speed={key: _number(value) for key, value in record["speed"].items()}
    )


def _parse_roar(record: Mapping[str, Any]) -> RoarResult:
    methods = {
        check_label(label): RoarMethod(
            method=str(item["method"]),
            options=dict(item["options"]),
            losses={modality: _losses(losses) for modality, losses in item["losses"].items()},
        )
        for label, item in record["methods"].items()
    }
    return RoarResult(
        **_described(record),
        original=_losses(record["original"]),
        methods=methods,
        missing=tuple(map(str, record["missing"])),
        grid={option: tuple(values) for option, values in record["grid"].items()},
        base_loss=_number(record["base_loss"]),
    )


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(record[name]) for name in ("model", "data", "settings", "versions")}


def _losses(record: Mapping[str, Any]) -> dict[int, float]:
    return {int(seed): _number(loss) for seed, loss in record.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultError(
            f"{path}: not found; give the folder of a finished run (`test` of an AttributionEvaluation, or `roar`)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path}: broken JSON ({error}); run it again") from error
    if not isinstance(record, dict):
        raise ResultError(f"{path}: holds a {type(record).__name__}, expected an object; check the path")
    return record


def _check_version(record: Mapping[str, Any], path: Path) -> None:
    if record.get("version") != VERSION:
        raise ResultError(
            f"{path}: schema version {record.get('version')!r}, this release reads {VERSION}; evaluate again with this "
            "release, or read it with the release that wrote it"
        )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
