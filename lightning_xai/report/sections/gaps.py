"""Knowledge gaps: every class by its grounding, the classes that gained and lost, and pictures of these classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from lightning_xai.report.figures import class_bars
from lightning_xai.report.gallery import Gallery
from lightning_xai.report.page import Block, Chart, Folded, HeatMaps, Note
from lightning_xai.report.paper_table import Column, PaperTable
from lightning_xai.report.sections.metrics import score_columns
from lightning_xai.results.effect_size import ClassGaps, GroundingChange, grounding_change, knowledge_gaps
from lightning_xai.results.runs import Grounding, Run, by_method_and_data
from lightning_xai.results.table import score_table

_MOST_CHANGES = 5
_MOST_COMPARED = 4  # bars side by side for one class
_MOST_NAMED = 8


def gap_blocks(runs: Sequence[Run], gallery: Gallery, min_pairs: int) -> list[Block]:
    """Classes by grounding, and what changed from the first run, or state of a training, to each other one."""
    blocks: list[Block] = []
    for group in class_groups(runs):
        gaps = {each.name: gaps_of(each, min_pairs) for each in group}
        ranked = {each: gaps[each.name] for each in group if len(gaps[each.name].classes)}
        about = f"{group[0].shown_label} on {group[0].data}"
        if not ranked:
            note = f"{about}: no class has {min_pairs} measured phrases; see --min-pairs."
            blocks.append(Note(note, missing=True))
            continue
        blocks.append(_class_chart({each.name: found for each, found in ranked.items()}, about))
        first, found = next(iter(ranked.items()))
        worst = ", ".join(f"{row.Index} ({row.mean:.2f})" for row in found.classes.head(3).itertuples())
        blocks.append(Note(f"Grounded worst in {first.name}, by mean γ: {worst}."))
        table = _class_table(ranked, about, min_pairs)
        blocks.append(Folded(f"Table of {len(table.rows)} classes", (table,)))
        blocks += [block for second in group[1:] for block in _change(gallery, group[0], second, min_pairs)]
    return blocks


def class_groups(runs: Sequence[Run]) -> list[list[Grounding]]:
    """Groundings on the same phrases by the method that ranks classes, the first of each the one before."""
    found: list[Grounding] = []
    for run in runs:
        if run.shown is not None:
            found += dict.fromkeys([run.groundings[0], run.shown] if run.is_training else [run.shown])
    return by_method_and_data(found)


def gaps_of(grounding: Grounding, min_pairs: int) -> ClassGaps:
    """The classes of a grounding."""
    rows = grounding.rows
    return knowledge_gaps(rows[rows["metric"] == grounding.value], min_pairs=min_pairs)


def _class_chart(ranked: Mapping[str, ClassGaps], about: str) -> Chart:
    shown = dict(list(ranked.items())[:_MOST_COMPARED])
    note = "Mean and standard deviation, ordered by the first run."
    if len(shown) < len(ranked):
        note += f" {len(ranked) - len(shown)} more runs are in the table only."
    name, first = next(iter(shown.items()))
    low, high = first.classes.iloc[0], first.classes.iloc[-1]
    extremes = f"{high['mean']:.2f} ({high.name}) to {low['mean']:.2f} ({low.name})"
    alt = f"Mean γ by class; in {name} from {extremes}."
    title = f"γ by class ({about})"
    figure = class_bars({name: gaps.classes for name, gaps in shown.items()}, title, "γ")
    return Chart(f"classes-{about}", title, note, alt, figure)


def _class_table(runs: Mapping[Grounding, ClassGaps], about: str, min_pairs: int) -> PaperTable:
    """Every class of the first run, the worst first, with the same class of the others."""
    columns = [Column("class", numeric=False)]
    tables = []
    for each, gaps in runs.items():
        scores = each.metric.scores
        group = each.name if len(runs) > 1 else ""
        columns += [replace(column, group=group, better=None) for column in score_columns(each.metric)]
        columns.append(Column("phrases", group))
        table = score_table(each.rows, scores, by=("label",)).pivot(index="label", columns="score", values="value")
        table = table.reindex(index=gaps.classes.index, columns=[score.name for score in scores])
        # As objects, counts stay whole numbers beside what a run lacks.
        tables.append(table.assign(phrases=gaps.classes["count"].astype(object)))
    frame = pd.concat(tables, axis="columns", sort=False)
    few = {label: count for gaps in runs.values() for label, count in gaps.too_few.items()}
    note = "Ordered by the first run, the worst on top."
    if few:
        some = ", ".join(f"{label} ({count})" for label, count in list(few.items())[:_MOST_NAMED])
        more = ", …" if len(few) > _MOST_NAMED else ""
        note += f" Not ranked for fewer than {min_pairs} measured phrases: {some}{more}."
    rows = frame.reset_index().to_numpy(dtype=object).tolist()
    return PaperTable(f"classes-{about}", f"Classes by γ ({about})", note, columns, rows)


def _change(gallery: Gallery, before: Grounding, after: Grounding, min_pairs: int) -> Iterator[Block]:
    yield Note(f"From {before.name} to {after.name}", tag="h3")
    try:
        change = grounding_change(
            *(each.rows[each.rows["metric"] == each.value] for each in (before, after)), min_pairs=min_pairs
        )
    except ValueError:
        yield Note("Not one class was measured in both.", missing=True)
        return
    gains, losses = change.gains(_MOST_CHANGES), change.losses(_MOST_CHANGES)
    if not len(gains) + len(losses):
        same = "None of the classes has gained or lost anything."
        few = f"No class has {min_pairs} measured phrases on both sides."
        yield Note(same if len(change.classes) else few, missing=True)
        return
    yield _change_table(change, before, after)
    if before.run == after.run:
        note = "A training keeps no pictures by class: to see some, evaluate two of its checkpoints."
        yield Note(note, missing=True)
        return
    for what, changes in (("gained", gains), ("lost", losses)):
        yield from _changed_examples(gallery, before, after, set(changes.index), what)


def _change_table(change: GroundingChange, before: Grounding, after: Grounding) -> PaperTable:
    """The classes that gained most by effect size, and those that lost most."""
    sides = [each.state or each.run for each in (before, after)]
    columns = [Column("change", numeric=False), Column("class", numeric=False)]
    columns += [Column("effect size", digits=2, signed=True), Column("± standard error", digits=2)]
    columns += [Column(f"γ mean, {side}") for side in sides]
    columns += [Column("difference", signed=True), *(Column(f"phrases, {side}") for side in sides)]
    changes = {"gain": change.gains(_MOST_CHANGES), "loss": change.losses(_MOST_CHANGES)}
    frame = pd.concat(changes, names=["change"]).reset_index()
    names = ["change", "label", "smd", "standard_error", "mean_before", "mean_after", "difference"]
    rows = frame[[*names, "count_before", "count_after"]].to_numpy(dtype=object).tolist()
    note = "Effect size: standardised mean difference of γ, in pooled standard deviations; positive is better."
    if not len(change.losses(1)):
        note += " No class got worse."
    only = [
        f"{', '.join(labels[:_MOST_CHANGES])} ({side})"
        for labels, side in zip((change.only_before, change.only_after), sides, strict=True)
        if labels
    ]
    if only:
        note += f" Measured on one side only: {'; '.join(only)}."
    title = f"What changed from {before.name} to {after.name} ({after.shown_label} on {after.data})"
    return PaperTable(f"change-{before.name}-{after.name}", title, note, columns, rows)


def _changed_examples(
    gallery: Gallery, before: Grounding, after: Grounding, labels: set[str], what: str
) -> Iterator[Block]:
    if not labels:
        return
    names, title = ", ".join(sorted(labels)), f"Classes that {what} most from {before.name} to {after.name}"
    columns = {each.name: (each.run, each.label) for each in (before, after)}
    found = gallery.side_by_side(columns, "class", title, labels=labels)
    if found is None:
        yield Note(f"{title}: the runs share no example of {names}.", missing=True)
        return
    alt = f"Heat maps of {len(found.items)} phrases of the classes {names} in both runs."
    note = "Fixed examples of these classes."
    yield HeatMaps(f"examples-{what}-{after.name}", title, note, alt, found.figure, items=found.items)
