"""A table stays what it is in each format: what is read back is what went in."""

from __future__ import annotations

import csv
import io
import math
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from lightning_xai.report.table_formats import latex_escaped, markdown_escaped, to_csv, to_html, to_latex, to_markdown

from lightning_xai.report.paper_table import Body, Cell, Column, PaperTable, count, estimate, mark_best, number, words
from lightning_xai.results.schema import Estimate

HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "50 % & $x_1$ #{~^}",
    "**bold** `code` [a](b)",
    "back\\slash",
    "two\nlines",
    '"quotes" \'',
    "[3cm]",
    "* starred",
]
COLUMNS = (
    Column("name", numeric=False),
    Column("γ > 0.5 [%] ↑", "coco"),
    Column("n", "coco"),
    Column("ρ [%] ↑", "flickr"),
)


def table() -> PaperTable:
    scores = mark_best([estimate(Estimate((0.5, 0.52))), number(55.25, 1), Cell("–")], "up")
    rows = [(words(text), score, count(1234), number(-0.5)) for text, score in zip(HOSTILE[:3], scores, strict=True)]
    rest = [(words(text), number(1.0), count(None), number(math.nan)) for text in HOSTILE[3:]]
    return PaperTable(
        "a-table", "Title <b> & _", "Note: 5 % | x", COLUMNS, (Body("", tuple(rows)), Body("Controls", tuple(rest)))
    )


def test_the_csv_holds_full_precision_errors_and_the_group_of_each_row() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(table()))))
    assert [row["name"] for row in rows] == HOSTILE
    assert [row["group"] for row in rows] == [""] * 3 + ["Controls"] * (len(HOSTILE) - 3)
    first = rows[0]
    assert float(first["coco: γ > 0.5 [%] ↑"]) == pytest.approx(51)
    assert float(first["coco: γ > 0.5 [%] ↑ standard error"]) == pytest.approx(1)
    assert (first["coco: n"], first["flickr: ρ [%] ↑"]) == ("1234", "-0.5")
    assert rows[1]["coco: γ > 0.5 [%] ↑ standard error"] == ""
    assert (rows[2]["coco: γ > 0.5 [%] ↑"], rows[3]["coco: n"], rows[3]["flickr: ρ [%] ↑"]) == ("", "", "")


def unescaped_markdown(field: str) -> str:
    return unescape(re.sub(r"\\(.)", r"\1", field))


def test_the_markdown_has_the_same_cells_and_no_markup_from_them() -> None:
    text = to_markdown(table())
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[field.strip() for field in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == len(COLUMNS) for row in cells)
    assert unescaped_markdown(cells[0][1]) == "coco: γ > 0.5 [%] ↑"
    assert cells[1] == [":---", "---:", "---:", "---:"]
    assert [unescaped_markdown(row[0]) for row in cells[2:5]] == HOSTILE[:3]
    assert cells[5][0] == "*Controls*"
    assert [unescaped_markdown(row[0]) for row in cells[6:]] == [value.replace("\n", " ") for value in HOSTILE[3:]]
    assert [row[1] for row in cells[2:5]] == ["51.00 ± 1.00", "**55.2**", "–"]
    assert "<" not in text


def test_the_latex_has_the_same_cells_and_is_balanced() -> None:
    text = to_latex(table())
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in body.splitlines() if line.endswith(r"\\")]
    assert rows[0] == [r"\multicolumn{1}{c}{} ", r" \multicolumn{2}{c}{coco} ", r" \multicolumn{1}{c}{flickr}"]
    assert len(rows) == 1 + 1 + 1 + len(HOSTILE)
    assert all(len(row) == len(COLUMNS) for row in rows[1:] if "multicolumn" not in row[0])
    assert r"\textbf{55.2}" in text
    assert r"51.00 $\pm$ 1.00" in text
    plain = re.sub(r"\\[\\{}$&%#_]", "", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert not re.search(r"[#&%_]", re.sub(r"^% needs.*$| & |tab:.*$", "", plain, flags=re.MULTILINE))
    assert text.isascii()


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_a_cell_is_taken_for_latex_or_markdown(text: str) -> None:
    escaped = latex_escaped(text)
    assert not re.search(r"(?<!\\)[%&#_]", escaped)
    assert not re.search(r"(?<!{)[\[*]", escaped), "the end of a row before it takes it for its option"
    assert "\n" not in escaped
    assert unescaped_markdown(markdown_escaped(text)) == text.replace("\n", " ")


class Cells(HTMLParser):
    """Text and attributes of every cell, and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, dict[str, str | None]]]] = []
        self.tags: list[str] = []
        self._inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append(("", dict(attrs)))
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._inside:
            text, attributes = self.rows[-1][-1]
            self.rows[-1][-1] = text + data, attributes


def test_the_html_has_the_same_cells_sortable_headings_and_no_tag_from_a_cell() -> None:
    cells = Cells(to_html(table(), 3))
    assert set(cells.tags) <= {
        "figure",
        "figcaption",
        "b",
        "span",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "button",
        "strong",
    }
    assert [text for text, _ in cells.rows[1]] == [column.heading for column in COLUMNS]
    assert all(attributes["aria-sort"] == "none" for _, attributes in cells.rows[1])
    assert cells.tags.count("button") == len(COLUMNS)
    assert [row[0][0] for row in cells.rows[2:]] == [*HOSTILE[:3], "Controls", *HOSTILE[3:]]
    assert cells.rows[2][0][1]["scope"] == "row"
    assert [row[1][1]["data-value"] for row in cells.rows[2:5]] == [repr(51.0), "55.25", ""]
    assert cells.tags.count("strong") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_bold_stays_text_as_well(text: str) -> None:
    one = PaperTable("t", "", "", COLUMNS[:1], (Body("", ((Cell(text, text, best=True),),)),))
    cells = Cells(to_html(one, 1))
    assert cells.rows[1][0][0] == text
    assert "script" not in cells.tags
    assert f"\\textbf{{{latex_escaped(text)}}}" in to_latex(one)
    assert f"**{markdown_escaped(text)}**" in to_markdown(one)


def test_ties_as_printed_share_the_bold_and_others_than_those_in_question_never_get_it() -> None:
    cells = [number(1.001, 2), number(1.004, 2), number(0.5, 2), number(9, 2), number(math.nan)]
    assert [cell.best for cell in mark_best(cells, "up", among=[0, 1, 2, 4])] == [True, True, False, False, False]
    assert [cell.best for cell in mark_best(cells, "down", among=[0, 1, 2, 4])] == [False, False, True, False, False]
    assert not any(cell.best for cell in mark_best(cells[-2:], "up")), "one value alone is not the best of any"


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 4 cells in each row, got 1"):
        PaperTable("t", "", "", COLUMNS, (Body("", ((words("x"),),)),))
