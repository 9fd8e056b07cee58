"""Write the results of `objectives`: the long table of each variant, every score in one CSV file, and the page."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_xai.report.build import named_sections, write_report
from lightning_xai.report.gallery import Gallery
from lightning_xai.report.page import Section, flat
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.sections.appendix import appendix_blocks
from lightning_xai.report.sections.heat_maps import heat_map_blocks
from lightning_xai.report.sections.metrics import metric_sections
from lightning_xai.report.sections.objectives import ObjectivesStudy, objective_sections, sentences_on
from lightning_xai.report.sections.significance import OrderTest
from lightning_xai.report.terminal import wide_console
from lightning_xai.results.examples import EXAMPLES_NAME
from lightning_xai.results.objectives import TrainedModel, Variant, changes_from, join_seeds, tidy_scores
from lightning_xai.results.runs import load_runs
from lightning_xai.results.table import write_csv, write_result

__all__ = ["SCORES_NAME", "write_objectives_report"]

SCORES_NAME = "scores.csv"
_SHOWN = ("overview", "not-trained-on", "trained-on", "validation")  # sections whose tables the terminal shows


def write_objectives_report(
    out: Path,
    done: Sequence[TrainedModel],
    base: str,
    objectives: Mapping[str, Any],
    scores: Sequence[str],
    logged: Sequence[str],
    test: OrderTest,
) -> ObjectivesStudy:
    """Join the trials of each variant, compare them with the base, and write and show everything.

    Args:
        out: the output folder: a result folder is written for each of `variants/`, which `report` reads, too.
        done: all finished trials; some of the base.
        base: name of the base.
        objectives: name of each variant -> its objectives, as the config gives them.
        scores: names of the scores to compare.
        logged: names of the logged numbers to compare, where they were logged.
        test: options of the comparison.

    Raises:
        ResultError: a result folder is missing or broken.
        ValueError: a score that no metric has, or trials that do not belong together.
    """
    variants = []
    for name in dict.fromkeys(each.trial.variant for each in done):
        own = [each for each in done if each.trial.variant == name]
        variants.append(join_seeds(out, own, {"objectives": objectives[name]}))
        _write_variant(out, own[0], variants[-1])
    study = compare_variants(variants, base, scores, logged, test)
    write_csv(out / SCORES_NAME, tidy_scores(variants, list(variants[0].record.scores.values())))
    sections = _sections(study, [out / "variants" / variant.name for variant in variants])
    subtitle = f"{len(variants)} variants, {len(done)} trainings: {', '.join(each.name for each in variants)}"
    footer = f"Made by lightning_xai {version('lightning_xai')} from {len(done)} trials."
    page = write_report(out / "report", "What an objective is worth", subtitle, sections, footer)
    _show(sections, study)
    print(f"Saved {out / SCORES_NAME}, tables in {out / 'report' / 'tables'}\nOpen {page}")  # noqa: T201
    return study


def compare_variants(
    variants: Sequence[Variant], base: str, scores: Sequence[str], logged: Sequence[str], test: OrderTest
) -> ObjectivesStudy:
    """Compare all variants with the base.

    Raises:
        ValueError: a score that no metric has.
    """
    first = next(variant for variant in variants if variant.name == base)
    known = first.record.scores
    if unknown := [name for name in scores if name not in known]:
        raise ValueError(f"scores: the judging metrics have no {', '.join(unknown)}; they have {', '.join(known)}")
    if not scores:
        raise ValueError(f"scores has to name at least one of {', '.join(known)}")
    chosen = [known[name] for name in scores]
    there = [name for name in logged if any(variant.logged.get(name) for variant in variants)]
    options = asdict(test)
    changes = [
        change
        for variant in variants
        if variant is not first
        for change in changes_from(first, variant, chosen, there, **options)
    ]
    return ObjectivesStudy(base, variants, chosen, there, changes, test)


def _sections(study: ObjectivesStudy, folders: Sequence[Path]) -> list[Section]:
    runs = load_runs(folders, [variant.name for variant in study.variants])
    sections = [
        *objective_sections(study),
        *metric_sections(runs),
        Section("heat-maps", "Heat maps", heat_map_blocks(runs, Gallery(runs))),
        Section("appendix", "Settings and files", appendix_blocks(runs)),
    ]
    return named_sections([section for section in sections if section.blocks])


def _write_variant(out: Path, first: TrainedModel, variant: Variant) -> None:
    """Write the result folder of a variant, with the examples of its first seed."""
    folder, judged = out / "variants" / variant.name, first.trial.judged(out)
    folder.mkdir(parents=True, exist_ok=True)
    for label in variant.record.methods:
        if (judged / label / EXAMPLES_NAME).is_file():
            (folder / label).mkdir(exist_ok=True)
            shutil.copyfile(judged / label / EXAMPLES_NAME, folder / label / EXAMPLES_NAME)
    if (judged / "examples").is_dir():
        shutil.copytree(judged / "examples", folder / "examples", dirs_exist_ok=True)
    write_result(folder, variant.record, variant.table)


def _show(sections: Sequence[Section], study: ObjectivesStudy) -> None:
    console = wide_console()
    shown = [block for section in sections if section.name in _SHOWN for block in flat(section.blocks)]
    for block in shown:
        if isinstance(block, PaperTable):
            console.print(block.to_terminal(), crop=False)
    for text in (text for variant in study.variants for text in sentences_on(study, variant.name)):
        console.print(text, soft_wrap=True, markup=False, highlight=False)
