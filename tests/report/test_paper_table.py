"""A table stays what it is in each format: what is read back is what went in."""

from __future__ import annotations

import csv
import io
import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lightning_xai.report.page import Section, page
from lightning_xai.report.paper_table import Column, PaperTable, Value, latex_escaped, markdown_escaped
from lightning_xai.results.runs import Estimate

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
    Column("γ > 0.5", "coco", percent=True, digits=2, better="up"),
    Column("n", "coco"),
    Column("ρ", "flickr"),
)


def table(baselines: int = len(HOSTILE) - 3) -> PaperTable:
    scores: tuple[Value, ...] = (Estimate(0.51, 0.01, 9), 0.5525, math.nan)
    rows: list[list[Value]] = [[text, score, 1234, -0.5] for text, score in zip(HOSTILE[:3], scores, strict=True)]
    rest: list[list[Value]] = [[text, 1.0, None, math.nan] for text in HOSTILE[3:]]
    return PaperTable("a-table", "Title <b> & _", "Note: 5 % | x", COLUMNS, [*rows, *rest], baselines)


def test_the_csv_holds_full_precision_errors_and_which_rows_are_baselines() -> None:
    rows = list(csv.DictReader(io.StringIO(table().to_csv())))
    assert [row["name"] for row in rows] == HOSTILE
    assert [row["baseline"] for row in rows] == ["0"] * 3 + ["1"] * (len(HOSTILE) - 3)
    assert float(rows[0]["coco: γ > 0.5 [%] ↑"]) == pytest.approx(51)
    assert float(rows[0]["coco: γ > 0.5 [%] ↑ standard error"]) == pytest.approx(1)
    assert (rows[0]["coco: n"], rows[0]["flickr: ρ"]) == ("1234", "-0.5")
    assert rows[1]["coco: γ > 0.5 [%] ↑ standard error"] == ""
    assert (rows[2]["coco: γ > 0.5 [%] ↑"], rows[3]["coco: n"], rows[3]["flickr: ρ"]) == ("", "", "")


def unescaped_markdown(field: str) -> str:
    return unescape(re.sub(r"\\(.)", r"\1", field))


def test_the_markdown_has_the_same_cells_and_no_markup_from_them() -> None:
    text = table().to_markdown()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[field.strip() for field in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == len(COLUMNS) for row in cells)
    assert unescaped_markdown(cells[0][1]) == "coco: γ > 0.5 [%] ↑"
    assert cells[1] == [":---", "---:", "---:", "---:"]
    assert [unescaped_markdown(row[0]) for row in cells[2:]] == [value.replace("\n", " ") for value in HOSTILE]
    assert [row[1] for row in cells[2:5]] == ["51.00 ± 1.00", "**55.25**", "–"]
    assert "<" not in text


def test_the_latex_has_the_same_cells_and_is_balanced() -> None:
    text = table().to_latex()
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    rows = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in body.splitlines() if line.endswith(r"\\")]
    assert r"\multicolumn{2}{c}{coco}" in body
    assert len(rows) == 2 + len(HOSTILE)
    assert all(len(row) == len(COLUMNS) for row in rows[1:])
    # Baselines are below a rule.
    assert body.count(r"\midrule") == 2
    assert body.split(r"\midrule")[2].count(r"\\") == len(HOSTILE) - 3
    assert r"\textbf{55.25}" in text
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


def html(shown: PaperTable) -> ElementTree.Element:
    """The table as the page has it, which is well-formed XML too."""
    found = re.search("<table.*</table>", page("", "", [Section("s", "", (shown,))], ""), re.DOTALL)
    assert found is not None
    return ElementTree.fromstring(found[0])


def cells(tree: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def test_the_html_has_the_same_cells_with_their_values_and_no_tag_from_a_cell() -> None:
    tree = html(table())
    tags = [each.tag for each in tree.iter()]
    assert set(tags) == {"table", "thead", "tbody", "tr", "th", "td", "data", "strong", "span"}
    assert cells(tree)[1] == [column.heading for column in COLUMNS]
    assert [row[0] for row in cells(tree)[2:]] == HOSTILE
    assert [each.get("value") for each in tree.iter("data")][:8:3] == [repr(51.0), repr(55.25), ""]
    assert [each.get("colspan") for each in tree.iter("th")][:3] == ["1", "2", "1"]
    assert tags.count("strong") == 1
    assert tags.count("span") == len(HOSTILE) - 3
    for text in HOSTILE:
        found = cells(html(PaperTable("t", "", "", [*COLUMNS[:1], Column(text)], [[text, 1]])))
        assert (found[0][1], found[1][0]) == (text, text)


def test_ties_as_printed_share_the_bold_and_baselines_never_get_it() -> None:
    def best(values: list[float], baselines: int = 0, better: str = "up") -> list[int]:
        column = Column("x", digits=1, better=better)  # type: ignore[arg-type]
        return sorted(row for row, _ in PaperTable("", "", "", [column], [[v] for v in values], baselines).best)

    assert best([0.51, 0.54, 0.4]) == [0, 1]
    assert best([0.5, 0.7, 0.9], baselines=1) == [1]
    assert best([0.5, 0.7, math.nan], better="down") == [0]
    assert best([0.5, math.nan]) == best([0.5, 0.9], baselines=1) == [], "one alone is not the best"
    with pytest.raises(ValueError, match="expected 4 values in each row, got 1"):
        PaperTable("t", "", "", COLUMNS, [["a"]])


def test_a_terminal_shows_groups_and_words_that_differ_and_turns_what_is_wide() -> None:
    def printed(shown: PaperTable) -> str:
        console = Console(file=io.StringIO(), width=160, color_system=None)
        console.print(shown.to_terminal())
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    upright = printed(table())
    assert re.search(r"coco +coco +flickr", upright)
    assert "**bold** `code` [a](b)" in upright
    wide = PaperTable(
        "t", "T", "", (*COLUMNS[:1], *COLUMNS), [["same", "[red]a", 0.5, 1, 2.0], ["same", "b", 0.6, 1, 3.0]]
    )
    turned = printed(wide)
    assert re.search(r"coco: γ > 0.5 \[%\] ↑ +50.00 +60.00", turned)
    assert "[red]a" in turned
    assert "same" not in turned


def test_a_narrow_terminal_breaks_words_and_no_number() -> None:
    columns = (Column("method", numeric=False), *(Column(f"faithfulness of pairs {i}") for i in range(5)))
    rows: list[list[Value]] = [[f"a_method_of_a_long_name, layers {i}", *[1234567.125] * 5] for i in range(3)]
    for shown in (rows, rows * 2):
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(PaperTable("t", "T", "", columns, shown).to_terminal(), crop=False)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\u2026" not in text
        assert text.count("1234567.125") == 5 * len(shown)
        assert "a_method_of_a_" in text
