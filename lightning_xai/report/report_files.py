"""Writes a report: the page, its tables as CSV, Markdown and LaTeX, its figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lightning_xai.report.charts import svg_text
from lightning_xai.report.html import Chart, Section, Sheet, flat, page
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.plots import save_figure
from lightning_xai.report.table_formats import to_csv, to_latex, to_markdown
from lightning_xai.report.tables import replaced_at_once

__all__ = ["PAGE_NAME", "write_report"]

PAGE_NAME = "report.html"


def write_report(out: Path, title: str, subtitle: str, sections: Sequence[Section], footer: str) -> Path:
    """Write everything below a folder; the page comes last.

    Args:
        out: the folder; files of an earlier report of the same names are replaced.
        title: of the page.
        subtitle: stands below it.
        sections: with names of tables and figures that differ.
        footer: stands at the end.

    Returns:
        The page.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for block in (block for section in sections for block in flat(section.blocks)):
            if isinstance(block, PaperTable):
                for suffix, text in (("csv", to_csv(block)), ("md", to_markdown(block)), ("tex", to_latex(block))):
                    _write_text(out / "tables" / f"{block.name}.{suffix}", text)
            elif isinstance(block, Chart):
                save_figure(block.figure, out / "figures" / f"{block.name}.png")
                _write_text(out / "figures" / f"{block.name}.svg", svg_text(block.figure))
            elif isinstance(block, Sheet):
                with replaced_at_once(out / "figures" / f"{block.name}.png") as part:
                    Image.fromarray(block.pixels).save(part)
        _write_text(out / PAGE_NAME, page(title, subtitle, sections, footer))
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error}); choose another --out") from error
    return out / PAGE_NAME


def _write_text(path: Path, text: str) -> None:
    with replaced_at_once(path) as part:
        # Captions may hold halves of characters, which JSON allows and UTF-8 does not.
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
