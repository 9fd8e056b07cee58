"""Results on the terminal: the tables of metrics as the page has them, and those of a ROAR+ with its losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from lightning_xai.report.page import Section, flat
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.sections.layers import layer_tables
from lightning_xai.report.sections.metrics import grid_table, metric_tables
from lightning_xai.results.record import ResultRecord
from lightning_xai.results.roar import LOSS, ORIGINAL, ROAR, roar_result
from lightning_xai.results.runs import Measurement
from lightning_xai.results.table import ResultTable

_LEAST_WIDTH = 110


def wide_console() -> Console:
    """A console on which tables have room: a terminal that breaks lines is better than numbers that are cut short."""
    found = Console()
    return found if found.width >= _LEAST_WIDTH else Console(width=_LEAST_WIDTH)


def report_tables(sections: Sequence[Section]) -> Iterator[Table]:
    """The tables of the metrics of a report, and of layers."""
    for section in sections:
        if section.name.startswith(("metric-", "layers")):
            yield from (block.to_terminal() for block in flat(section.blocks) if isinstance(block, PaperTable))


def result_tables(record: ResultRecord, table: ResultTable) -> Iterator[Table]:
    """A table for each metric of an evaluation, a line for each method; and one by layers and referee, if any."""
    measurement = _measurement(record, table)
    for name in record.metrics:
        yield from (each.to_terminal() for each in metric_tables(name, [measurement], measurement.data))
    yield from (each.to_terminal() for each in layer_tables(measurement))


def roar_tables(record: ResultRecord, table: ResultTable) -> Iterator[Table | str]:
    """Mean and standard error over seeds of (l_c - l_o) / l_o, for a grid a table for each modality, and the losses.

    Args:
        record: of a ROAR+.
        table: its losses.
    """
    measurement = _measurement(*roar_result(record, table))
    found = [each for score in ROAR.scores for each in grid_table(measurement, score)] if record.extra["grid"] else []
    for each in [*metric_tables(ROAR.name, [measurement], measurement.data), *found]:
        yield each.to_terminal()
    values = table.values[(table.values["metric"] == LOSS) & (table.values["method"] == ORIGINAL)]["value"]
    parts = [f"validation loss: base model {record.extra['base_loss']:.4f}"]
    if len(values):
        parts.append(f"retrained on original data {values.mean():.4f}")
    if record.extra["missing"]:
        parts.append(f"{len(record.extra['missing'])} trials are missing")
    yield ", ".join(parts)


def _measurement(record: ResultRecord, table: ResultTable) -> Measurement:
    return Measurement("", "", record, table, str(record.data.get("name") or "unnamed data"))
