"""Tables and pictures of a run's grounding in a folder, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import SPEC
from lightning_xai.report.paper_table import LOGGED_COLUMNS, Column, PaperTable, score_column
from lightning_xai.report.plots import GradedMap, curves, progress_sheet, save_figure
from lightning_xai.results.record import MethodRecord, ResultRecord, package_versions, state_name

if TYPE_CHECKING:
    from lightning_xai.training.grounding import GroundingPass

__all__ = ["LOGGED", "METHOD", "Row", "show", "write"]

METHOD = "feature_pair"
Row = dict[str, Any]
"""A measurement: `epoch` (finished epochs, or `"validate"`, `"test"`), `step`, within an epoch `batch` (how many of its
batches were trained on), `targets`, gamma and rho, what the
module logged; on the first rank `excluded`, and `examples` as they were drawn: `keys`, `heats` ([H, W] float32),
`gammas` and `hits`. Tensors and plain values, so that checkpoints can hold it."""

LOGGED = ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho")
"""Scores that the callback logs, besides `grounding_targets`."""


def write(
    folder: Path, rows: Sequence[Row], measured: GroundingPass, options: Mapping[str, Any], about: Mapping[str, Any]
) -> Figure | None:
    """Write the result folder of the last of `rows`, which is `measured`, and tables and pictures of all rows together.

    A validation or test outside of training has files with its own names, so that it leaves those of the training as
    they are.

    Args:
        folder: of the run's grounding.
        rows: measurements.
        measured: what the last one was measured from; its rows of all ranks are on the first rank only.
        options: of the attribution method.
        about: `model` and `data` of the record.

    Returns:
        The sheet of heat maps, or None where nothing could be measured.
    """
    from lightning_xai.results.table import summary_table, write_csv, write_result

    last = rows[-1]
    training = isinstance(last["epoch"], int)
    suffix = "" if training else f"-{last['epoch']}"
    here = folder / _folder_name(last)
    assert measured.table is not None, "the first rank holds the table"
    classes = summary_table(measured.table.frame, SPEC.scores, ["label"]).set_index("label")
    # Every class of the split has a line, in the split's order.
    classes = classes.reindex(measured.label_names)
    counts = [column for column in classes.columns if column == "targets" or column.startswith("excluded_")]
    classes[counts] = classes[counts].fillna(0).astype("int64")
    write_csv(here / "classes.csv", classes.rename_axis("label").reset_index())
    write_result(here, _record(last, options, about), measured.table)
    write_csv(folder / f"summary{suffix}.csv", _lines(rows))
    if training and any(row["targets"] for row in rows):
        save_figure(curves(rows, scores=SPEC.scores), folder / "curves.png")
    if not measured.examples:
        return None
    sheet = _progress(rows, measured)
    save_figure(sheet, folder / f"progress{suffix}.png")
    return sheet


def show(folder: Path, rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the table of grounding, what was excluded from the last measurement, and where to look."""
    console = console or Console()
    last = rows[-1]
    columns = {score.name: score_column(score) for score in SPEC.scores if score.name in LOGGED}
    columns |= {"targets": Column("targets")}
    columns |= {key: column for key, column in LOGGED_COLUMNS.items() if any(key in row for row in rows)}
    cells = [[state_name(row), *(row.get(key) for key in columns)] for row in rows]
    heads = [Column("after", numeric=False), *columns.values()]
    console.print(PaperTable("grounding", "Grounding per epoch", "", heads, cells).to_terminal())
    counts = last["excluded"] | {"broken_records": int(last.get("broken_records", 0))}
    reasons = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in counts.items() if n)
    suffix = "" if isinstance(last["epoch"], int) else f"-{last['epoch']}"
    saved = (folder / f"progress{suffix}.png", folder / f"summary{suffix}.csv")
    # Paths are neither to be wrapped nor to be read as rich's markup.
    for line in (f"Excluded: {reasons or 'nothing'}.", *(f"Saved {path}" for path in saved if path.exists())):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _folder_name(row: Row) -> str:
    if isinstance(row["epoch"], str):
        return row["epoch"]
    return f"step={row['step']:08d}" if "batch" in row else f"epoch={row['epoch']:03d}"


def _record(row: Row, options: Mapping[str, Any], about: Mapping[str, Any]) -> ResultRecord:
    state: dict[str, int | str] = {key: row[key] for key in ("epoch", "step", "batch") if key in row}
    own = {*state, "targets", "excluded", "examples", *LOGGED}
    return ResultRecord(
        kind="training",
        **about,
        versions=package_versions(),
        methods={METHOD: MethodRecord(name=METHOD, options=dict(options), signed=True)},
        metrics={SPEC.name: SPEC.record({})},
        state=state,
        logged={name: value for name, value in row.items() if name not in own},
    )


def _lines(rows: Sequence[Row]) -> Any:
    """A frame with a line for each measurement: a column for each reason of exclusion, nothing that is no number."""
    import pandas as pd

    reasons = [why.key for why in Exclusion if any(row["excluded"].get(why.key) for row in rows)]
    lines = [
        {key: value for key, value in row.items() if key not in ("batch", "excluded", "examples")}
        | {f"excluded_{why}": row["excluded"].get(why, 0) for why in reasons}
        for row in rows
    ]
    return pd.DataFrame(lines)


def _progress(rows: Sequence[Row], measured: GroundingPass) -> Figure:
    """The examples' heat maps, a column for each measurement that drew the same ones."""
    same = [row for row in rows if row["examples"]["keys"] == rows[-1]["examples"]["keys"]]
    return progress_sheet(
        measured.examples,
        [
            [
                GradedMap(heat.numpy(), gamma, hit)
                for heat, gamma, hit in zip(*(row["examples"][key] for key in ("heats", "gammas", "hits")), strict=True)
            ]
            for row in same
        ],
        [state_name(row) for row in same],
        f"What the phrase matches in the image ({measured.split}): red more, blue less similar",
    )
