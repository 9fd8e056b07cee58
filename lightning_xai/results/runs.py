"""The runs that a report is about, as data; `run_folders` reads them.

A run is the folder of an evaluation or of ROAR+ (`results`), or that of a training with grounding measured in it, as
`GroundingCallback` writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_xai.results.schema import CONTROLS, EvaluationResult, ExampleRecord, RoarResult

__all__ = [
    "FEATURE_PAIR",
    "MEASURED",
    "Grounding",
    "Row",
    "Run",
    "Training",
    "by_data",
    "by_method_and_data",
    "model_name",
    "training_data",
]

FEATURE_PAIR = "feature_pair"
"""What training measures grounding with."""

Row = dict[str, str]

MEASURED = "measured"
"""The reason of a phrase that was."""


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

    @property
    def is_control(self) -> bool:
        """Whether the method knows nothing of the model."""
        return self.method in CONTROLS

    @cached_property
    def gammas(self) -> NDArray[np.float64]:
        """Of all measured phrases, in [0, 1]."""
        return np.array([float(row["gamma"]) for row in self.rows if row["reason"] == MEASURED], dtype=np.float64)

    @property
    def measured_classes(self) -> set[str]:
        """Names of the classes of which a phrase was measured."""
        return {row["label"] for row in self.rows if row["reason"] == MEASURED}

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


def by_method_and_data(groundings: Sequence[Grounding]) -> list[list[Grounding]]:
    """Those by the same method on the same data together."""
    labels = dict.fromkeys(each.label for each in groundings)
    return [group for label in labels for group in by_data(each for each in groundings if each.label == label)]


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
            return training_data(self.training.settings)
        result = self.evaluation or self.roar
        return str(result.data.get("name") or "unnamed data") if result is not None else ""

    def of_class(self, method: str | None = None) -> Grounding | None:
        """What tells about classes: by a method, or by feature pairs, or else the first; of a training the last."""
        found = [each for each in self.groundings if method is None or each.label == method]
        own = [each for each in found if each.label == FEATURE_PAIR]
        own = own or [each for each in found if method is not None or not each.is_control]
        if self.training is not None or not own:
            return own[-1] if own else None
        return own[0]


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


def training_data(settings: Mapping[str, Any]) -> str:
    """What the data set of a training is called, from Lightning's config."""
    given = _section(settings, "data")
    place = next((str(given[key]) for key in ("val", "root", "test") if given.get(key)), "")
    path = Path(place)
    return "/".join(path.parts[-2:]) if path.name in ("val", "test") else path.name or "unnamed data"


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The options of the model or the data in Lightning's config."""
    section = settings.get(name)
    given = section.get("init_args") if isinstance(section, Mapping) else None
    return given if isinstance(given, Mapping) else {}
