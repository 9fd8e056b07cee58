"""Writes a report: the page, its tables as CSV, Markdown and LaTeX, its figures as PNG and SVG."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_xai.report.html import Block, Chart, Section, Sheet, flat, page
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.plots import save_figure
from lightning_xai.report.table_formats import to_csv, to_latex, to_markdown
from lightning_xai.report.tables import replaced_at_once
from lightning_xai.results.schema import write_json

__all__ = ["PAGE_NAME", "write_report"]

PAGE_NAME = "report.html"
_LIST_NAME = "report.json"
_OWN = re.compile(r"(tables|figures)/[a-z0-9][a-z0-9._-]*\.(csv|md|tex|png|svg)")


def write_report(out: Path, title: str, subtitle: str, sections: Sequence[Section], footer: str) -> Path:
    """Write everything below a folder; the page comes last.

    Args:
        out: the folder; the files of an earlier report, which are listed in report.json, are removed.
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
        _remove_earlier(out)
        written = [name for section in sections for block in flat(section.blocks) for name in _write_block(out, block)]
        write_json(out / _LIST_NAME, {"title": title, "files": written})
        _write_text(out / PAGE_NAME, page(title, subtitle, sections, footer))
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error}); choose another --out") from error
    return out / PAGE_NAME


def _write_block(out: Path, block: Block) -> Iterator[str]:
    """Write a table or a figure in each format; the names of the files."""
    if isinstance(block, PaperTable):
        for suffix, text in (("csv", to_csv(block)), ("md", to_markdown(block)), ("tex", to_latex(block))):
            name = f"tables/{block.name}.{suffix}"
            _write_text(out / name, text)
            yield name
    elif isinstance(block, Chart):
        name = f"figures/{block.name}"
        save_figure(block.figure, out / f"{name}.png")
        _write_text(out / f"{name}.svg", block.svg)
        yield from (f"{name}.png", f"{name}.svg")
    elif isinstance(block, Sheet):
        name = f"figures/{block.name}.png"
        with replaced_at_once(out / name) as part:
            Image.fromarray(block.pixels).save(part, compress_level=3)
        yield name


def _remove_earlier(out: Path) -> None:
    """Remove the tables and figures of an earlier report, which may have been about other runs; nothing else."""
    try:
        record: Any = json.loads((out / _LIST_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return
    names = record.get("files") if isinstance(record, dict) else None
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and _OWN.fullmatch(name):
            (out / name).unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with replaced_at_once(path) as part:
        # Captions may hold halves of characters, which JSON allows and UTF-8 does not.
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
