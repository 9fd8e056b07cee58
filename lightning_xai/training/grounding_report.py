"""What a run shows of its grounding: tables and pictures in a folder, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from lightning_xai.evaluation.phrase_grounding import class_rows
from lightning_xai.report.plots import curves, progress_sheet, save_figure
from lightning_xai.report.tables import PAIR_COLUMNS, epoch_name, format_value, grounding_table, per_pair_csv
from lightning_xai.training.grounding_pass import Measured

__all__ = ["Row", "history_row", "show", "write"]

Row = dict[str, Any]
"""A measurement: `epoch` (finished epochs, or `"validate"`, `"test"`), `step`, `pairs`, gamma and rho, what the module
logged, `left_out`, and `examples` (see `Drawn.state`); tensors and plain values, so that checkpoints can hold it."""

_BOXED_PAIR_COLUMNS = (*PAIR_COLUMNS, "x0", "y0", "x1", "y1")
_SHOWN = {  # of what the module logs, what 80 columns have room for, and its heading
    "loss": "loss",
    "image_to_text_recall_at_1": "i→t R@1 [%]",
    "text_to_image_recall_at_1": "t→i R@1 [%]",
}


def history_row(measured: Measured, epoch: int | str, step: int, logged: Mapping[str, float]) -> Row:
    """One measurement, with what the module has logged in the same evaluation (`val/loss` becomes `loss`)."""
    scalars = measured.summary.scalars()
    row: Row = {"epoch": epoch, "step": step, "pairs": measured.summary.pairs}
    row |= {name: value for name, value in scalars.items() if name != "grounding_pairs"}
    others = {name.removeprefix(f"{measured.split}/"): value for name, value in logged.items()}
    row |= {name: value for name, value in others.items() if name not in row.keys() | scalars.keys()}
    return row | {"left_out": dict(measured.summary.left_out), "examples": measured.drawn.state}


def write(folder: Path, rows: Sequence[Row], measured: Measured) -> Figure | None:
    """Write the tables and pictures of the last of `rows`, which is `measured`, and of all rows together.

    A validation or test outside of training has files of its own, so that it leaves those of the training as they are.

    Returns:
        The sheet of heat maps, or None where nothing could be measured.
    """
    epoch = rows[-1]["epoch"]
    training = isinstance(epoch, int)
    name = f"epoch={epoch:03d}" if training else str(epoch)
    suffix = "" if training else f"-{epoch}"
    per_pair_csv(folder / f"pairs-{name}.csv", measured.pairs, _BOXED_PAIR_COLUMNS)
    classes = [{"epoch": epoch} | row for row in class_rows(measured.summary)]
    per_pair_csv(folder / f"classes-{name}.csv", classes, tuple(classes[0]) if classes else ("epoch", "label"))
    lines = [_flat(row) for row in rows]
    per_pair_csv(folder / f"summary{suffix}.csv", lines, tuple(dict.fromkeys(key for line in lines for key in line)))
    if training and any(row["pairs"] for row in rows):
        save_figure(curves(rows, scores=()), folder / "curves.png")
    if not measured.drawn.examples:
        return None
    sheet = _progress(rows, measured)
    save_figure(sheet, folder / f"progress{suffix}.png")
    return sheet


def show(folder: Path, rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the table of grounding, what was left out of the last measurement, and where to look."""
    console = console or Console()
    last = rows[-1]
    shown = [
        {key: row[key] for key in ("epoch", "gamma_mean", "gamma_above_50", "gamma_above_80", "rho", "pairs")}
        | {heading: format_value(key, row[key]) for key, heading in _SHOWN.items() if key in row}
        for row in rows
    ]
    console.print(grounding_table(shown))
    counts = last["left_out"] | {"broken_records": int(last.get("broken_records", 0))}
    reasons = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in counts.items() if n)
    suffix = "" if isinstance(last["epoch"], int) else f"-{last['epoch']}"
    picture, table = folder / f"progress{suffix}.png", folder / f"summary{suffix}.csv"
    look = f"Look at {picture}; all numbers: {table}" if picture.exists() else f"All numbers: {table}"
    # Paths are neither to be wrapped nor to be read as rich's markup.
    for line in (f"Left out: {reasons or 'nothing'}.", look):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _progress(rows: Sequence[Row], measured: Measured) -> Figure:
    """The examples' heat maps, a column for each measurement that drew the same ones."""
    same = [row for row in rows if row["examples"]["keys"] == measured.drawn.state["keys"]]
    return progress_sheet(
        measured.drawn.examples,
        [[heat.numpy() for heat in row["examples"]["heats"]] for row in same],
        [epoch_name(row["epoch"]) for row in same],
        [row["examples"]["gammas"] for row in same],
        f"What the phrase matches in the image ({measured.split}): red more, blue less similar",
        hits=[row["examples"]["hits"] for row in same],
    )


def _flat(row: Row) -> dict[str, Any]:
    """A line of a table: a column for each reason of what was left out, nothing that is no number or name."""
    plain = {key: value for key, value in row.items() if key not in ("left_out", "examples")}
    return plain | {f"left_out_{why}": count for why, count in row["left_out"].items()}
