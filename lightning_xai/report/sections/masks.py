"""How far boxes flatter: gamma and rho by box and by mask on the same phrases, by method and by class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import pandas as pd

from lightning_xai.report.page import Block, Folded, Note
from lightning_xai.report.paper_table import Column, PaperTable
from lightning_xai.results.runs import Measurement, Run

_VALUES = ("gamma", "gamma_mask", "rho", "rho_mask", "mask_fill")
_COLUMNS = (
    Column("γ by box"),
    Column("γ by mask"),
    Column("γ difference", signed=True),
    Column("ρ by box", percent=True, digits=1),
    Column("ρ by mask", percent=True, digits=1),
    Column("ρ difference", percent=True, digits=1, signed=True),
    Column("box filled", percent=True, digits=1),
    Column("phrases"),
)


def mask_blocks(runs: Sequence[Run], min_pairs: int = 10) -> list[Block]:
    """Compare measures by box and by mask; empty where no run measured both.

    Args:
        runs: of the report.
        min_pairs: how many phrases a class needs to be listed.
    """
    return [block for run in runs for each in run.measurements for block in _of_measurement(each, run, min_pairs)]


def same_phrases(measurement: Measurement, label: str) -> pd.DataFrame:
    """The phrases that a method's first seed has measured by box and by mask: `label` and a column for each value."""
    rows = measurement.first_seed(label, _VALUES)
    rows = rows[rows["excluded"] == ""]
    table = rows.pivot(index=["target", "label"], columns="metric", values="value").reset_index("label")
    return table.reindex(columns=["label", *_VALUES]).dropna(subset=list(_VALUES))


def _of_measurement(measurement: Measurement, run: Run, min_pairs: int) -> Iterator[Block]:
    found = {label: same_phrases(measurement, label) for label in measurement.record.methods}
    found = {label: table for label, table in found.items() if len(table)}
    if not found:
        return
    about = f"{measurement.full_name} on {measurement.data}"
    yield PaperTable(
        f"boxes-and-masks-{about}",
        f"Boxes and masks ({about})",
        "On the phrases that have both. Difference: by box less by mask; box filled: the share of its box that a mask "
        "covers. The patches of a mask are rounded as those of its box.",
        [Column("method", numeric=False), *_COLUMNS],
        [[measurement.record.shown(label), *_line(table)] for label, table in found.items()],
    )
    shown = run.shown.label if run.shown is not None and run.shown.label in found else next(iter(found))
    rows = _class_rows(found[shown], min_pairs)
    name = measurement.record.shown(shown)
    yield Note(_sentence(name, found[shown], rows))
    if rows:
        title = f"Boxes and masks by class ({name}, {about})"
        note = f"Ordered by the difference; classes with at least {min_pairs} phrases."
        table = PaperTable(
            f"boxes-and-masks-classes-{about}", title, note, [Column("class", numeric=False), *_COLUMNS], rows
        )
        yield Folded(f"Table of {len(rows)} classes", (table,))


def _line(table: pd.DataFrame) -> list[float | int]:
    """The cells of `_COLUMNS`."""
    gamma, gamma_mask, rho, rho_mask, fill = (fmean(table[value].tolist()) for value in _VALUES)
    return [gamma, gamma_mask, gamma - gamma_mask, rho, rho_mask, rho - rho_mask, fill, len(table)]


def _class_rows(table: pd.DataFrame, min_pairs: int) -> list[list[str | float | int]]:
    """A line for each class, where boxes flatter most on top."""
    rows = [[str(label), *_line(part)] for label, part in table.groupby("label") if len(part) >= min_pairs]
    return sorted(rows, key=lambda row: (-float(row[3]), row[0]))


def _sentence(name: str, table: pd.DataFrame, classes: Sequence[Sequence[str | float | int]]) -> str:
    gamma, gamma_mask, difference, *_, fill, count = _line(table)
    verb = "flatter" if difference >= 0 else "understate"
    text = (
        f"{name}: mean γ is {gamma:.2f} by box and {gamma_mask:.2f} by mask: boxes {verb} it by "
        f"{abs(difference):.2f}, on {count:,} phrases whose masks fill {100 * fill:.0f} % of their boxes."
    )
    if len(classes) > 1:
        most, least = (
            f"{row[0]} ({float(row[3]):+.2f}, {100 * float(row[7]):.0f} % filled)" for row in (classes[0], classes[-1])
        )
        text += f" Most of all {most}, least {least}."
    return text
