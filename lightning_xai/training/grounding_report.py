"""Tables and pictures of a run's grounding in a folder, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console

from lightning_xai.atomic_file import replaced_at_once
from lightning_xai.attribution.feature_pair import FeaturePairAttribution
from lightning_xai.evaluation.examples import jpeg_of
from lightning_xai.evaluation.logged_pictures import LoggedTable, Picture, logged_pairs
from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import SPEC
from lightning_xai.report.paper_table import LOGGED_COLUMNS, Column, PaperTable, logged_shares, score_column
from lightning_xai.report.plots import GradedMap, curves, graded_picture, progress_sheet, save_figure
from lightning_xai.results.examples import write_examples, write_words
from lightning_xai.results.record import MethodRecord, ResultRecord, layers_in_words, package_versions, state_name

if TYPE_CHECKING:
    from lightning_xai.training.grounding import GroundingPass

__all__ = ["INPUT", "LOGGED", "METHOD", "Reading", "Row", "for_loggers", "show", "write"]

METHOD = "feature_pair"
INPUT = "_input"
"""Ends the names of what was read at the inputs."""
Row = dict[str, Any]
"""A measurement: `epoch` (finished epochs, or `"validate"`, `"test"`), `step`, within an epoch `batch` (how many of its
batches were trained on), `targets`, gamma and rho, the `layers` that they were read at, what the
module logged; on the first rank `excluded`, and `examples` as they were drawn: `keys`, `heats` ([H, W] float32),
`gammas` and `hits`. What was read at the inputs has the same names with `INPUT`; rows of earlier releases lack it.
Tensors and plain values, so that checkpoints can hold it."""

LOGGED = ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho")
"""Scores that the callback logs, besides `grounding_targets`."""


@dataclass(frozen=True)
class Reading:
    """A pair of layers that grounding is read at.

    Attributes:
        label: in the long table.
        suffix: of what is logged: empty, or `INPUT`.
        attribution: at these layers.
        options: of the attribution.
    """

    label: str
    suffix: str
    attribution: FeaturePairAttribution
    options: Mapping[str, Any]

    @property
    def layers(self) -> str:
        """Numbers of the layers, counted from the first."""
        return f"{self.attribution.image.layer},{self.attribution.text.layer}"


def write(folder: Path, rows: Sequence[Row], measured: GroundingPass, about: Mapping[str, Any]) -> dict[str, Path]:
    """Write the result folder of the last of `rows`, which is `measured`, and tables and pictures of all rows together.

    A validation or test outside of training has files with its own names, so that it leaves those of the training as
    they are.

    Args:
        folder: of the run's grounding.
        rows: measurements.
        measured: what the last one was measured from; its rows of all ranks are on the first rank only.
        about: `model`, `data` and `settings` of the record.

    Returns:
        The pictures that there are: `grounding_curves` (of a training), `grounding` (the sheet of heat maps).
    """
    from lightning_xai.results.table import write_csv, write_result

    last = rows[-1]
    training = isinstance(last["epoch"], int)
    suffix = "" if training else f"-{last['epoch']}"
    here = folder / _folder_name(last)
    assert measured.table is not None, "the first rank holds the table"
    write_csv(here / "classes.csv", measured.classes)
    if training and measured.examples:
        _write_examples(folder, here, measured)
    write_result(here, _record(last, measured.readings, about), measured.table)
    # Last of the data: who follows the run takes a line of the summary for a measurement that is there.
    write_csv(folder / f"summary{suffix}.csv", _lines(rows))
    pictures = {}
    if training and any(row["targets"] for row in rows):
        panels = {reading.suffix: _named(reading) for reading in _inputs_first(measured.readings)}
        others = logged_shares({name for row in rows for name in row})
        pictures["grounding_curves"] = folder / "curves.png"
        save_figure(curves(rows, scores=SPEC.scores, panels=panels, others=others), pictures["grounding_curves"])
    if measured.examples:
        pictures["grounding"] = folder / f"progress{suffix}.png"
        save_figure(_progress(rows, measured), pictures["grounding"])
    return pictures


def for_loggers(
    folder: Path, last: Row, measured: GroundingPass, pictures: Mapping[str, Path]
) -> Iterator[Picture | LoggedTable]:
    """Yield what a measurement has for loggers: `pictures`, and tables of its phrases and classes.

    Args:
        folder: of the run's grounding.
        last: the measurement, `measured`.
        measured: what it was measured from.
        pictures: as `write` returns them.
    """
    here, split = folder / _folder_name(last), measured.split
    yield from (Picture(f"{split}/{name}", path) for name, path in pictures.items())
    assert measured.table is not None, "the first rank holds the table"
    maps = {
        (reading.label, example.key, example.caption, example.phrase): graded_picture(
            example, _graded(last["examples"], place, reading.suffix)
        )
        for reading in measured.readings
        for place, example in enumerate(measured.examples)
    }
    yield logged_pairs(f"{split}/grounding_pairs", here / "values.csv", measured.table, maps)
    yield LoggedTable(f"{split}/grounding_classes", here / "classes.csv", measured.classes)


def show(folder: Path, rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the table of grounding, what was excluded from the last measurement, and where to look."""
    from lightning_xai.report.terminal import wide_console

    console = console or wide_console()
    last = rows[-1]
    for suffix in (INPUT, "") if any(f"targets{INPUT}" in row for row in rows) else ("",):
        console.print(_epochs(rows, suffix).to_terminal(), crop=False)
    counts = last["excluded"] | {"broken_records": int(last.get("broken_records", 0))}
    reasons = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in counts.items() if n)
    suffix = "" if isinstance(last["epoch"], int) else f"-{last['epoch']}"
    saved = (folder / f"progress{suffix}.png", folder / f"summary{suffix}.csv")
    # Paths are neither to be wrapped nor to be read as rich's markup.
    for line in (f"Excluded: {reasons or 'nothing'}.", *(f"Saved {path}" for path in saved if path.exists())):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _epochs(rows: Sequence[Row], suffix: str) -> PaperTable:
    """A line for each measurement, of what was read at the inputs or at the last blocks."""
    columns = {f"{score.name}{suffix}": score_column(score) for score in SPEC.scores if score.name in LOGGED}
    columns |= {f"targets{suffix}": Column("targets")}
    if not suffix:
        columns |= {key: column for key, column in LOGGED_COLUMNS.items() if any(key in row for row in rows)}
    cells = [[state_name(row), *(row.get(key) for key in columns)] for row in rows]
    heads = [Column("after", numeric=False), *columns.values()]
    layers = rows[-1].get(f"layers{suffix}")
    where = f", {'inputs' if suffix else 'layers'} ({layers})" if layers else ""
    return PaperTable(f"grounding{suffix}", f"Grounding per epoch{where}", "", heads, cells)


def _write_examples(folder: Path, here: Path, measured: GroundingPass) -> None:
    """Write the examples' maps into the measurement's own folder, and their pictures once for all measurements."""
    for label, records in measured.records.items():
        write_examples(here / label, records)
        write_words(here / label, measured.words[label])
    for record, example in zip(next(iter(measured.records.values())), measured.examples, strict=True):
        # Always written again: an earlier run in this folder may have been of a model that sees another size.
        with replaced_at_once(folder / record.image) as part:
            part.write_bytes(jpeg_of(example.image))


def _inputs_first(readings: Sequence[Reading]) -> Sequence[Reading]:
    return readings[::-1]


def _named(reading: Reading) -> str:
    """Where it was read, for pictures."""
    return f"{layers_in_words(reading.options)} ({reading.layers})"


def _folder_name(row: Row) -> str:
    if isinstance(row["epoch"], str):
        return row["epoch"]
    return f"step={row['step']:08d}" if "batch" in row else f"epoch={row['epoch']:03d}"


def _record(row: Row, readings: Sequence[Reading], about: Mapping[str, Any]) -> ResultRecord:
    state: dict[str, int | str] = {key: row[key] for key in ("epoch", "step", "batch") if key in row}
    measured = {f"{name}{suffix}" for name in ("targets", "excluded", "layers", *LOGGED) for suffix in ("", INPUT)}
    own = {*state, *measured, "examples"}
    return ResultRecord(
        kind="training",
        **about,
        versions=package_versions(),
        methods={
            reading.label: MethodRecord(name=METHOD, options=dict(reading.options), signed=True) for reading in readings
        },
        metrics={SPEC.name: SPEC.record({})},
        state=state,
        logged={name: value for name, value in row.items() if name not in own},
    )


def _lines(rows: Sequence[Row]) -> Any:
    """A frame with a line for each measurement: a column for each reason of exclusion, nothing that is no number."""
    import pandas as pd

    lines = [
        {key: value for key, value in row.items() if key not in ("batch", "examples") and not isinstance(value, dict)}
        for row in rows
    ]
    for suffix in ("", INPUT):
        counts = [row.get(f"excluded{suffix}") for row in rows]
        reasons = [why.key for why in Exclusion if any(found and found.get(why.key) for found in counts)]
        for line, found in zip(lines, counts, strict=True):
            if found is not None:
                line |= {f"excluded_{why}{suffix}": found.get(why, 0) for why in reasons}
    return pd.DataFrame(lines)


def _progress(rows: Sequence[Row], measured: GroundingPass) -> Figure:
    """The examples' heat maps, those at the inputs above; a column for each measurement that drew the same ones."""
    readings = _inputs_first(measured.readings)
    keys, drawn = rows[-1]["examples"]["keys"], f"heats{readings[0].suffix}"
    same = [row for row in rows if row["examples"]["keys"] == keys and drawn in row["examples"]]
    examples = [
        replace(example, caption=f"{example.caption}   –   {_named(reading)}")
        if place == 0
        else replace(example, caption=_named(reading), spans=())
        for example in measured.examples
        for place, reading in enumerate(readings)
    ]
    maps = [
        [
            _graded(row["examples"], number, reading.suffix)
            for number in range(len(measured.examples))
            for reading in readings
        ]
        for row in same
    ]
    title = f"What the phrase matches in the image ({measured.split}): red more, blue less similar"
    return progress_sheet(examples, maps, [state_name(row) for row in same], title)


def _graded(drawn: Mapping[str, Any], number: int, suffix: str) -> GradedMap:
    heat, gamma, hit = (drawn[f"{name}{suffix}"][number] for name in ("heats", "gammas", "hits"))
    return GradedMap(heat.numpy(), gamma, hit)
