"""Description of a result folder: model, data, methods, metrics and settings, as `result.json`.

A result folder holds

- `result.json`: a `ResultRecord`;
- `values.csv` and `targets.csv`: the long table, see `table`;
- `METHOD/examples.json`: `Example`s of a method, whose images are in `examples/`.

`test` writes one such folder, `roar` writes one, and `GroundingCallback` writes one for each measurement, in
`RUN/grounding/epoch=003/`, or `step=00000040/` within an epoch. Nothing here needs torch.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from lightning_xai.atomic_file import read_json, write_json

__all__ = [
    "RESULT_NAME",
    "VERSION",
    "MethodRecord",
    "MetricRecord",
    "ResultError",
    "ResultRecord",
    "Score",
    "check_label",
    "layers_in_words",
    "method_of",
    "package_versions",
    "read_record",
    "settings_that_differ",
    "shown_label",
    "standard_error",
    "state_name",
    "write_record",
]

RESULT_NAME = "result.json"
VERSION = 2
Better = Literal["up", "down"]
T = TypeVar("T")
_LABEL = re.compile(r"[A-Za-z0-9_.,=+-]{1,120}")
_PACKAGES = ("lightning_xai", "torch", "open_clip_torch", "captum", "numpy")


class ResultError(ValueError):
    """A result file that cannot be used; the message names the file, what is wrong and what to do."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A number that sums up one measured value over its targets.

    The definition travels with the results, so that a report needs neither torch nor the package of a metric.

    Attributes:
        name: of the score: "gamma_above_50".
        value: the metric of the long table that it sums up: "gamma".
        reduce: how. mean: arithmetic mean; std: sample standard deviation; share_above, share_below: share of values
            above (below) `threshold`; count: number of values.
        threshold: of the shares.
        heading: of its column in tables, without unit and arrow: "γ > 0.5".
        better: whether a larger ("up") or a smaller ("down") score is better; None: neither.
        percent: whether it is a fraction that reports print in percent.
        bounds: smallest and largest value that there can be; None: any.
    """

    name: str
    value: str
    reduce: Literal["mean", "std", "share_above", "share_below", "count"] = "mean"
    threshold: float = 0.0
    heading: str
    better: Better | None = None
    percent: bool = False
    bounds: tuple[float, float] | None = None

    def of(self, values: Sequence[float]) -> float:
        """The score of some values; NaN without any (std: below two), except for counts.

        Sums are exact (`math.fsum`), so that the order of the values and the number of processes they come from do not
        change a bit.

        >>> Score(name="gamma_above_50", value="gamma", reduce="share_above", threshold=0.5, heading="").of([0.5, 0.75])
        0.5
        """
        if self.reduce == "count":
            return float(len(values))
        if not values:
            return math.nan
        if self.reduce == "share_above":
            return sum(value > self.threshold for value in values) / len(values)
        if self.reduce == "share_below":
            return sum(value < self.threshold for value in values) / len(values)
        mean = math.fsum(values) / len(values)
        if self.reduce == "mean":
            return mean
        if len(values) < 2:
            return math.nan
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


class MetricRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a metric for reports.

    Attributes:
        name: "grounding".
        title: of its table.
        note: what its numbers mean, in one or two sentences.
        values: the metrics of the long table that it writes: ("gamma", "rho").
        scores: how they are summed up.
        chart: how the values are drawn; None: not at all.
        options: every option and its value.
        knows_objects: whether it measures against where objects are, by box or mask, which is known apart from the
            model.
    """

    name: str
    title: str
    note: str
    values: tuple[str, ...]
    scores: tuple[Score, ...]
    chart: Literal["cumulative", "distribution", "bars"] | None = None
    options: dict[str, Any] = {}
    knows_objects: bool = False


class MethodRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A method that took part.

    Attributes:
        name: as in the registry of methods; its label in the table may be another one.
        options: every option and its value.
        signed: whether its maps distinguish for from against.
        baseline: whether it ignores the model, as random maps do.
        seeds: one for each repetition.
    """

    name: str
    options: dict[str, Any] = {}
    signed: bool = False
    baseline: bool = False
    seeds: tuple[int, ...] = (0,)


class _RoarExtra(msgspec.Struct):
    missing: list[str] = []
    grid: dict[str, list[Any]] = {}
    base_loss: float | None = None


class ResultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A result folder's description of itself.

    Attributes:
        kind: what wrote it: "training" (a measurement of `GroundingCallback`), "evaluation" or "roar".
        model: `name`, `pretrained`, `architecture`, `fingerprint` of the weights, ...
        data: `name`, `folder`, `fingerprint`, `samples`, ...
        settings: every option.
        versions: package -> version, those that add methods or metrics included.
        methods: label -> method.
        metrics: name -> metric.
        state: of a training: `epoch` (finished epochs, or "validate" or "test") and `step`; within an epoch also
            `batch`, how many of its batches were trained on.
        logged: what the module logged in the same evaluation, by name; None stands for NaN.
        speed: `pairs_per_second` and the like, of methods as `seconds_per_pair/LABEL`; no property of the model.
        extra: what one kind alone has: `missing` trials, `grid` and `base_loss` of a ROAR+.
        rows: of the table of values, so that one that was cut off is noticed.
        version: of this format.
    """

    kind: Literal["training", "evaluation", "roar"]
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    methods: dict[str, MethodRecord]
    metrics: dict[str, MetricRecord] = {}
    state: dict[str, int | str] = {}
    logged: dict[str, float | None] = {}
    speed: dict[str, float] = {}
    extra: dict[str, Any] = {}
    rows: int | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        for label in self.methods:
            check_label(label)  # names a folder
        for name, metric in self.metrics.items():
            names = [score.name for score in metric.scores]
            whole = names and len(set(names)) == len(names)
            if name != metric.name or not whole or any(score.value not in metric.values for score in metric.scores):
                raise ValueError(f"the metric {name!r} is {metric.name!r} with scores {names} of {metric.values}")
        if self.kind == "roar":
            msgspec.convert(self.extra, _RoarExtra)

    def shown(self, label: str) -> str:
        """A method's label as tables and pictures show it; see `shown_label`."""
        return shown_label(label, self.methods[label].options)

    @property
    def scores(self) -> dict[str, Score]:
        """Every score of every metric, by name."""
        return {score.name: score for metric in self.metrics.values() for score in metric.scores}


def write_record(folder: Path, record: ResultRecord) -> None:
    """Write `folder/result.json`; a reader sees the whole file or the one before it."""
    write_json(folder / RESULT_NAME, msgspec.to_builtins(record, enc_hook=str))


def read_record(folder: Path) -> ResultRecord:
    """Read `folder/result.json`.

    Raises:
        ResultError: it is missing, broken or of another version.
    """
    return read_file(folder / RESULT_NAME, ResultRecord)


class _Version(msgspec.Struct):
    version: int = 0


def read_file(path: Path, kind: type[T]) -> T:
    """Read a JSON file of the result format.

    Raises:
        ResultError: it is missing, broken or of another version.
    """
    try:
        found = read_json(path, _Version).version
        if found == VERSION:
            return read_json(path, kind)
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error}); give the folder of a finished run") from error
    except ValueError as error:
        raise ResultError(f"{path}: field missing or of the wrong type ({error}); run it again") from error
    raise ResultError(
        f"{path}: version {found} of the result format, this release reads {VERSION}; "
        "run the same command again in an empty folder to write it in the new format"
    )


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on, in this process."""
    return {"python": platform.python_version()} | {name: installed_version(name) for name in _PACKAGES}


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds, s / sqrt(n) with s of n - 1 degrees; NaN below two or with a NaN.

    >>> round(standard_error([0.1, 0.2, 0.3]), 6)
    0.057735
    """
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def settings_that_differ(was: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """Differences between two nested records of settings, as "training.lr was 1 and is 2".

    >>> settings_that_differ({"training": {"lr": 1, "epochs": 5}}, {"training": {"lr": 2, "epochs": 5}})
    ['training.lr was 1 and is 2']
    """
    found: list[str] = []
    for key in [*was, *(key for key in now if key not in was)]:
        name, old, new = f"{at}{key}", was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += settings_that_differ(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {old!r} and is {new!r}")
    return found


def check_label(label: str) -> str:
    """Return a method's label, which names a folder, or raise a ValueError.

    >>> check_label("m2ib,beta=0.1")
    'm2ib,beta=0.1'
    """
    if not _LABEL.fullmatch(label) or not label.strip("."):
        raise ValueError(f"a label has 1 to 120 letters, digits and characters of '_.,=+-'; got {label!r}")
    return label


def method_of(label: str, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Return a method's name and options, as settings give them under its label.

    The label is the method's name, unless `method` among the options says otherwise.

    >>> method_of("m2ib", None), method_of("tight", {"method": "m2ib", "beta": 1.0})
    (('m2ib', {}), ('m2ib', {'beta': 1.0}))
    """
    own = dict(options or {})
    check_label(label)
    return str(own.pop("method", label)), own


def shown_label(label: str, options: Mapping[str, Any]) -> str:
    """Return a method's label with the layers that its maps are of, since numbers at other layers are other numbers.

    >>> shown_label("feature_pair", {"image_layer": -1, "text_layer": 0}), shown_label("rise", {})
    ('feature_pair, layers last, 0', 'rise')
    >>> shown_label("feature_pair,0,0", {"image_layer": 0, "text_layer": 0}), shown_label("m2ib,layer=9", {"layer": 9})
    ('feature_pair, inputs', 'm2ib,layer=9')
    """
    words = layers_in_words(options)
    if not words or "layer=" in label:
        return label
    swept = f",{options.get('image_layer')},{options.get('text_layer')}"
    return f"{label.removesuffix(swept)}, {words}"


def layers_in_words(options: Mapping[str, Any]) -> str:
    """Name the layers that a method attributes to, by its options; empty where these name none.

    The image tower's layer comes first; one number is for both towers.

    >>> layers_in_words({"image_layer": -1, "text_layer": -1}), layers_in_words({"image_layer": 0, "text_layer": 0})
    ('last blocks', 'inputs')
    >>> layers_in_words({"image_layer": 1, "text_layer": -1}), layers_in_words({"layer": [9, None]})
    ('layers 1, last', 'layers 9, default')
    >>> layers_in_words({"layer": 9}), layers_in_words({"start_layer": 2}), layers_in_words({"layer": None})
    ('layer 9', 'from layer 2', '')
    """
    for names in (("image_layer", "text_layer"), ("layer",), ("start_layer",)):
        given = [options.get(name) for name in names]
        if given != [None] * len(names):
            found = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
            words = ["default" if each is None else "last" if each == -1 else str(each) for each in found]
            if len(names) > 1 and given in ([-1, -1], [0, 0]):
                return "inputs" if given == [0, 0] else "last blocks"
            start = "from " if names == ("start_layer",) else ""
            return f"{start}layer{'s' if len(words) > 1 else ''} {', '.join(words)}"
    return ""


def state_name(state: Mapping[str, Any]) -> str:
    """Return the name of a model's state, as `ResultRecord.state` describes it; empty where nothing does.

    >>> state_name({"epoch": 0, "step": 0}), state_name({"epoch": 3, "step": 36}), state_name({"epoch": "validate"})
    ('before', 'epoch 3', 'validate')
    >>> state_name({"epoch": 3, "step": 40, "batch": 4})
    'step 40'
    """
    epoch = state.get("epoch", "")
    if isinstance(epoch, str):
        return epoch
    if state.get("batch"):
        return f"step {state['step']}"
    return "before" if epoch == 0 else f"epoch {epoch}"
