"""Tables as they are printed in papers, as data: what stands in each cell, in print and as a number.

`table_formats` turns them into CSV, Markdown, LaTeX and HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_xai.report.tables import NO_VALUE
from lightning_xai.results.schema import Estimate

__all__ = ["Body", "Cell", "Column", "PaperTable", "count", "estimate", "mark_best", "number", "percent", "words"]

Value = float | int | str | None
Better = Literal["up", "down"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as it is printed.
        value: what a CSV file holds and sorting goes by, in the unit of the column; None where there is no value.
        error: standard error, in the same unit; NaN for none.
        best: whether it is printed in bold.
    """

    text: str
    value: Value = None
    error: float = math.nan
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        heading: its name, with the unit in brackets and an arrow to the better direction.
        group: stands above this and the neighbouring columns of the same group, such as a data set.
        numeric: numbers stand to the right, words to the left.
    """

    heading: str
    group: str = ""
    numeric: bool = True

    @property
    def full_heading(self) -> str:
        """The heading with its group before it, for where nothing stands above.

        >>> Column("pairs", "coco").full_heading, Column("pairs").full_heading
        ('coco: pairs', 'pairs')
        """
        return f"{self.group}: {self.heading}" if self.group else self.heading


@dataclass(frozen=True)
class Body:
    """Rows that belong together; they are sorted among themselves only.

    Attributes:
        heading: stands above them; empty for none.
        rows: of one cell for each column.
    """

    heading: str
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes:
        name: of its files.
        title: what it shows.
        note: how to read it.
        columns: from left to right.
        bodies: from top to bottom.

    Raises:
        ValueError: a row has not one cell for each column.
    """

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    bodies: tuple[Body, ...]

    def __post_init__(self) -> None:
        for body in self.bodies:
            for row in body.rows:
                if len(row) != len(self.columns):
                    raise ValueError(f"{self.name}: expected {len(self.columns)} cells in each row, got {len(row)}")

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """All rows, without the headings of the bodies."""
        return [row for body in self.bodies for row in body.rows]


def words(text: str) -> Cell:
    """A cell of words."""
    return Cell(text, text)


def count(number: int | None) -> Cell:
    """A cell that says how many.

    >>> count(12345).text
    '12,345'
    """
    return Cell(NO_VALUE) if number is None else Cell(f"{number:,}", number)


def number(value: float, digits: int = 3) -> Cell:
    """A cell of a number as it is; NaN has no value.

    >>> [number(value).text for value in (0.25, -0.25, -0.0001, float("nan"))]
    ['0.250', '−0.250', '0.000', '–']
    """
    if math.isnan(value):
        return Cell(NO_VALUE)
    text = f"{abs(value):.{digits}f}"
    return Cell(f"−{text}" if value < 0 and float(text) else text, value)


def percent(fraction: float, digits: int = 1) -> Cell:
    """A cell of a fraction, in percent.

    >>> percent(0.5512).text
    '55.1'
    """
    return number(100 * fraction, digits)


def estimate(measured: Estimate, *, scale: float = 100, digits: int = 2) -> Cell:
    """A cell of a mean over seeds, with its standard error where there are several; fractions come out in percent.

    >>> estimate(Estimate((0.5, 0.52))).text
    '51.00 ± 1.00'
    """
    cell, error = number(scale * measured.mean, digits), scale * measured.standard_error
    return cell if math.isnan(error) else replace(cell, text=f"{cell.text} ± {error:.{digits}f}", error=error)


def mark_best(cells: Sequence[Cell], better: Better, among: Iterable[int] | None = None) -> list[Cell]:
    """The cells with the best of them marked, and all that print the same mean.

    Args:
        cells: of one row or column.
        better: whether higher or lower is better.
        among: places that take part; None for all. Where fewer than two have a value, nothing is marked.

    >>> [cell.best for cell in mark_best([number(1.0), number(2.0), number(9.0)], "up", among=[0, 1])]
    [False, True, False]
    """
    places = [i for i in (range(len(cells)) if among is None else among) if isinstance(cells[i].value, (int, float))]
    if len(places) < 2:
        return list(cells)
    values = {i: float(cells[i].value or 0) for i in places}
    best = (max if better == "up" else min)(places, key=lambda i: values[i])
    printed = _mean_text(cells[best])
    return [replace(cell, best=i in values and _mean_text(cell) == printed) for i, cell in enumerate(cells)]


def _mean_text(cell: Cell) -> str:
    return cell.text.partition(" ± ")[0]
