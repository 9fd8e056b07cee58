"""A table for papers as CSV, Markdown, LaTeX and HTML. Whatever stands in a cell, it stays text in each of them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby

from lightning_xai.report.paper_table import Cell, Column, PaperTable
from lightning_xai.report.sheet import printable
from lightning_xai.report.tables import csv_field

__all__ = ["latex_escaped", "markdown_escaped", "to_csv", "to_html", "to_latex", "to_markdown"]

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after the end of a row it would be taken for its options, and so would a star
    "*": "{*}",
    '"': '{"}',
    "-": "{-}",  # no ligatures of two or three
    "`": r"\textasciigrave{}",
    "'": "{'}",
    "γ": r"$\gamma$",
    "δ": r"$\delta$",
    "ε": r"$\varepsilon$",
    "ρ": r"$\rho$",
    "β": r"$\beta$",
    "α": r"$\alpha$",
    "σ": r"$\sigma$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "→": r"$\rightarrow$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "ℓ": r"$\ell$",
    "²": r"$^{2}$",
    "−": "$-$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "…": r"\dots{}",
}
_MARKDOWN = {char: f"\\{char}" for char in "\\`*_[]|~#$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def to_csv(table: PaperTable) -> str:
    """Every value at full precision, with a column of standard errors beside each that has some.

    The first column is the heading that a row stands under, where the table has any.
    """
    grouped = any(body.heading for body in table.bodies)
    errors = [any(not math.isnan(row[i].error) for row in table.rows) for i in range(len(table.columns))]
    header = ["group"] if grouped else []
    for column, has_errors in zip(table.columns, errors, strict=True):
        name = column.full_heading
        header += [name, f"{name} standard error"] if has_errors else [name]
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    for body in table.bodies:
        for row in body.rows:
            fields = [body.heading] if grouped else []
            for cell, has_errors in zip(row, errors, strict=True):
                fields.append(csv_field(cell.value))
                if has_errors:
                    fields.append("" if math.isnan(cell.error) else csv_field(cell.error))
            writer.writerow(fields)
    return lines.getvalue()


def to_markdown(table: PaperTable) -> str:
    """A pipe table of GitHub's kind; the best is bold, and groups of columns stand before the headings."""
    lines = [
        f"**{markdown_escaped(table.title)}**",
        "",
        _pipes([markdown_escaped(column.full_heading) for column in table.columns]),
        _pipes(["---:" if column.numeric else ":---" for column in table.columns]),
    ]
    for body in table.bodies:
        if body.heading:
            lines.append(_pipes([f"*{markdown_escaped(body.heading)}*", *[""] * (len(table.columns) - 1)]))
        for row in body.rows:
            texts = [markdown_escaped(cell.text) for cell in row]
            lines.append(_pipes([f"**{t}**" if c.best else t for t, c in zip(texts, row, strict=True)]))
    return "\n".join([*lines, "", markdown_escaped(table.note), ""])


def to_latex(table: PaperTable) -> str:
    r"""A `table` environment that needs the package booktabs; the best is bold."""
    width = len(table.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{latex_escaped(table.title)}. {latex_escaped(table.note)}}}",
        f"\\label{{tab:{re.sub('[^a-z0-9-]', '-', table.name.lower())}}}",
        f"\\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in table.columns)}}}",
        r"\toprule",
    ]
    if any(column.group for column in table.columns):
        spans = column_groups(table.columns)
        lines.append(
            " & ".join(f"\\multicolumn{{{span}}}{{c}}{{{latex_escaped(group)}}}" for group, span in spans) + r" \\"
        )
    lines.append(" & ".join(latex_escaped(column.heading) for column in table.columns) + r" \\")
    for body in table.bodies:
        lines.append(r"\midrule")
        if body.heading:
            lines.append(f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{latex_escaped(body.heading)}}}}} \\\\")
        for row in body.rows:
            texts = [latex_escaped(cell.text) for cell in row]
            bold = (f"\\textbf{{{t}}}" if c.best else t for t, c in zip(texts, row, strict=True))
            lines.append(" & ".join(bold) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def to_html(table: PaperTable, number: int) -> str:
    """A table with headings that sort, in a box of its own that scrolls sideways where the page is narrow."""
    name = escape(table.name)
    head = ""
    if any(column.group for column in table.columns):
        groups = (
            f'<th colspan="{span}" scope="colgroup">{escape(group)}</th>' if group else f'<td colspan="{span}"></td>'
            for group, span in column_groups(table.columns)
        )
        head = f"<tr>{''.join(groups)}</tr>\n"
    headings = (
        f'<th scope="col" aria-sort="none"{_class(column)}><button type="button">{escape(column.heading)}</button></th>'
        for column in table.columns
    )
    parts = [
        f'<figure class="table" id="table-{name}">',
        f'<figcaption id="caption-table-{name}"><b>Table {number}.</b> {escape(table.title)}.'
        f' <span class="note">{escape(table.note)}</span></figcaption>',
        f'<div class="scroll" role="region" aria-labelledby="caption-table-{name}" tabindex="0">',
        f'<table aria-labelledby="caption-table-{name}">\n<thead>\n{head}<tr>{"".join(headings)}</tr>\n</thead>',
    ]
    for body in table.bodies:
        parts.append("<tbody>")
        if body.heading:
            span = len(table.columns)
            parts.append(f'<tr class="group"><th colspan="{span}" scope="rowgroup">{escape(body.heading)}</th></tr>')
        parts += [_html_row(row, table.columns) for row in body.rows]
        parts.append("</tbody>")
    return "\n".join([*parts, "</table>\n</div>\n</figure>"])


def column_groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Neighbouring columns of the same group: its name, and how many."""
    return [(group, len(list(members))) for group, members in groupby(columns, key=lambda column: column.group)]


def latex_escaped(text: str) -> str:
    r"""Text that LaTeX prints as it is.

    >>> latex_escaped("ρ > 50 % of a_b")
    '$\\rho$ \\textgreater{} 50 \\% of a\\_b'
    """
    return "".join(_LATEX.get(char, char) for char in printable(text))


def markdown_escaped(text: str) -> str:
    r"""Text that Markdown prints as it is, HTML included.

    >>> markdown_escaped("<b>|*x*")
    '&lt;b&gt;\\|\\*x\\*'
    """
    return "".join(_MARKDOWN.get(char, char) for char in printable(text))


def _pipes(fields: Sequence[str]) -> str:
    return "| " + " | ".join(fields) + " |"


def _html_row(row: Sequence[Cell], columns: Sequence[Column]) -> str:
    cells = []
    for place, (cell, column) in enumerate(zip(row, columns, strict=True)):
        text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
        value = f' data-value="{escape(csv_field(cell.value))}"' if column.numeric else ""
        start, end = ('<th scope="row"', "</th>") if place == 0 else ("<td", "</td>")
        cells.append(f"{start}{_class(column)}{value}>{text}{end}")
    return f"<tr>{''.join(cells)}</tr>"


def _class(column: Column) -> str:
    return ' class="number"' if column.numeric else ""
