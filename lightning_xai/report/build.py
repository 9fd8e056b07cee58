"""Build a report from runs: the sections of its page, tables as CSV, Markdown and LaTeX, figures as PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import msgspec
from PIL import Image

from lightning_xai.atomic_file import read_json, replaced_at_once, write_json
from lightning_xai.report.gallery import Gallery
from lightning_xai.report.page import Block, Chart, Folded, HeatMaps, Section, flat, page
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.sections.appendix import appendix_blocks
from lightning_xai.report.sections.gaps import gap_blocks
from lightning_xai.report.sections.heat_maps import heat_map_blocks
from lightning_xai.report.sections.layers import layer_blocks
from lightning_xai.report.sections.masks import mask_blocks
from lightning_xai.report.sections.metric_agreement import agreement_blocks
from lightning_xai.report.sections.metrics import metric_sections
from lightning_xai.report.sections.overview import overview_blocks
from lightning_xai.report.sections.significance import Comparison, OrderTest, compare, significance_blocks
from lightning_xai.report.sections.training import training_blocks
from lightning_xai.results.runs import Run

PAGE_NAME = "report.html"
_LIST_NAME = "report.json"
_OWN = re.compile(r"(tables|figures)/[a-z0-9][a-z0-9._-]*\.(csv|md|tex|png|svg)")


def build_sections(runs: Sequence[Run], test: OrderTest, min_pairs: int = 10) -> tuple[list[Section], list[Comparison]]:
    """Build the report's sections; a section without data becomes a one-line note, or is left out.

    Args:
        runs: of the report.
        test: how distributions are compared.
        min_pairs: how many measured phrases a class needs to be ranked.

    Returns:
        The sections, and the comparisons of distributions of gamma.
    """
    comparisons, refused = compare(runs, test)
    gallery = Gallery(runs)
    sections = [
        Section("overview", "At a glance", overview_blocks(runs, comparisons, min_pairs)),
        *metric_sections(runs),
        Section("layers", "Layers", layer_blocks(runs)),
        Section("masks", "Boxes and masks", mask_blocks(runs, min_pairs)),
        Section("agreement", "Agreement between metrics", agreement_blocks(runs)),
        Section("training", "Training", training_blocks(runs)),
        Section("significance", "Significance", significance_blocks(comparisons, refused, test, runs)),
        Section("gaps", "Knowledge gaps", gap_blocks(runs, gallery, min_pairs)),
        Section("heat-maps", "Heat maps", heat_map_blocks(runs, gallery)),
        Section("appendix", "Settings and files", appendix_blocks(runs)),
    ]
    return named_sections([section for section in sections if section.blocks]), comparisons


def write_report(out: Path, title: str, subtitle: str, sections: Sequence[Section], footer: str) -> Path:
    """Write everything below a folder; the page comes last.

    Args:
        out: the folder; the files of an earlier report, which are listed in report.json, are removed.
        title: of the page.
        subtitle: below it.
        sections: with names of tables and figures that differ.
        footer: at the end.

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


def named_sections(sections: Sequence[Section]) -> list[Section]:
    """Give tables and figures numbers, and all parts unique names that files and links can have."""
    taken: dict[str, set[str]] = {"table": set(), "figure": set(), "section": set()}

    def unique(kind: str, name: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.").lower()[:80] or kind
        found = next(each for i in count(1) if (each := f"{plain}-{i}" if i > 1 else plain) not in taken[kind])
        taken[kind].add(found)
        return found

    def named(block: Block) -> Block:
        if isinstance(block, Folded):
            return replace(block, blocks=tuple(map(named, block.blocks)))
        if not isinstance(block, (Chart, PaperTable)):
            return block
        kind = "table" if isinstance(block, PaperTable) else "figure"
        return replace(block, name=unique(kind, block.name), number=len(taken[kind]))

    return [replace(each, name=unique("section", each.name), blocks=list(map(named, each.blocks))) for each in sections]


def _write_block(out: Path, block: Block) -> Iterator[str]:
    """Write a table or a figure in each format; the names of the files."""
    if isinstance(block, PaperTable):
        for suffix, text in (("csv", block.to_csv()), ("md", block.to_markdown()), ("tex", block.to_latex())):
            name = f"tables/{block.name}.{suffix}"
            _write_text(out / name, text)
            yield name
    elif isinstance(block, Chart):
        if not isinstance(block, HeatMaps):
            name = f"figures/{block.name}.svg"
            _write_text(out / name, block.svg)
            yield name
        name = f"figures/{block.name}.png"
        with replaced_at_once(out / name) as part:
            Image.fromarray(block.pixels).save(part, compress_level=3)
        yield name


def _remove_earlier(out: Path) -> None:
    """Remove the tables and figures of an earlier report, which may have been about other runs; no other files."""
    try:
        names = read_json(out / _LIST_NAME, _Listed).files
    except (FileNotFoundError, ValueError):
        return
    for name in names:
        if _OWN.fullmatch(name):
            (out / name).unlink(missing_ok=True)


class _Listed(msgspec.Struct):
    files: list[str]


def _write_text(path: Path, text: str) -> None:
    with replaced_at_once(path) as part:
        # Captions may hold halves of characters, which JSON allows and UTF-8 does not.
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
