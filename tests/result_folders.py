"""Folders of results as evaluations, ROAR+ and trainings write them, made up but of plausible numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.report.tables import per_pair_csv
from lightning_xai.results.schema import (
    TABLES,
    EvaluationResult,
    ExampleRecord,
    MethodResult,
    RoarMethod,
    RoarResult,
    write_examples,
)

CLASSES = ("circle", "cross", "diamond", "heart", "ring", "square", "star", "triangle")
COLOURS = ("red", "blue", "green", "yellow")
PAIR_COLUMNS = (
    "index",
    "key",
    "caption_index",
    "caption",
    "phrase",
    "label",
    "reason",
    "gamma",
    "hit",
    "x0",
    "y0",
    "x1",
    "y1",
)
VERSIONS = {"python": "3.12.1", "lightning_xai": "0.1.0", "torch": "2.6.0"}

Row = dict[str, Any]
Rows = dict[str, list[Row]]


def grounding_rows(skill: float, *, seed: int = 0, images: int = 120, labels: Sequence[str] = CLASSES) -> list[Row]:
    """Two phrases of each image; every ninth was not measured. The more skill in (0, 1), the higher gamma."""
    generator = np.random.default_rng(seed)
    rows: list[Row] = []
    for index in range(images):
        first, second = labels[index % len(labels)], labels[(index * 3 + 1) % len(labels)]
        for label in (first, second):
            colour = COLOURS[index % len(COLOURS)]
            row: Row = {"index": index, "key": f"val_{index:04d}", "caption_index": 0}
            row |= {"caption": f"a {colour} {first} and a {second}", "phrase": label, "label": label}
            row |= {"x0": 8.0, "y0": 12.0, "x1": 40.0, "y1": 44.0}
            ease = skill * (0.6 + 0.4 * labels.index(label) / len(labels))
            gamma = float(generator.beta(0.4 + 4 * ease, 0.4 + 4 * (1 - ease)))
            if len(rows) % 9 == 8:
                rows.append(row | {"reason": "several_instances", "gamma": None, "hit": None})
            else:
                rows.append(
                    row | {"reason": "measured", "gamma": gamma, "hit": int(generator.random() < 0.2 + 0.7 * gamma)}
                )
    return rows


def evaluation_rows(skill: float, *, seed: int = 0, signed: bool = True, scale: float = 1e-2, **options: Any) -> Rows:
    """All tables of one method with one seed."""
    generator = np.random.default_rng(seed + 1)
    grounding = [{"seed": seed} | row for row in grounding_rows(skill, seed=seed, **options)]
    captions = [row for row in grounding[::2]]
    where = [{name: row[name] for name in ("seed", "index", "key", "caption_index", "caption")} for row in captions]
    tables: Rows = {"grounding": grounding}
    if signed:
        own, other = (
            generator.normal(skill, 0.3, len(where)) * scale,
            generator.normal(-skill / 3, 0.4, len(where)) * scale,
        )
        tables["other_objects"] = [
            w | {"phrase": "ring", "label": "ring", "other_label": "star", "own": float(a), "other": float(b)}
            for w, a, b in zip(where, own, other, strict=True)
        ]
        positive, negative = (generator.normal(mean, 0.4, len(where)) * scale for mean in (skill, 0.1))
        tables["hard_negatives"] = [
            w
            | {"negative_caption": "a star", "phrase": "ring", "replacement": "star", "label": "ring"}
            | {"positive": float(p), "negative": float(n), "delta": float(n - p)}
            for w, p, n in zip(where, positive, negative, strict=True)
        ]
    similarity = generator.uniform(0.2, 0.4, len(where))
    kept = [similarity + generator.normal((skill - 0.6) / 20, 0.02, len(where)) for _ in range(2)]
    tables["confidence"] = [
        w | {"similarity": float(s), "image_kept": float(i), "text_kept": float(t)}
        for w, s, i, t in zip(where, similarity, *kept, strict=True)
    ]
    ious = generator.beta(1 + 2 * skill, 4, len(where))
    tables["localization"] = [w | {"boxes": 2, "iou": float(iou)} for w, iou in zip(where, ious, strict=True)]
    return tables


def metrics_of(tables: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """What the tables of one seed come to, by plain Python."""
    found: dict[str, float] = {}
    measured = [row for row in tables["grounding"] if row["reason"] == "measured"]
    found["gamma_mean"] = statistics.fmean(row["gamma"] for row in measured)
    for percent in (50, 80):
        found[f"gamma_above_{percent}"] = sum(row["gamma"] > percent / 100 for row in measured) / len(measured)
    found["rho"] = sum(row["hit"] for row in measured) / len(measured)
    if "other_objects" in tables:
        rows = tables["other_objects"]
        found["own_positive"] = sum(row["own"] > 0 for row in rows) / len(rows)
        found["other_negative"] = sum(row["other"] < 0 for row in rows) / len(rows)
        deltas = [row["delta"] for row in tables["hard_negatives"]]
        found["delta_negative"] = sum(delta < 0 for delta in deltas) / len(deltas)
        found["delta_mean"] = statistics.fmean(deltas)
    for modality in ("image", "text"):
        both = [(row["similarity"], row[f"{modality}_kept"]) for row in tables["confidence"]]
        found[f"{modality}_drop"] = statistics.fmean(max(0.0, o - s) for o, s in both)
        found[f"{modality}_increase"] = sum(s > o for o, s in both) / len(both)
    found["localization_iou"] = statistics.fmean(row["iou"] for row in tables["localization"])
    return found


def write_evaluation(
    folder: Path,
    skills: Mapping[str, float],
    *,
    seeds: int = 1,
    data: str = "shapes",
    fingerprint: str = "f00d",
    weights: str = "aa",
    examples: bool = True,
    **options: Any,
) -> dict[str, list[Rows]]:
    """Write an evaluation by these methods; `random` and `gaussian` are controls, names that start with m2ib unsigned.

    Returns:
        Label -> the tables of each seed.
    """
    methods, every = {}, {}
    for label, skill in skills.items():
        signed = not label.startswith("m2ib")
        repeated = range(seeds if label in ("random", "rise") else 1)
        tables = [evaluation_rows(skill, seed=seed, signed=signed, **options) for seed in repeated]
        every[label] = tables
        for metric in tables[0]:
            per_pair_csv(
                folder / label / f"{metric}.csv", [row for each in tables for row in each[metric]], TABLES[metric]
            )
        values = [metrics_of(each) for each in tables]
        rows = [row for each in tables for row in each["grounding"]]
        counts = {metric: {"measured": sum(len(each[metric]) for each in tables)} for metric in tables[0]}
        counts["grounding"] = {
            reason: sum(row["reason"] == reason for row in rows) for reason in ("measured", "several_instances")
        }
        methods[label] = MethodResult(
            method=label.partition(",")[0],
            options={"steps": 10} if signed else {"beta": 0.1},
            signed=signed,
            seeds=tuple(repeated),
            metrics={name: tuple(found[name] for found in values) for name in values[0]},
            counts=counts,
        )
        if examples:
            write_examples(folder / label, _examples(folder, tables[0]["grounding"], skill))
    EvaluationResult(
        model={"name": "ViT-B-16", "pretrained": "openai", "architecture": "ViT-B-16", "fingerprint": weights},
        data={"name": data, "folder": f"data/{data}", "fingerprint": fingerprint, "samples": 120},
        settings={"keep_tokens": 0.5},
        versions=VERSIONS,
        methods=methods,
        speed={"pairs": 240.0, "seconds": 12.0, "pairs_per_second": 20.0},
    ).save(folder)
    return every


def write_roar(
    folder: Path, skills: Mapping[str, float], *, seeds: int = 3, missing: tuple[str, ...] = ()
) -> RoarResult:
    """Write ROAR+ of these methods."""
    generator = np.random.default_rng(7)
    original = {seed: 2.0 + 0.02 * seed for seed in range(seeds)}
    methods = {
        label: RoarMethod(
            label,
            {},
            {
                modality: {
                    seed: loss * (1 + skill * share + float(generator.normal(0, 0.01)))
                    for seed, loss in original.items()
                }
                for modality, share in (("image", 0.2), ("text", 0.7))
            },
        )
        for label, skill in skills.items()
    }
    result = RoarResult(
        model={"name": "ViT-B-16", "pretrained": "openai"},
        data={"name": "shapes"},
        settings={"epochs": 5},
        versions=VERSIONS,
        original=original,
        methods=methods,
        missing=missing,
        base_loss=1.9,
    )
    result.save(folder)
    return result


def write_grid(folder: Path) -> RoarResult:
    """Write the grid of the M2IB paper."""
    grid: dict[str, list[Any]] = {"layer": [7, 8, 9], "beta": [1, 0.1, 0.01], "variance": [1, 0.1, 0.01]}
    generator = np.random.default_rng(8)
    original = {seed: 2.0 for seed in range(3)}
    methods = {}
    for layer in grid["layer"]:
        for beta in grid["beta"]:
            for variance in grid["variance"]:
                losses = {
                    m: {seed: 2.0 + float(generator.uniform(0.1, 0.4)) for seed in original} for m in ("image", "text")
                }
                options = {"layer": layer, "beta": beta, "variance": variance, "steps": 10}
                methods[f"m2ib,layer={layer},beta={beta},variance={variance}"] = RoarMethod("m2ib", options, losses)
    result = RoarResult({"name": "ViT-B-16"}, {"name": "shapes"}, {}, VERSIONS, original, methods, grid=grid)
    result.save(folder)
    return result


def write_training(folder: Path, skills: Sequence[float], *, config: bool = True, **options: Any) -> list[list[Row]]:
    """Write the grounding of a training, one measurement for each skill.

    Returns:
        The rows of each measurement.
    """
    every, summary = [], []
    for epoch, skill in enumerate(skills):
        rows = grounding_rows(skill, seed=epoch, **options)
        every.append(rows)
        per_pair_csv(folder / "grounding" / f"pairs-epoch={epoch:03d}.csv", rows, PAIR_COLUMNS)
        found = metrics_of(evaluation_rows(skill, seed=epoch, **options))
        line: Row = {"epoch": epoch, "step": 40 * epoch, "pairs": sum(row["reason"] == "measured" for row in rows)}
        line |= {name: found[name] for name in ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho")}
        line |= {"loss": 4.0 - 0.5 * epoch, "image_to_text_recall_at_1": 0.1 * epoch, "accuracy": math.nan}
        summary.append(line | {"left_out_several_instances": sum(row["reason"] != "measured" for row in rows)})
    per_pair_csv(folder / "grounding" / "summary.csv", summary, tuple(summary[0]))
    picture = np.full((64, 96, 3), 200, dtype=np.uint8)
    Image.fromarray(picture).save(folder / "grounding" / "progress.png")
    if config:
        lines = ["model:", "  class_path: ContrastiveFineTuning", "  init_args: {model: ViT-B-16, pretrained: openai}"]
        lines += ["data:", "  class_path: ShapesDataModule", "  init_args: {root: data/shapes}"]
        (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    return every


def _examples(folder: Path, rows: Sequence[Row], skill: float) -> list[ExampleRecord]:
    """The first phrases, the first of each class and the worst, with a map whose peak moves into the box with skill."""
    measured = [row for row in rows if row["reason"] == "measured"]
    worst = {id(row) for row in sorted(measured, key=lambda row: row["gamma"])[:12]}
    seen: set[str] = set()
    records = []
    for number, row in enumerate(measured):
        why = ["fixed"] if number < 4 else []
        why += ["class"] if row["label"] not in seen else []
        why += ["failure"] if id(row) in worst else []
        seen.add(row["label"])
        if not why:
            continue
        name = f"examples/{row['key']}.jpg"
        if not (folder / name).exists():
            (folder / "examples").mkdir(parents=True, exist_ok=True)
            Image.fromarray(_picture(row["index"])).save(folder / name, quality=92)
        start = row["caption"].find(row["phrase"])
        records.append(
            ExampleRecord(
                why=tuple(why),
                image=name,
                key=row["key"],
                caption=row["caption"],
                phrase=row["phrase"],
                spans=((start, start + len(row["phrase"])),),
                label=row["label"],
                box=(row["x0"], row["y0"], row["x1"], row["y1"]),
                gamma=row["gamma"],
                hit=bool(row["hit"]),
                heat=tuple(map(tuple, _heat(skill, row["index"]).tolist())),
            )
        )
    return records


def _picture(seed: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    picture = generator.integers(90, 150, (64, 64, 3), dtype=np.uint8)
    picture[12:44, 8:40] = generator.integers(0, 256, 3)
    return picture


def _heat(skill: float, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:8, 0:8]
    peak = np.exp(-((rows - 3) ** 2 + (columns - 2.5) ** 2) / 4)
    heat: NDArray[np.float64] = np.round(skill * peak + generator.normal(0, 0.25, (8, 8)), 4)
    return heat
