"""A report on the terminal: the tables that tell most, as they stand in the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from lightning_xai.report.html import Section, flat
from lightning_xai.report.paper_table import PaperTable

__all__ = ["terminal_table", "terminal_tables"]

_SHOWN = ("grounding", "degradation")


def terminal_tables(sections: Sequence[Section]) -> Iterator[Table]:
    """Those of a report's tables that a terminal has room for."""
    for section in sections:
        for block in flat(section.blocks):
            if isinstance(block, PaperTable) and block.name in _SHOWN:
                yield terminal_table(block)


def terminal_table(table: PaperTable) -> Table:
    """A table for papers on the terminal; the best is bold."""
    shown = Table(title=Text(table.title))
    for column in table.columns:
        heading = f"{column.group}\n{column.heading}" if column.group else column.heading
        shown.add_column(Text(heading), justify="right" if column.numeric else "left")
    for body in table.bodies:
        for row in body.rows:
            shown.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
        shown.add_section()
    return shown
