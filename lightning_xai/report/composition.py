"""Which parts a report has: each only where its data are there, and a sentence where they are not.

From runs to the sections of the page (`html`); numbers are made in `summaries`, `comparison` and `effect_size`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from lightning_xai.report.appendix_blocks import appendix_blocks
from lightning_xai.report.comparison import (
    Comparison,
    OrderTest,
    comparison_table,
    options_differ,
    pairs_to_compare,
    why_not,
)
from lightning_xai.report.gallery import Gallery
from lightning_xai.report.gap_blocks import class_groups, gap_blocks
from lightning_xai.report.heat_map_blocks import heat_map_blocks
from lightning_xai.report.html import Block, Chart, Findings, Folded, Note, Section, Sheet
from lightning_xai.report.measured_blocks import (
    degradation_blocks,
    grounding_blocks,
    sign_blocks,
    training_blocks,
)
from lightning_xai.report.paper_table import PaperTable
from lightning_xai.report.summaries import runs_table
from lightning_xai.results.effect_size import knowledge_gaps
from lightning_xai.results.runs import Run
from lightning_xai.results.schema import CONTROLS, MODALITIES

__all__ = ["Composer", "Options"]

_MOST_FINDINGS = 3


@dataclass(frozen=True)
class Options:
    """What a report is asked for.

    Attributes:
        test: how distributions are compared.
        method: label of the method whose gamma tells about classes; None: feature pairs, or else the first.
        min_pairs: how many measured pairs a class needs to be ranked.
    """

    test: OrderTest = field(default_factory=OrderTest)
    method: str | None = None
    min_pairs: int = 10


class Composer:
    """Makes the sections of a report.

    Args:
        runs: at least one.
        options: what is asked for.

    Attributes:
        comparisons: of distributions of gamma, after `sections`.

    Raises:
        ValueError: the method asked for is in none of the runs.
    """

    def __init__(self, runs: Sequence[Run], options: Options) -> None:
        self.runs = runs
        self.options = options
        self.comparisons: list[Comparison] = []
        labels = {grounding.label for run in runs for grounding in run.groundings}
        if options.method is not None and options.method not in labels:
            raise ValueError(
                f"--method {options.method}: none of the runs has it; they have {', '.join(sorted(labels))}"
            )

    def sections(self) -> list[Section]:
        """All parts of the page that there is something to say in."""
        significance, gallery = self._significance(), Gallery(self.runs)
        parts = [
            ("grounding", "Grounding", grounding_blocks(self.runs)),
            ("training", "Training", training_blocks(self.runs)),
            ("signs", "Other objects and hard negatives", sign_blocks(self.runs)),
            ("degradation", "Confidence, ROAR+ and localization", degradation_blocks(self.runs)),
            ("significance", "Significance", significance),
            ("gaps", "Knowledge gaps", gap_blocks(self.runs, gallery, self.options.method, self.options.min_pairs)),
            ("heat-maps", "Heat maps", heat_map_blocks(self.runs, gallery, self.options.method)),
            ("appendix", "Settings and files", appendix_blocks(self.runs)),
        ]
        first = ("overview", "At a glance", self._overview())
        return _with_own_names(
            [Section(name, title, tuple(blocks)) for name, title, blocks in [first, *parts] if blocks]
        )

    def _overview(self) -> list[Block]:
        blocks: list[Block] = [Findings(tuple(self._findings())), runs_table(self.runs)]
        blocks += [Note(f"{run.name}: {sentence}", missing=True) for run in self.runs for sentence in run.missing]
        return blocks

    def _findings(self) -> Iterator[tuple[str, str]]:
        """A few of each kind: the overview has to fit a screen."""
        yield from islice((found for run in self.runs for found in self._grounding_finding(run)), _MOST_FINDINGS)
        told = [each for each in self.comparisons if self._tells_most(each)]
        for each in told[:_MOST_FINDINGS]:
            if each.better is None:
                yield "undecided", f"{each}."
            else:
                yield f"{each.better.name} grounds better", f"than {each.basis}."
        yield from islice((found for run in self.runs for found in _roar_findings(run)), _MOST_FINDINGS)
        for group in class_groups(self.runs, self.options.method)[:_MOST_FINDINGS]:
            worst = knowledge_gaps(group[-1].rows, min_pairs=self.options.min_pairs).classes[:3]
            if worst:
                text = f"are the classes of {group[-1].data} with the lowest mean γ ({group[-1].name})."
                yield ", ".join(found.label for found in worst), text

    def _tells_most(self, comparison: Comparison) -> bool:
        """Whether it is by the method that tells about classes, and of a training from its begin to its end."""
        for run in self.runs:
            if run.name == comparison.first.run == comparison.second.run:
                return {comparison.first, comparison.second} == {run.groundings[0], run.groundings[-1]}
        shown = [run.of_class(self.options.method) for run in self.runs]
        return comparison.first in shown and comparison.second in shown

    def _grounding_finding(self, run: Run) -> Iterator[tuple[str, str]]:
        shown = run.of_class(self.options.method)
        if shown is None or not len(shown.gammas):
            return
        share = f"{100 * float(np.mean(shown.gammas > 0.5)):.1f} %"
        where = f"of {len(shown.gammas):,} phrases on {shown.data} have γ > 0.5 ({run.name}"
        first = run.groundings[0]
        if run.training is not None and first is not shown and len(first.gammas):
            before = f"{100 * float(np.mean(first.gammas > 0.5)):.1f}"
            yield f"{before} → {share}", f"{where}, {first.state} and after {shown.state})."
        else:
            yield share, f"{where}, {shown.label})."

    def _significance(self) -> list[Block]:
        blocks: list[Block] = []
        refused: list[str] = []
        for first, second in pairs_to_compare(self.runs):
            reason = why_not(first, second)
            if reason is not None:
                refused.append(reason)
                continue
            self.comparisons.append(Comparison.of(first, second, self.options.test))
            differing = options_differ(first.options, second.options)
            if differing:
                told = f"{first.name} and {second.name}: options of {first.label} differ ({', '.join(differing)})."
                refused.append(told)
        if self.comparisons:
            blocks.append(comparison_table(self.comparisons, self.options.test))
        blocks += [Note(reason, missing=True) for reason in dict.fromkeys(refused)]
        groundings = any(run.groundings for run in self.runs)
        if not blocks and groundings:
            blocks.append(Note("Give two runs, or a training, to have them compared.", missing=True))
        return blocks


def _roar_findings(run: Run) -> Iterator[tuple[str, str]]:
    """The best method for each modality, where there are two to choose from, controls aside."""
    roar = run.roar
    if roar is None or roar.grid:
        return
    own = [label for label, method in roar.methods.items() if method.method not in CONTROLS]
    for modality in MODALITIES:
        scores = {label: roar.score(label, modality).mean for label in own}
        known = {label: score for label, score in scores.items() if score == score}
        if len(known) > 1:
            best = max(known, key=lambda label: known[label])
            text = f"finds best what the model learns from in the {modality}: ROAR+ {100 * known[best]:.1f} %"
            yield best, f"{text} ({run.name})."


def _with_own_names(sections: Sequence[Section]) -> list[Section]:
    """The sections with names that files and links can have, each of its own, in place of titles."""
    taken: set[tuple[str, str]] = set()

    def named(block: Block) -> Block:
        if isinstance(block, Folded):
            return replace(block, blocks=tuple(map(named, block.blocks)))
        if not isinstance(block, (Chart, Sheet, PaperTable)):
            return block
        kind = "table" if isinstance(block, PaperTable) else "figure"
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", block.name).strip("-.").lower()[:80] or kind
        name = next(n for i in range(len(taken) + 1) if (kind, n := plain + (f"-{i + 1}" if i else "")) not in taken)
        taken.add((kind, name))
        return replace(block, name=name)

    return [replace(section, blocks=tuple(map(named, section.blocks))) for section in sections]
