"""Grounding while models learned: a table and curves for each training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_xai.report.page import Block, Chart
from lightning_xai.report.paper_table import LOGGED_COLUMNS, Column, PaperTable, logged_shares
from lightning_xai.report.plots import curves
from lightning_xai.report.sections.metrics import score_columns
from lightning_xai.results.record import layers_in_words
from lightning_xai.results.runs import FEATURE_PAIR, GROUNDING, Run


def training_blocks(runs: Sequence[Run]) -> list[Block]:
    """The progress of each training, at the inputs first where it was read there."""
    blocks: list[Block] = []
    for run in runs:
        if run.is_training and GROUNDING in run.record.metrics:
            for label, where in reversed(_layers(run).items()):
                blocks += [_progress_table(run, label, where), *_curves(run, label, where)]
            blocks += _other_curves(run)
    return blocks


def _layers(run: Run) -> dict[str, str]:
    """Label -> the layers that grounding was read at, in words; the one that speaks for the run first."""
    return {
        label: layers_in_words(method.options)
        for each in run.measurements
        for label, method in each.record.methods.items()
    }


def _progress_table(run: Run, label: str, where: str) -> PaperTable:
    metric = run.record.metrics[GROUNDING]
    logged = [key for key in LOGGED_COLUMNS if key in run.record.logged]
    columns = [Column("after", numeric=False), *score_columns(metric), Column("targets")]
    rows = []
    for each in run.measurements:
        scores = each.estimates(GROUNDING).get(label, {})
        cells = [scores.get(score.name) for score in metric.scores]
        count = max((found.count for found in scores.values()), default=0)
        rows.append([each.state, *cells, count, *(each.record.logged.get(key) for key in logged)])
    return PaperTable(
        f"progress-{run.name}{_ending(label)}",
        ", read at: ".join(filter(None, (f"Grounding while {run.name} learned", where))),
        "R@1: share of pairs whose partner is found first among all images or captions of the split. Zero-shot: share "
        "of images that are most similar to the name of their own class.",
        [*columns, *(LOGGED_COLUMNS[key] for key in logged)],
        rows,
    )


def _curves(run: Run, label: str, where: str) -> list[Chart]:
    # A spread is no share of anything.
    scores = [score for score in run.record.metrics[GROUNDING].scores if score.reduce != "std"]
    rows: list[dict[str, Any]] = [
        {
            **each.record.state,
            **{name: found.mean for name, found in each.estimates(GROUNDING).get(label, {}).items()},
        }
        for each in run.measurements
        if isinstance(each.record.state.get("epoch"), int)
    ]
    shown = next((score for score in scores if score.percent), scores[0])
    known = [row for row in rows if not math.isnan(row.get(shown.name, math.nan))]
    if not known:
        return []
    first, last = (100 * float(row[shown.name]) for row in (known[0], known[-1]))
    alt = f"Curves over {len(known)} measurements; {shown.heading} goes from {first:.1f} to {last:.1f} %."
    title = f"Grounding of {run.name} by {'step' if any(row.get('batch') for row in rows) else 'epoch'}"
    title = ", ".join(filter(None, (title, where)))
    figure = curves(rows, title, scores=scores)
    return [Chart(f"curves-{run.name}{_ending(label)}", title, "Measured on the validation split.", alt, figure)]


def _other_curves(run: Run) -> list[Chart]:
    """What else was logged by epoch: recall, and what other callbacks measure."""
    rows = [
        {**each.record.state, **each.record.logged}
        for each in run.measurements
        if isinstance(each.record.state.get("epoch"), int)
    ]
    shares = logged_shares({name for row in rows for name in row})
    if not shares:
        return []
    title = f"Retrieval and other tasks of {run.name}"
    alt = f"Curves over {len(rows)} measurements: {', '.join(shares.values())}."
    figure = curves(rows, title, scores=(), panels={}, others=shares)
    return [Chart(f"curves-{run.name}-other", title, "Measured in the validations of the run.", alt, figure)]


def _ending(label: str) -> str:
    """Of names: none for the layers that speak for the run."""
    return "" if label == FEATURE_PAIR else f"-{label}"
