"""Tables as papers print them: plain values with a description of each column, as CSV, Markdown and LaTeX.

pandas' Styler lays them out; on the page, `page.html.j2` does. Text stays text in each format, whatever it holds.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_xai.report.sheet import printable
from lightning_xai.results.record import Better, Score
from lightning_xai.results.runs import Estimate

NO_VALUE = "–"
Value = str | int | float | Estimate | None
_NARROW, _HEADING = 18, 13  # characters of a name, and of a number's heading, that stay on one line of a terminal
_ARROWS = {"up": " ↑", "down": " ↓", None: ""}
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "²": r"$^{2}$",
    "−": "$-$",
    "–": "--",
    "…": r"\dots{}",
    **{char: f"\\{char}" for char in "{}$&%#_"},
    # After the end of a row a bracket would be read as its options, and so would a star; the others join to ligatures.
    **{char: f"{{{char}}}" for char in "[*\"-'"},
    **dict(zip("γδερβασΔ±≥≤→↑↓ℓ·×", [
        *(f"$\\{name}$" for name in ("gamma", "delta", "varepsilon", "rho", "beta", "alpha", "sigma", "Delta", "pm")),
        *(f"$\\{name}$" for name in ("geq", "leq", "rightarrow", "uparrow", "downarrow", "ell", "cdot", "times")),
    ], strict=True)),
}  # fmt: skip
_MARKDOWN = {char: f"\\{char}" for char in "\\`*_[]|~#$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its heading, without unit and arrow.
        group: above this and the neighbouring columns of the same group.
        numeric: numbers stand to the right, words to the left.
        percent: whether values are fractions that are printed in percent.
        digits: after the point.
        signed: whether positive numbers have a plus.
        better: whether larger or smaller values are better; the best of the column is bold.
    """

    name: str
    group: str = ""
    numeric: bool = True
    percent: bool = False
    digits: int = 3
    signed: bool = False
    better: Better | None = None

    @property
    def heading(self) -> str:
        """The name with the unit and an arrow to the better direction.

        >>> Column("ρ", percent=True, better="up").heading
        'ρ [%] ↑'
        """
        return f"{self.name}{' [%]' if self.percent else ''}{_ARROWS[self.better]}"

    @property
    def full_heading(self) -> str:
        """The heading with its group before it, where nothing is above."""
        return f"{self.group}: {self.heading}" if self.group else self.heading

    def numbers(self, value: Value) -> tuple[float, float]:
        """A value and its standard error in the unit of the column; NaN for none."""
        if value is None or isinstance(value, str):
            return math.nan, math.nan
        mean, error = (value.mean, value.error) if isinstance(value, Estimate) else (value, math.nan)
        return (100 * mean, 100 * error) if self.percent else (mean, error)

    def text(self, value: Value) -> str:
        """A value as it is printed.

        >>> column = Column("ρ", percent=True, digits=1)
        >>> [column.text(value) for value in (0.5512, Estimate(0.5, 0.01, 9), float("nan"), None, "a")]
        ['55.1', '50.0 ± 1.0', '–', '–', 'a']
        >>> Column("n").text(12345), Column("x").text(-0.25), Column("x").text(-0.0001)
        ('12,345', '−0.250', '0.000')
        """
        if isinstance(value, str):
            return value
        mean, error = self.numbers(value)
        if math.isnan(mean):
            return NO_VALUE
        if isinstance(value, int) and not self.percent:
            return f"{value:,}"
        size = f"{abs(mean):.{self.digits}f}"
        sign = "" if not float(size) else "−" if mean < 0 else "+" if self.signed else ""
        return f"{sign}{size}" if math.isnan(error) else f"{sign}{size} ± {error:.{self.digits}f}"


def score_column(score: Score, group: str = "") -> Column:
    """The column of a score."""
    return Column(score.heading, group, percent=score.percent, digits=1 if score.percent else 4, better=score.better)


LOGGED_COLUMNS = {
    "loss": Column("loss", better="down"),
    "image_to_text_recall_at_1": Column("i→t R@1", percent=True, digits=1, better="up"),
    "text_to_image_recall_at_1": Column("t→i R@1", percent=True, digits=1, better="up"),
    "zero_shot_accuracy": Column("zero-shot", percent=True, digits=1, better="up"),
    "caption_choice": Column("caption choice", percent=True, digits=1, better="up"),
    "caption_choice_sugarcrepe": Column("SugarCrepe", percent=True, digits=1, better="up"),
    "caption_choice_aro": Column("ARO", percent=True, digits=1, better="up"),
    "winoground_group": Column("Winoground group", percent=True, digits=1, better="up"),
}
"""Columns of what `ContrastiveModule` and callbacks log in addition to grounding, the most important, by name."""


def logged_shares(names: Collection[str]) -> dict[str, str]:
    """The headings of those of `LOGGED_COLUMNS` among some names that are fractions, for curves.

    >>> logged_shares(["loss", "zero_shot_accuracy"])
    {'zero_shot_accuracy': 'zero-shot'}
    """
    return {name: column.name for name, column in LOGGED_COLUMNS.items() if column.percent and name in names}


@dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes:
        name: of its files.
        title: above it.
        note: how to read it.
        columns: from left to right; headings within a group differ.
        rows: of one value for each column.
        baselines: how many of the last rows are of methods that ignore the model; the best is among the others.
        number: in the page.

    Raises:
        ValueError: a row has not one value for each column.
    """

    name: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    baselines: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.name}: expected {len(self.columns)} values in each row, got {len(row)}")

    @cached_property
    def texts(self) -> list[list[str]]:
        """The rows as they are printed."""
        return [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]

    @cached_property
    def best(self) -> set[tuple[int, int]]:
        """Row and column of what is bold: the best of a column, and all that print the same mean."""
        found = set()
        for place, column in enumerate(self.columns):
            own = range(len(self.rows) - self.baselines)
            values = {i: column.numbers(self.rows[i][place])[0] for i in own}
            values = {i: value for i, value in values.items() if not math.isnan(value)}
            if column.better is None or len(values) < 2:
                continue
            best = (max if column.better == "up" else min)(values, key=lambda i: values[i])
            printed = self.texts[best][place].partition(" ± ")[0]
            found |= {(i, place) for i in values if self.texts[i][place].partition(" ± ")[0] == printed}
        return found

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups of columns from left to right, and how many columns each has; none where no column has one."""
        found = [(group, len(list(own))) for group, own in groupby(column.group for column in self.columns)]
        return found if any(group for group, _ in found) else []

    def to_csv(self) -> str:
        """Every value with all its digits, with a column of standard errors after each that has some."""
        columns: dict[str, list[Value]] = {}
        for place, column in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            numbers = [column.numbers(cell) for cell in cells]
            plain: list[Value] = [c if isinstance(c, str) or (isinstance(c, int) and not column.percent) else n[0]
                     for c, n in zip(cells, numbers, strict=True)]  # fmt: skip
            columns[column.full_heading] = plain
            if any(not math.isnan(error) for _, error in numbers):
                columns[f"{column.full_heading} standard error"] = [error for _, error in numbers]
        if self.baselines:
            columns["baseline"] = [int(self.is_baseline(row)) for row in range(len(self.rows))]
        return str(pd.DataFrame(columns, dtype=object).to_csv(index=False, lineterminator="\n"))

    def to_markdown(self) -> str:
        """A pipe table of GitHub's kind; the best is bold, and groups of columns are before the headings."""
        frame = self._frame(markdown_escaped, "**{}**")
        frame.columns = pd.Index([markdown_escaped(column.full_heading) for column in self.columns])
        lines = frame.style.hide(axis="index").to_string(delimiter=" | ").splitlines()
        lines.insert(1, " | ".join("---:" if column.numeric else ":---" for column in self.columns))
        title, note = markdown_escaped(self.title), markdown_escaped(self.note)
        return "\n".join([f"**{title}**", "", *(f"| {line.strip()} |" for line in lines), "", note, ""])

    def to_latex(self) -> str:
        r"""A `table` environment that needs the package booktabs; the best is bold, and baselines are below a rule."""
        text = self._frame(latex_escaped, "\\textbf{{{}}}").style.hide(axis="index").to_latex(
            column_format="".join("r" if column.numeric else "l" for column in self.columns),
            caption=f"{latex_escaped(self.title)}. {latex_escaped(self.note)}",
            label=f"tab:{re.sub('[^a-z0-9-]', '-', self.name.lower())}",
            position_float="centering",
            multicol_align="c",
            hrules=True,
        )  # fmt: skip
        lines = text.splitlines()
        if 0 < self.baselines < len(self.rows):
            lines.insert(lines.index(r"\bottomrule") - self.baselines, r"\midrule")
        return "\n".join([r"% needs \usepackage{booktabs}", *lines, ""])

    def to_terminal(self) -> Table:
        """A table for `rich`; the best is bold.

        Columns of one and the same word give way to numbers, and a table that is wider than high is turned. Where width
        is short, words break; numbers never do, so print it with `crop=False`.
        """
        shown = Table(title=Text(self.title), box=SIMPLE_HEAD, padding=(0, 1))
        texts = [
            [Text(text, style="bold" if (i, place) in self.best else "") for place, text in enumerate(row)]
            for i, row in enumerate(self.texts)
        ]
        one = len(self.rows) == 1
        several = {i for i in range(len(self.columns)) if one or len({row[i] for row in self.texts}) > 1}
        words = [place for place, column in enumerate(self.columns) if not column.numeric and place in several]
        numbers = [place for place, column in enumerate(self.columns) if column.numeric]
        if len(numbers) > len(self.rows):
            names = [self.columns[place].full_heading for place in numbers]
            _add_column(shown, "", names, numeric=False)
            for printed in self.texts:
                heading = "\n".join(printed[place] for place in words)
                _add_column(shown, heading, [printed[place] for place in numbers], numeric=True)
            for name, place in zip(names, numbers, strict=True):
                shown.add_row(Text(name), *(row[place] for row in texts))
            return shown
        kept = sorted(words + numbers)
        for place in kept:
            column = self.columns[place]
            heading = f"{column.group}\n{column.heading}" if column.group else column.heading.replace(" [%]", "\n[%]")
            _add_column(shown, heading, [row[place] for row in self.texts], numeric=column.numeric)
        for i, row in enumerate(texts):
            shown.add_row(*(row[place] for place in kept), end_section=i == len(texts) - self.baselines - 1)
        return shown

    def is_baseline(self, row: int) -> bool:
        """True for the rows of methods that ignore the model."""
        return row >= len(self.rows) - self.baselines

    def _frame(self, escaped: Callable[[str], str], bold: str) -> pd.DataFrame:
        """The printed texts, escaped, under their escaped headings."""
        rows = [
            [bold.format(text) if (i, place) in self.best else text for place, text in enumerate(map(escaped, row))]
            for i, row in enumerate(self.texts)
        ]
        headings = [(escaped(column.group), escaped(column.heading)) for column in self.columns]
        groups = any(column.group for column in self.columns)
        index = pd.MultiIndex.from_tuples(headings) if groups else pd.Index([heading for _, heading in headings])
        return pd.DataFrame(rows, columns=index, dtype=object)


def latex_escaped(text: str) -> str:
    r"""Return text that LaTeX prints as it is.

    >>> latex_escaped("ρ > 50 % of a_b")
    '$\\rho$ \\textgreater{} 50 \\% of a\\_b'
    """
    return "".join(_LATEX.get(char, char) for char in printable(text))


def markdown_escaped(text: str) -> str:
    r"""Return text that Markdown prints as it is, HTML included.

    >>> markdown_escaped("<b>|*x*")
    '&lt;b&gt;\\|\\*x\\*'
    """
    return "".join(_MARKDOWN.get(char, char) for char in printable(text))


def _add_column(table: Table, heading: str, cells: Sequence[str], *, numeric: bool) -> None:
    """Add a column to a terminal's table: of numbers, which stay whole, or of words, which break."""
    widest = max(map(len, cells), default=0)
    least = min(widest, _NARROW)
    if numeric:
        lines = heading.split("\n")
        least = max(widest, *map(len, heading.split()), *(min(len(line), _HEADING) for line in lines))
        heading = "\n".join(part for line in lines for part in textwrap.wrap(line, least) or [""])
    side: Literal["left", "right"] = "right" if numeric else "left"
    table.add_column(Text(heading), justify=side, overflow="fold", no_wrap=numeric, min_width=least)
