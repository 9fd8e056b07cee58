"""Which parts a report has: each only where its data are there, and a sentence where they are not.

From runs to the sections of the page (`html`); numbers are made in `summaries`, `comparison` and `effect_size`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from lightning_xai.report.charts import (
    Sample,
    class_bars,
    cumulative_gammas,
    delta_distributions,
    dressed,
    roar_bars,
    sign_bars,
)
from lightning_xai.report.comparison import (
    Comparison,
    OrderTest,
    comparison_table,
    options_differ,
    pairs_to_compare,
    why_not,
)
from lightning_xai.report.effect_size import GroundingChange, grounding_change, knowledge_gaps
from lightning_xai.report.gallery import Gallery
from lightning_xai.report.gaps import change_table, class_table
from lightning_xai.report.html import Block, Chart, Code, Findings, Folded, Heading, Note, Section, Sheet
from lightning_xai.report.paper_table import Body, Column, PaperTable, count, words
from lightning_xai.report.plots import curves
from lightning_xai.report.results import MODALITIES, ExampleRecord, ResultError
from lightning_xai.report.runs import CONTROLS, Grounding, Run, by_data
from lightning_xai.report.summaries import (
    degradation_table,
    grid_tables,
    grounding_table,
    hard_negatives_table,
    left_out_table,
    progress_table,
    runs_table,
    signs_table,
)

__all__ = ["Composer", "Options"]

_MOST_CHANGES = 5
_MOST_COMPARED = 4  # bars beside each other for one class
_MOST_FINDINGS = 3
_WIDE_SHEET = 12


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
        self.gallery = Gallery(runs)
        self.comparisons: list[Comparison] = []
        labels = {grounding.label for run in runs for grounding in run.groundings}
        if options.method is not None and options.method not in labels:
            raise ValueError(
                f"--method {options.method}: none of the runs has it; they have {', '.join(sorted(labels))}"
            )

    def sections(self) -> list[Section]:
        """All parts of the page that there is something to say in."""
        significance = self._significance()
        parts = [
            ("grounding", "Grounding", self._grounding()),
            ("training", "Training", self._training()),
            ("signs", "Other objects and hard negatives", self._signs()),
            ("degradation", "Confidence, ROAR+ and localization", self._degradation()),
            ("significance", "Significance", significance),
            ("gaps", "Knowledge gaps", self._gaps()),
            ("heat-maps", "Heat maps", self._heat_maps()),
            ("appendix", "Settings and files", self._appendix()),
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
            yield ("undecided" if each.better is None else f"{each.better.name} grounds better"), f"{each}."
        yield from islice((found for run in self.runs for found in _roar_findings(run)), _MOST_FINDINGS)
        for group in self._class_groups()[:_MOST_FINDINGS]:
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

    def _grounding(self) -> list[Block]:
        table = grounding_table(self.runs)
        if table is None:
            return [Note("None of the runs measured grounding.", missing=True)]
        blocks: list[Block] = [table]
        for title, panels in self._curves():
            shares = (
                f"{name} {each.name} {100 * float(np.mean(each.values > 0.5)):.1f} %"
                for name, samples in panels.items()
                for each in samples
            )
            blocks.append(
                Chart(
                    f"gamma-{title}",
                    f"Cumulative distributions of γ, {title}",
                    "The higher a curve, the better the grounding. Dotted: the thresholds of the table.",
                    f"Curves of the share of phrases above each γ. Above 0.5: {', '.join(shares)}.",
                    cumulative_gammas(panels, title),
                )
            )
        return blocks

    def _curves(self) -> Iterator[tuple[str, dict[str, list[Sample]]]]:
        """Which groundings share a figure: a run's methods or states, and for each data set the runs by method."""
        ends: list[Grounding] = []
        for run in self.runs:
            there = [each for each in run.groundings if len(each.gammas)]
            ends += there[-1:] if run.training is not None else [each for each in there if not each.is_control]
            if len(there) > 1 or len(self.runs) == 1:
                named = [Sample(each.state or each.label, each.gammas, each.is_control) for each in there]
                yield f"{run.name} on {run.data}", {"": named}
        for group in by_data(ends):
            panels: dict[str, list[Sample]] = {}
            for each in group:
                panels.setdefault(each.label, []).append(Sample(each.name, each.gammas))
            shared = {label: samples for label, samples in panels.items() if len(samples) > 1}
            if shared:
                yield f"runs side by side on {group[0].data}", shared

    def _training(self) -> list[Block]:
        blocks: list[Block] = []
        for run in self.runs:
            table = progress_table(run)
            if table is None or run.training is None:
                continue
            blocks.append(table)
            measured = [row for row in run.training.summary if isinstance(row["epoch"], int) and row["pairs"]]
            if measured:
                first, last = (100 * float(row["gamma_above_50"]) for row in (measured[0], measured[-1]))
                alt = f"Curves over {len(measured)} measurements; γ above 0.5 goes from {first:.1f} to {last:.1f} %."
                title = f"Grounding of {run.name} by epoch"
                blocks.append(
                    Chart(
                        f"curves-{run.name}", title, "Measured on the validation split.", alt, dressed(curves(measured))
                    )
                )
        return blocks

    def _signs(self) -> list[Block]:
        blocks: list[Block] = [table for make in (signs_table, hard_negatives_table) if (table := make(self.runs))]
        bars = [
            (f"{run.name}: {label}", method.estimate("own_positive").mean, 1 - method.estimate("other_negative").mean)
            for run in self.runs
            if run.evaluation is not None
            for label, method in run.evaluation.methods.items()
            if "own_positive" in method.metrics and method.method not in CONTROLS
        ]
        if bars:
            alt = "; ".join(f"{name}: own {100 * own:.0f} % positive, other {100 * o:.0f} %" for name, own, o in bars)
            note = "Pale bars are negative. A zero counts as positive."
            title = "Signs of the attribution to the own and to another object"
            blocks.append(Chart("signs", title, note, alt, sign_bars(bars, title)))
        deltas = _deltas(self.runs)
        if deltas:
            title = "Distribution of δ for hard negative captions"
            note = "Each method's maps have a scale of their own; the outermost bins hold what lies beyond."
            below = (
                f"{method}, {each.name}: {100 * float(np.mean(each.values < 0)):.0f} % below 0"
                for method, samples in deltas.items()
                for each in samples
            )
            blocks.append(Chart("delta", title, note, "; ".join(below), delta_distributions(deltas, title)))
        if not blocks and any(run.evaluation for run in self.runs):
            return [
                Note("No run has signed methods measured on captions with two objects or hard negatives.", missing=True)
            ]
        return blocks

    def _degradation(self) -> list[Block]:
        table = degradation_table(self.runs)
        blocks: list[Block] = [] if table is None else [table]
        for run in self.runs:
            if run.roar is None:
                continue
            roar = run.roar
            if roar.missing:
                some = ", ".join(roar.missing[:6]) + (", …" if len(roar.missing) > 6 else "")
                note = f"{run.name}: {len(roar.missing)} of the retrainings have not been run yet: {some}."
                blocks.append(Note(note, missing=True))
            scores = {
                modality: {
                    label: score for label in roar.methods if (score := roar.score(label, modality)).mean == score.mean
                }
                for modality in MODALITIES
            }
            scores = {modality: found for modality, found in scores.items() if found}
            if scores and not roar.grid:
                controls = [label for label, method in roar.methods.items() if method.method in CONTROLS]
                alt = "; ".join(
                    f"{modality}: " + ", ".join(f"{label} {100 * score.mean:.1f} %" for label, score in found.items())
                    for modality, found in scores.items()
                )
                title = f"ROAR+ of {run.name} on {run.data}"
                note = "Rise of the validation loss after retraining without what a method finds important."
                blocks.append(Chart(f"roar-{run.name}", title, note, alt, roar_bars(scores, controls, title)))
        return [*blocks, *grid_tables(self.runs)]

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

    def _gaps(self) -> list[Block]:
        blocks: list[Block] = []
        for group in self._class_groups():
            gaps = {each.name: knowledge_gaps(each.rows, min_pairs=self.options.min_pairs) for each in group}
            ranked = {name: found for name, found in gaps.items() if found.classes}
            about = f"{group[0].label} on {group[0].data}"
            if not ranked:
                note = f"{about}: no class has {self.options.min_pairs} measured pairs; see --min-pairs."
                blocks.append(Note(note, missing=True))
                continue
            blocks.append(_class_chart(ranked, about))
            worst = next(iter(ranked.values())).classes[:3]
            told = ", ".join(f"{found.label} ({found.gamma_mean:.2f})" for found in worst)
            blocks.append(Note(f"Grounded worst in {next(iter(ranked))}, by mean γ: {told}."))
            name, title = f"classes-{about}", f"Classes by γ ({about})"
            table = class_table(ranked, name=name, title=title, min_pairs=self.options.min_pairs)
            blocks.append(Folded(f"Table of {len(table.rows)} classes", (table,)))
            blocks += [block for second in group[1:] for block in self._change(group[0], second)]
        return blocks

    def _class_groups(self) -> list[list[Grounding]]:
        """Groundings on the same phrases by the method that tells about classes, the first of each the one before."""
        found: list[Grounding] = []
        for run in self.runs:
            shown = run.of_class(self.options.method)
            if shown is not None:
                found += dict.fromkeys([run.groundings[0], shown] if run.training is not None else [shown])
        return _by_method_and_data(found)

    def _change(self, before: Grounding, after: Grounding) -> Iterator[Block]:
        yield Heading(f"From {before.name} to {after.name}")
        try:
            change = grounding_change(before.rows, after.rows, min_pairs=self.options.min_pairs)
        except ValueError as error:
            yield Note(f"{before.name} and {after.name} cannot be compared by class: {error}.", missing=True)
            return
        table = change_table(
            change,
            name=f"change-{before.name}-{after.name}",
            title=f"What changed from {before.name} to {after.name} ({after.label} on {after.data})",
            before=before.state or before.run,
            after=after.state or after.run,
            most=_MOST_CHANGES,
        )
        if table is None:
            yield Note(f"No class has {self.options.min_pairs} measured pairs on both sides.", missing=True)
            return
        yield table
        if before.run != after.run:
            yield from self._changed_examples(change, before, after)

    def _changed_examples(self, change: GroundingChange, before: Grounding, after: Grounding) -> Iterator[Block]:
        columns = {each.name: (each.run, each.label) for each in (before, after)}
        for what, changes in (("gained", change.gains(_MOST_CHANGES)), ("lost", change.losses(_MOST_CHANGES))):
            labels = {each.label for each in changes}
            if not labels:
                continue
            title = f"Classes that {what} most from {before.name} to {after.name}"
            found = self.gallery.side_by_side(columns, _of_classes(labels), title)
            if found is None:
                yield Note(f"{title}: the runs share no example of {', '.join(sorted(labels))}.", missing=True)
                continue
            sheet, rows = found
            alt = f"Heat maps of {rows} phrases of the classes {', '.join(sorted(labels))} in both runs."
            yield Sheet(f"examples-{what}-{after.name}", title, "Fixed examples of these classes.", alt, sheet)

    def _heat_maps(self) -> list[Block]:
        blocks: list[Block] = []
        for run in self.runs:
            blocks += [*self._fixed(run), *_training_sheet(run), *self._failures(run)]
        blocks += self._fixed_of_runs()
        if self.gallery.faults:
            where, why = next(iter(self.gallery.faults.items()))
            told = f"{len(self.gallery.faults)} examples cannot be drawn, the first of them {where}: {why}."
            blocks.append(Note(told, missing=True))
        return blocks

    def _fixed(self, run: Run) -> Iterator[Block]:
        labels = [label for label, records in run.examples.items() if any("fixed" in record.why for record in records)]
        found = self.gallery.side_by_side(
            {label: (run.name, label) for label in labels[:_WIDE_SHEET]}, _is_fixed, f"{run.name}: fixed examples"
        )
        if found is not None:
            sheet, rows = found
            note = "The first phrases of the split, whatever the model."
            alt = f"Heat maps of {rows} phrases by {', '.join(labels[:_WIDE_SHEET])}."
            yield Sheet(f"fixed-{run.name}", f"Heat maps of {run.name} by method", note, alt, sheet)

    def _fixed_of_runs(self) -> Iterator[Block]:
        """The same examples in several runs, by the method that tells about classes."""
        shown = [each for run in self.runs if run.examples and (each := run.of_class(self.options.method)) is not None]
        for first, *others in _by_method_and_data(shown):
            group = [first, *others]
            columns = {each.name: (each.run, each.label) for each in group}
            found = self.gallery.side_by_side(columns, _is_fixed, "The same phrases in each run") if others else None
            if found is not None:
                title = f"The same phrases in each run ({first.label} on {first.data})"
                alt = f"Heat maps of {found[1]} phrases in {', '.join(columns)}."
                yield Sheet(f"fixed-runs-{first.data}", title, "The first phrases of the split.", alt, found[0])

    def _failures(self, run: Run) -> Iterator[Block]:
        own = [
            label for label in run.examples if run.evaluation and run.evaluation.methods[label].method not in CONTROLS
        ]
        shown = run.of_class(self.options.method)
        own.sort(key=lambda label: shown is None or label != shown.label)
        for place, label in enumerate(own):
            title = f"Lowest γ in {run.name} by {label}"
            found = self.gallery.worst(run.name, label, title)
            if found is None:
                continue
            alt = f"{found[1]} phrases with the lowest γ, with their heat maps."
            sheet = Sheet(f"failures-{run.name}-{label}", title, "Each of another image.", alt, found[0])
            yield Folded(f"Failures of {label} ({run.name})", (sheet,)) if place else sheet

    def _appendix(self) -> list[Block]:
        table = left_out_table(self.runs)
        blocks: list[Block] = [] if table is None else [table]
        for run in self.runs:
            if run.training is not None:
                text = run.training.config or "No config.yaml lies in the folder."
            else:
                result = run.evaluation or run.roar
                text = json.dumps(_record(result), indent=2, ensure_ascii=False, default=str)
            blocks.append(Folded(f"Settings and versions of {run.name}", (Code(text),)))
        blocks.append(Folded("Files that were read", (_files_table(self.runs),)))
        return blocks


def _roar_findings(run: Run) -> Iterator[tuple[str, str]]:
    for modality in MODALITIES if run.roar is not None and not run.roar.grid else ():
        scores = {label: run.roar.score(label, modality).mean for label in run.roar.methods} if run.roar else {}
        known = {label: score for label, score in scores.items() if score == score}
        if known:
            best = max(known, key=lambda label: known[label])
            text = f"finds best what the model learns from in the {modality}: ROAR+ {100 * known[best]:.1f} %"
            yield best, f"{text} ({run.name})."


def _deltas(runs: Sequence[Run]) -> dict[str, list[Sample]]:
    """Method -> deltas of each run, of the first seed; without controls."""
    found: dict[str, list[Sample]] = {}
    for run in runs:
        for label, tables in run.tables.items():
            rows = tables.get("hard_negatives", ())
            own = [row for row in rows if row["seed"] == rows[0]["seed"]]
            if not own or (run.evaluation and run.evaluation.methods[label].method in CONTROLS):
                continue
            try:
                values = np.array([float(row["delta"]) for row in own])
            except ValueError as error:
                raise ResultError(f"{run.folder}, {label}, hard_negatives: {error}; evaluate again") from error
            if not np.isfinite(values).all():
                raise ResultError(f"{run.folder}, {label}, hard_negatives: delta is not finite; evaluate again")
            found.setdefault(label, []).append(Sample(run.name, values))
    return found


def _class_chart(ranked: Mapping[str, Any], about: str) -> Chart:
    shown = dict(list(ranked.items())[:_MOST_COMPARED])
    note = "Mean and standard deviation, ordered by the first run."
    if len(shown) < len(ranked):
        note += f" {len(ranked) - len(shown)} more runs stand in the table only."
    name, first = next(iter(shown.items()))
    low, high = first.classes[0], first.classes[-1]
    alt = f"Mean γ by class; in {name} from {high.gamma_mean:.2f} ({high.label}) to {low.gamma_mean:.2f} ({low.label})."
    title = f"γ by class ({about})"
    return Chart(f"classes-{about}", title, note, alt, class_bars({n: g.classes for n, g in shown.items()}, title))


def _by_method_and_data(groundings: Sequence[Grounding]) -> list[list[Grounding]]:
    labels = dict.fromkeys(each.label for each in groundings)
    return [group for label in labels for group in by_data(each for each in groundings if each.label == label)]


def _training_sheet(run: Run) -> Iterator[Block]:
    picture = run.training.picture if run.training is not None else None
    if picture is None:
        return
    try:
        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        yield Note(f"{picture} cannot be shown: {error}.", missing=True)
        return
    note = "Each phrase before training and after each epoch, as the run drew it."
    alt = f"Heat maps of the fixed examples of {run.name}, a column for each measurement."
    yield Sheet(f"progress-{run.name}", f"What {run.name} learned to look at", note, alt, pixels)


def _of_classes(labels: set[str]) -> Callable[[ExampleRecord], bool]:
    return lambda record: "class" in record.why and record.label in labels


def _is_fixed(record: ExampleRecord) -> bool:
    return "fixed" in record.why


def _record(result: Any) -> dict[str, Any]:
    parts = {name: dict(getattr(result, name)) for name in ("model", "data", "settings", "versions")}
    parts["methods"] = {label: {"method": m.method, **dict(m.options)} for label, m in result.methods.items()}
    speed = getattr(result, "speed", None)
    return parts | ({"speed": dict(speed)} if speed else {})


def _files_table(runs: Sequence[Run]) -> PaperTable:
    rows = [(words(run.name), words(str(path)), count(size)) for run in runs for path, size in run.files.items()]
    columns = (Column("run", numeric=False), Column("file", numeric=False), Column("bytes"))
    return PaperTable("files", "Files that were read", "", columns, (Body("", tuple(rows)),))


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
