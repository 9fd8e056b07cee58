"""What runs measured, as parts of the page: grounding, training, signs, confidence and ROAR+."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_xai.report.charts import (
    Sample,
    cumulative_gammas,
    delta_distributions,
    dressed,
    roar_bars,
    sign_bars,
)
from lightning_xai.report.html import Block, Chart, Note
from lightning_xai.report.plots import curves
from lightning_xai.report.summaries import (
    degradation_table,
    grid_tables,
    grounding_table,
    hard_negatives_table,
    progress_table,
    signs_table,
)
from lightning_xai.results.runs import Grounding, Row, Run, by_data
from lightning_xai.results.schema import CONTROLS, MODALITIES, ResultError

__all__ = ["degradation_blocks", "grounding_blocks", "sign_blocks", "training_blocks"]


def grounding_blocks(runs: Sequence[Run]) -> list[Block]:
    """Gamma and rho in a table, and how gamma is distributed."""
    table = grounding_table(runs)
    if table is None:
        return [Note("None of the runs measured grounding.", missing=True)]
    blocks: list[Block] = [table]
    for title, panels in _curves(runs):
        shares = (
            f"{name} {each.name} {100 * float(np.mean(each.values > 0.5)):.1f} %"
            for name, samples in panels.items()
            for each in samples
        )
        blocks.append(
            Chart(
                f"gamma-{title}",
                f"Cumulative distributions of γ, {title}",
                "The higher a curve, the better the grounding. Dotted: the thresholds of the table.",
                f"Curves of the share of phrases above each γ. Above 0.5: {', '.join(shares)}.",
                cumulative_gammas(panels, title),
            )
        )
    return blocks


def training_blocks(runs: Sequence[Run]) -> list[Block]:
    """How grounding changed while models learned."""
    blocks: list[Block] = []
    for run in runs:
        table = progress_table(run)
        if table is None or run.training is None:
            continue
        blocks.append(table)
        measured = [row for row in run.training.summary if isinstance(row["epoch"], int) and row["pairs"]]
        if measured:
            first, last = (100 * float(row["gamma_above_50"]) for row in (measured[0], measured[-1]))
            alt = f"Curves over {len(measured)} measurements; γ above 0.5 goes from {first:.1f} to {last:.1f} %."
            title = f"Grounding of {run.name} by epoch"
            blocks.append(
                Chart(f"curves-{run.name}", title, "Measured on the validation split.", alt, dressed(curves(measured)))
            )
    return blocks


def sign_blocks(runs: Sequence[Run]) -> list[Block]:
    """Signs of attributions to other objects, and delta of hard negatives."""
    blocks: list[Block] = [table for make in (signs_table, hard_negatives_table) if (table := make(runs))]
    totals = {
        name: (_numbers(run, label, rows, "own"), _numbers(run, label, rows, "other"))
        for run, label, rows in _signed_tables(runs, "other_objects")
        for name in [f"{run.name}: {label}" if len(runs) > 1 else label]
    }
    if totals:
        alt = "; ".join(
            f"{name}: own object {_share(own > 0)} positive, other object {_share(other < 0)} negative"
            for name, (own, other) in totals.items()
        )
        title = "Signs of the attribution to the own and to another object"
        blocks.append(Chart("signs", title, "Pale bars are negative.", f"{alt}.", sign_bars(totals, title)))
    deltas: dict[str, list[Sample]] = {}
    for run, label, rows in _signed_tables(runs, "hard_negatives"):
        deltas.setdefault(label, []).append(Sample(run.name, _numbers(run, label, rows, "delta")))
    if deltas:
        title = "Distribution of δ for hard negative captions"
        note = "Each method's maps have a scale of their own; the outermost bins hold what lies beyond."
        alt = "; ".join(
            f"{method}, {each.name}: {_share(each.values < 0)} below 0"
            for method, samples in deltas.items()
            for each in samples
        )
        blocks.append(Chart("delta", title, note, f"{alt}.", delta_distributions(deltas, title)))
    if not blocks and any(run.evaluation for run in runs):
        return [
            Note("No run has signed methods measured on captions with two objects or hard negatives.", missing=True)
        ]
    return blocks


def degradation_blocks(runs: Sequence[Run]) -> list[Block]:
    """Confidence, localization and ROAR+."""
    table = degradation_table(runs)
    blocks: list[Block] = [] if table is None else [table]
    for run in runs:
        if run.roar is None:
            continue
        roar = run.roar
        if roar.missing:
            some = ", ".join(roar.missing[:6]) + (", …" if len(roar.missing) > 6 else "")
            note = f"{run.name}: {len(roar.missing)} of the retrainings have not been run yet: {some}."
            blocks.append(Note(note, missing=True))
        scores = {
            modality: {
                label: score for label in roar.methods if (score := roar.score(label, modality)).mean == score.mean
            }
            for modality in MODALITIES
        }
        scores = {modality: found for modality, found in scores.items() if found}
        if scores and not roar.grid:
            controls = [label for label, method in roar.methods.items() if method.method in CONTROLS]
            alt = "; ".join(
                f"{modality}: " + ", ".join(f"{label} {100 * score.mean:.1f} %" for label, score in found.items())
                for modality, found in scores.items()
            )
            title = f"ROAR+ of {run.name} on {run.data}"
            note = "Rise of the validation loss after retraining without what a method finds important."
            blocks.append(Chart(f"roar-{run.name}", title, note, alt, roar_bars(scores, controls, title)))
    return [*blocks, *grid_tables(runs)]


def _curves(runs: Sequence[Run]) -> Iterator[tuple[str, dict[str, list[Sample]]]]:
    """Which groundings share a figure: a run's methods or states, and for each data set the runs by method."""
    ends: list[Grounding] = []
    for run in runs:
        there = [each for each in run.groundings if len(each.gammas)]
        ends += there[-1:] if run.training is not None else [each for each in there if not each.is_control]
        if len(there) > 1 or (there and len(runs) == 1):
            named = [Sample(each.state or each.label, each.gammas, each.is_control) for each in there]
            yield f"{run.name} on {run.data}", {"": named}
    for group in by_data(ends):
        panels: dict[str, list[Sample]] = {}
        for each in group:
            panels.setdefault(each.label, []).append(Sample(each.name, each.gammas))
        shared = {label: samples for label, samples in panels.items() if len(samples) > 1}
        if shared:
            yield f"runs side by side on {group[0].data}", shared


def _signed_tables(runs: Sequence[Run], metric: str) -> Iterator[tuple[Run, str, list[Row]]]:
    """The rows of the first seed of each method that has any, without controls."""
    for run in runs:
        for label, tables in run.tables.items():
            rows = tables.get(metric, ())
            if rows and run.evaluation is not None and run.evaluation.methods[label].method not in CONTROLS:
                yield run, label, [row for row in rows if row["seed"] == rows[0]["seed"]]


def _numbers(run: Run, label: str, rows: Sequence[Row], column: str) -> NDArray[np.float64]:
    try:
        values = np.array([float(row[column]) for row in rows])
    except ValueError as error:
        raise ResultError(f"{run.folder / label}, {column}: not a number ({error}); evaluate again") from error
    if not np.isfinite(values).all():
        raise ResultError(f"{run.folder / label}, {column}: a number is not finite; evaluate again")
    return values


def _share(there: NDArray[np.bool_]) -> str:
    return f"{100 * float(np.mean(there)):.1f} %"
