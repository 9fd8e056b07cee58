"""A report's tables on the terminal."""

from __future__ import annotations

from dataclasses import replace

from lightning_xai.report.report_summary import terminal_table
from rich.table import Table
from rich.text import Text

from lightning_xai.report.paper_table import Body, Cell, Column, PaperTable, mark_best, number, words

COLUMNS = (Column("run", numeric=False), Column("γ", "coco"), Column("γ", "flickr"), Column("pairs"))


def table_of(*rows: tuple[Cell, ...]) -> PaperTable:
    return PaperTable("grounding", "Grounding", "", COLUMNS, (Body("", rows),))


def cells(table: Table) -> list[list[str]]:
    return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_a_table_that_is_turned_tells_its_groups_apart() -> None:
    best = mark_best([number(0.25), number(0.5)], "up")
    rows = [(words(name), cell, number(1.0), number(7, 0)) for name, cell in zip("ab", best, strict=True)]
    shown = terminal_table(table_of(*rows))
    assert cells(shown) == [["coco: γ", "0.250", "0.500"], ["flickr: γ", "1.000", "1.000"], ["pairs", "7", "7"]]
    assert [str(column.header) for column in shown.columns] == ["", "a", "b"]
    bold = [str(c) for column in shown.columns for c in column.cells if isinstance(c, Text) and c.style == "bold"]
    assert bold == ["0.500"]


def test_a_table_that_stands_upright_has_its_groups_above_the_headings() -> None:
    rows = [(words(name), number(0.25), number(1.0), number(7, 0)) for name in "abc"]
    shown = terminal_table(table_of(*rows))
    assert [str(column.header) for column in shown.columns] == ["run", "coco\nγ", "flickr\nγ", "pairs"]
    assert cells(shown)[0] == ["a", "0.250", "1.000", "7"]
    same = terminal_table(replace(table_of(*rows), bodies=(Body("", tuple((words("a"), *row[1:]) for row in rows)),)))
    assert [str(column.header) for column in same.columns] == ["coco\nγ", "flickr\nγ", "pairs"]
