"""Grounding while models learned: a table and curves for each training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_xai.report.page import Block, Chart
from lightning_xai.report.paper_table import LOGGED_COLUMNS, Column, PaperTable
from lightning_xai.report.plots import curves
from lightning_xai.report.sections.metrics import score_columns
from lightning_xai.results.runs import GROUNDING, Estimate, Measurement, Run


def training_blocks(runs: Sequence[Run]) -> list[Block]:
    """The progress of each training."""
    blocks: list[Block] = []
    for run in runs:
        if run.is_training and GROUNDING in run.record.metrics:
            blocks += [_progress_table(run), *_curves(run)]
    return blocks


def _progress_table(run: Run) -> PaperTable:
    metric = run.record.metrics[GROUNDING]
    logged = [key for key in LOGGED_COLUMNS if key in run.record.logged]
    columns = [Column("after", numeric=False), *score_columns(metric), Column("targets")]
    rows = []
    for each in run.measurements:
        scores = _scores(each)
        cells = [scores.get(score.name) for score in metric.scores]
        count = max((found.count for found in scores.values()), default=0)
        rows.append([each.state, *cells, count, *(each.record.logged.get(key) for key in logged)])
    return PaperTable(
        f"progress-{run.name}",
        f"Grounding while {run.name} learned ({', '.join(run.methods)})",
        "R@1: share of pairs whose partner is found first among all images or captions of the split.",
        [*columns, *(LOGGED_COLUMNS[key] for key in logged)],
        rows,
    )


def _curves(run: Run) -> list[Chart]:
    # A spread is no share of anything.
    scores = [score for score in run.record.metrics[GROUNDING].scores if score.reduce != "std"]
    rows: list[dict[str, Any]] = [
        {**each.record.state, **{name: found.mean for name, found in _scores(each).items()}}
        for each in run.measurements
        if isinstance(each.record.state.get("epoch"), int)
    ]
    shown = next((score for score in scores if score.percent), scores[0])
    known = [row for row in rows if not math.isnan(row.get(shown.name, math.nan))]
    if not known:
        return []
    first, last = (100 * float(row[shown.name]) for row in (known[0], known[-1]))
    alt = f"Curves over {len(known)} measurements; {shown.heading} goes from {first:.1f} to {last:.1f} %."
    by = "step" if any(row.get("batch") for row in rows) else "epoch"
    title = f"Grounding of {run.name} by {by} ({', '.join(run.methods)})"
    figure = curves(rows, title, scores=scores)
    return [Chart(f"curves-{run.name}", title, "Measured on the validation split.", alt, figure)]


def _scores(measurement: Measurement) -> dict[str, Estimate]:
    """The scores of the one method that a training measures with."""
    return next(iter(measurement.estimates(GROUNDING).values()), {})
