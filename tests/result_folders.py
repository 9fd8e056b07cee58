"""Folders of results as evaluations, ROAR+ and trainings write them, made up but of plausible numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.metrics import METRICS as SPECS
from lightning_xai.results.examples import ExampleRecord, write_examples
from lightning_xai.results.record import MethodRecord, ResultRecord
from lightning_xai.results.roar import LOSS, ORIGINAL
from lightning_xai.results.table import ResultTable, read_result, write_result

CLASSES = ("circle", "cross", "diamond", "heart", "ring", "square", "star", "triangle")
BASELINES = ("random", "gaussian")
SIGNED = ("feature_pair", "kernel_shap", "integrated_gradients")
SKILLS = {"feature_pair": 0.3, "m2ib": 0.5, "random": 0.1}


METRICS = {name: SPECS[name].record({}) for name in ("grounding", "hard_negatives", "confidence")}


def target(kind: str, index: int, ordinal: int, label: str, **more: Any) -> dict[str, Any]:
    """A target of the long table: an image of two classes has two phrases."""
    name = f"{kind}/{index}/{ordinal}"
    row = {"target": name, "kind": kind, "index": index, "ordinal": ordinal, "key": f"val_{index:04d}"}
    return row | {"caption_index": 0, "caption": f"image {index} of a {label}", "label": label, **more}


def made_table(
    skills: Mapping[str, float],
    metrics: Sequence[str] = tuple(METRICS),
    *,
    seeds: int = 1,
    images: int = 60,
    labels: Sequence[str] = CLASSES,
) -> ResultTable:
    """Two phrases of each image; every ninth was not measured. The more skill in (0, 1), the higher gamma."""
    rows, targets = [], []
    for index in range(images):
        pair = (labels[index % len(labels)], labels[(index * 3 + 1) % len(labels)])
        targets += [target("phrase", index, i, label, phrase=f"a {label}") for i, label in enumerate(pair)]
        targets += [target(kind, index, 0, pair[0]) for kind in ("negative", "caption")]
    for method, skill in skills.items():
        for seed in range(seeds if method == "m2ib" else 1):
            draw = np.random.default_rng([seed, len(method)])
            for each in targets:
                kind, place = each["kind"], each["index"] * 2 + each["ordinal"]
                ease = skill * (0.6 + 0.4 * labels.index(each["label"]) / len(labels))
                value = float(np.clip(draw.normal(ease, 0.15), 0, 1))
                values: dict[str, float] = {}
                why = "not_mentioned" if kind == "phrase" and place % 9 == 0 else ""
                if kind == "phrase" and "grounding" in metrics:
                    values = {"gamma": value, "rho": float(value > 0.4)}
                    if "mask_grounding" in metrics:
                        fill = 0.4 + 0.05 * labels.index(each["label"])
                        values |= {"gamma_mask": value * fill, "rho_mask": float(value > 0.6), "mask_fill": fill}
                elif kind == "negative" and "hard_negatives" in metrics and method in SIGNED:
                    values = {"positive": value, "negative": value / 2, "delta": float(draw.normal(-skill, 1)) / 10}
                elif kind == "caption" and "confidence" in metrics:
                    values = {"image_drop": 1 - value, "text_increase": float(value > 0.3)}
                rows += [
                    (method, seed, each["target"], name, float("nan") if why else found, why)
                    for name, found in values.items()
                ]
    used = {row[2] for row in rows}
    return ResultTable.of(rows, [each for each in targets if each["target"] in used])


def methods_of(labels: Sequence[str], **options: Any) -> dict[str, MethodRecord]:
    return {
        label: MethodRecord(name=label, options=options, signed=label in SIGNED, baseline=label in BASELINES)
        for label in labels
    }


def write_evaluation(
    folder: Path,
    skills: Mapping[str, float],
    *,
    name: str = "shapes",
    fingerprint: str | None = "1",
    examples: bool = True,
    options: Mapping[str, Any] | None = None,
    speed: Mapping[str, float] | None = None,
    **table: Any,
) -> ResultRecord:
    """Write an evaluation; m2ib has as many seeds as are asked for."""
    record = ResultRecord(
        kind="evaluation",
        model={"name": "ViT-B-16", "pretrained": "openai"},
        data={"name": name, "fingerprint": fingerprint},
        settings={"batch_size": 4},
        versions={"torch": "2.6.0"},
        methods=methods_of(list(skills), **(options or {})),
        metrics=METRICS,
        speed=dict(speed or {}),
    )
    write_result(folder, record, made_table(skills, **table))
    if examples:
        put_examples(folder, skills)
    return record


def put_examples(folder: Path, labels: Sequence[str] | Mapping[str, float]) -> None:
    """Examples of each class and three failures of each method, with their images."""
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for place in range(len(CLASSES)):
        pixels: NDArray[Any] = draw.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "examples" / f"{place}.png")
    for method in labels:
        found = [
            ExampleRecord(
                why=("fixed", "class") if place < 3 else ("class", "failure"),
                image=f"examples/{place}.png",
                key=f"val_{place:04d}",
                caption=f"a {label} and more",
                phrase=f"a {label}",
                spans=((0, 2 + len(label)),),
                label=label,
                box=(4.0, 4.0, 24.0, 24.0),
                gamma=place / 10,
                hit=place % 2 == 0,
                heat=tuple(map(tuple, draw.normal(size=(4, 4)).tolist())),
            )
            for place, label in enumerate(CLASSES)
        ]
        write_examples(folder / method, found)


def write_training(folder: Path, skills: Sequence[float], *, name: str = "shapes", images: int = 60) -> None:
    """Write a training with a measurement before it and one after each epoch."""
    for epoch, skill in enumerate(skills):
        write_state(folder, epoch, skill, name=name, images=images)
    (folder / "config.yaml").write_text("data: {init_args: {root: data/shapes}}\n")
    Image.new("RGB", (640, 480), (200, 30, 30)).save(folder / "grounding" / "progress.png")


def write_state(folder: Path, epoch: int | str, skill: float, *, name: str = "shapes", images: int = 60) -> None:
    """Write one measurement of a training."""
    state = f"epoch={epoch:03d}" if isinstance(epoch, int) else epoch
    record = ResultRecord(
        kind="training",
        model={"architecture": "shapes_vit"},
        data={"name": name},
        methods=methods_of(["feature_pair"]),
        metrics={"grounding": METRICS["grounding"]},
        state={"epoch": epoch, "step": 10 * epoch if isinstance(epoch, int) else 10},
        logged={"loss": 3 - skill, "image_to_text_recall_at_1": skill / 10},
    )
    table = made_table({"feature_pair": skill}, ["grounding"], images=images)
    write_result(folder / "grounding" / state, record, table)


def write_roar(
    folder: Path,
    losses: Mapping[tuple[str, str], Sequence[float]],
    *,
    original: Sequence[float] = (2.0, 2.2),
    methods: Mapping[str, MethodRecord] | None = None,
    missing: Sequence[str] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[ResultRecord, ResultTable]:
    """Write a ROAR+ with these losses: (method, modality) -> one for each seed."""
    rows = [(ORIGINAL, seed, "none", LOSS, loss, "") for seed, loss in enumerate(original)]
    rows += [
        (m, seed, modality, LOSS, loss, "")
        for (m, modality), found in losses.items()
        for seed, loss in enumerate(found)
    ]
    targets = [target("modality", i, 0, "") | {"target": n} for i, n in enumerate(("image", "text", "none"))]
    record = ResultRecord(
        kind="roar",
        model={"name": "shapes_vit"},
        data={"name": "shapes", "fingerprint": "1"},
        methods=dict(methods or methods_of(list(dict.fromkeys(method for method, _ in losses)))),
        extra={"missing": list(missing), "grid": dict(grid or {}), "base_loss": 1.5},
    )
    table = ResultTable.of(rows, targets)
    write_result(folder, record, table)
    return record, table


def write_grid(folder: Path) -> tuple[ResultRecord, ResultTable]:
    """Write the ROAR+ of a grid of which one point has not been run."""
    points = {f"m2ib,layer={layer},beta={beta}": (layer, beta) for layer in (3, 9) for beta in (0.1, 1)}
    losses = {(label, "image"): (2.0 + place / 4,) for place, label in enumerate(list(points)[:3])}
    methods = {label: MethodRecord(name="m2ib", options={"layer": p[0], "beta": p[1]}) for label, p in points.items()}
    return write_roar(folder, losses, original=(2.0,), methods=methods, grid={"layer": [3, 9], "beta": [0.1, 1]})


def rewrite(folder: Path, change: Any, **fields: Any) -> None:
    """Change the tables of a result folder, by a function from values and targets to both, and fields of its record."""
    record, table = read_result(folder)
    values, targets = change(table.values, table.targets) if change else (table.values, table.targets)
    write_result(folder, msgspec.structs.replace(record, **fields), ResultTable(values, targets))
