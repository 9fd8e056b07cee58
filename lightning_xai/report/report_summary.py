"""A report on the terminal: the tables that tell most, as they stand in the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from lightning_xai.report.html import Section, flat
from lightning_xai.report.paper_table import Cell, PaperTable

__all__ = ["terminal_table", "terminal_tables"]

_SHOWN = ("grounding", "degradation")


def terminal_tables(sections: Sequence[Section]) -> Iterator[Table]:
    """Those of a report's tables that a terminal has room for."""
    for section in sections:
        for block in flat(section.blocks):
            if isinstance(block, PaperTable) and block.name in _SHOWN:
                yield terminal_table(block)


def terminal_table(table: PaperTable) -> Table:
    """A table for papers on the terminal; the best is bold.

    Columns of one and the same word give way to numbers, and what is wider than high is turned.
    """
    shown = Table(title=Text(table.title))
    rows = table.rows
    words = [
        i for i, column in enumerate(table.columns) if not column.numeric and len({row[i].text for row in rows}) > 1
    ]
    numbers = [i for i, column in enumerate(table.columns) if column.numeric]
    if len(numbers) > len(rows):
        shown.add_column("")
        for row in rows:
            shown.add_column(Text("\n".join(row[i].text for i in words)), justify="right")
        for i in numbers:
            shown.add_row(Text(table.columns[i].full_heading), *(_styled(row[i]) for row in rows))
        return shown
    kept = sorted(words + numbers)
    for column in (table.columns[i] for i in kept):
        heading = f"{column.group}\n{column.heading}" if column.group else column.heading
        shown.add_column(Text(heading), justify="right" if column.numeric else "left")
    for body in table.bodies:
        for row in body.rows:
            shown.add_row(*(_styled(row[i]) for i in kept))
        shown.add_section()
    return shown


def _styled(cell: Cell) -> Text:
    return Text(cell.text, style="bold" if cell.best else "")
