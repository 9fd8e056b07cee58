"""Tables and pictures of models between a base model and its fine-tuned version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lightning_xai.report.paper_table import LOGGED_COLUMNS, Column, PaperTable, score_column
from lightning_xai.report.sheet import style
from lightning_xai.results.record import Score

__all__ = ["merge_figure", "merge_table"]

ZERO_SHOT = "zero_shot_accuracy"
Row = Mapping[str, float]
"""`alpha`, and what was measured there, by name; fractions in [0, 1]."""


def columns_of(rows: Sequence[Row], scores: Sequence[Score], places: Mapping[str, str]) -> dict[str, Column]:
    """The columns of a table by what they are called in rows: grounding at each place, then what else was measured.

    Args:
        rows: measurements.
        scores: of grounding.
        places: what ends the names of scores in rows -> where they were read, in words.
    """
    columns = {
        f"{score.name}{suffix}": score_column(score, place) for suffix, place in places.items() for score in scores
    }
    columns |= LOGGED_COLUMNS
    return {name: column for name, column in columns.items() if any(name in row for row in rows)}


def merge_table(rows: Sequence[Row], scores: Sequence[Score], places: Mapping[str, str]) -> PaperTable:
    """A line for each alpha; see `columns_of`."""
    columns = columns_of(rows, scores, places)
    return PaperTable(
        "merge",
        "From the base model (alpha 0) to the fine-tuned one (alpha 1)",
        "Weights are (1 - alpha) * base + alpha * tuned.",
        [Column("alpha", numeric=False), *columns.values()],
        [[f"{row['alpha']:g}", *(row.get(name) for name in columns)] for row in rows],
    )


@style()
def merge_figure(rows: Sequence[Row], scores: Sequence[Score], places: Mapping[str, str]) -> Figure:
    """Draw all shares against alpha, and grounding against zero-shot accuracy where both were measured.

    Args:
        rows: measurements by rising alpha, at least one.
        scores: of grounding; those that are shares, or means in [0, 1], are drawn.
        places: as of `columns_of`; the first has full lines, the second dashed ones.

    Raises:
        ValueError: nothing was measured.
    """
    frame = pd.DataFrame(rows, dtype="float64")
    columns = {name: column for name, column in columns_of(rows, scores, places).items() if column.percent}
    if not columns:
        raise ValueError(f"expected rows with grounding or zero-shot accuracy; got {[*frame.columns]}")
    grounding = [name for name in columns if name not in LOGGED_COLUMNS]
    trade_off = ZERO_SHOT in columns and bool(grounding)
    figure = Figure(figsize=(12.5 if trade_off else 7.5, 4.6))
    panels = figure.subplots(1, 1 + trade_off, squeeze=False)[0]
    looks = dict(zip(places.values(), ("-", "--"), strict=False))
    names = list(dict.fromkeys(column.name for column in columns.values()))
    for key, column in columns.items():
        # A score has one colour, and a line style for each place that it was read at.
        look = {"color": f"C{names.index(column.name)}", "linestyle": looks.get(column.group, "-."), "marker": "o"}
        panels[0].plot(frame["alpha"], 100 * frame[key], label=_label(column), **look)
        if trade_off and key in grounding:
            panels[1].plot(100 * frame[ZERO_SHOT], 100 * frame[key], **look)
    panels[0].set(title="Along the way", xlabel="alpha (0: base, 1: fine-tuned)", ylabel="[%]", ylim=(0, 100))
    panels[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    if trade_off:
        panels[1].set(title="What is won and lost", xlabel="zero-shot accuracy [%]", ylabel="grounding [%]")
        _name_points(panels[1], frame, grounding)
    return figure


def _name_points(axes: Any, frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Write alpha next to the points of the highest line."""
    highest = 100 * frame[names].max(axis=1)
    for alpha, across, up in zip(frame["alpha"], 100 * frame[ZERO_SHOT], highest, strict=True):
        if across == across and up == up:  # neither is NaN
            axes.annotate(f"{alpha:g}", (across, up), xytext=(0, 6), textcoords="offset points", ha="center")


def _label(column: Column) -> str:
    return f"{column.name}, {column.group}" if column.group else column.name
