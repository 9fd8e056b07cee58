"""Knowledge gaps as a part of the page: the worst classes, what was gained and lost, and pictures of these classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from lightning_xai.report.charts import class_bars
from lightning_xai.report.gallery import Gallery
from lightning_xai.report.gaps import change_table, class_table
from lightning_xai.report.html import Block, Chart, Folded, Heading, Note, Sheet
from lightning_xai.results.effect_size import ClassGaps, GroundingChange, grounding_change, knowledge_gaps
from lightning_xai.results.runs import Grounding, Run, by_method_and_data
from lightning_xai.results.schema import ExampleRecord

__all__ = ["class_groups", "gap_blocks"]

_MOST_CHANGES = 5
_MOST_COMPARED = 4  # bars beside each other for one class


def gap_blocks(runs: Sequence[Run], gallery: Gallery, method: str | None, min_pairs: int) -> list[Block]:
    """Classes by grounding, and what changed from the first run, or state of a training, to each other one.

    Args:
        runs: of the report.
        gallery: their examples.
        method: label of the method that tells about classes; None: feature pairs, or else the first.
        min_pairs: how many measured pairs a class needs to be ranked.
    """
    blocks: list[Block] = []
    for group in class_groups(runs, method):
        gaps = {each.name: knowledge_gaps(each.rows, min_pairs=min_pairs) for each in group}
        ranked = {name: found for name, found in gaps.items() if found.classes}
        about = f"{group[0].label} on {group[0].data}"
        if not ranked:
            note = f"{about}: no class has {min_pairs} measured pairs; see --min-pairs."
            blocks.append(Note(note, missing=True))
            continue
        blocks.append(_class_chart(ranked, about))
        worst = next(iter(ranked.values())).classes[:3]
        told = ", ".join(f"{found.label} ({found.gamma_mean:.2f})" for found in worst)
        blocks.append(Note(f"Grounded worst in {next(iter(ranked))}, by mean γ: {told}."))
        name, title = f"classes-{about}", f"Classes by γ ({about})"
        table = class_table(ranked, name=name, title=title, min_pairs=min_pairs)
        blocks.append(Folded(f"Table of {len(table.rows)} classes", (table,)))
        blocks += [block for second in group[1:] for block in _change(gallery, group[0], second, min_pairs)]
    return blocks


def class_groups(runs: Sequence[Run], method: str | None) -> list[list[Grounding]]:
    """Groundings on the same phrases by the method that tells about classes, the first of each the one before."""
    found: list[Grounding] = []
    for run in runs:
        shown = run.of_class(method)
        if shown is not None:
            found += dict.fromkeys([run.groundings[0], shown] if run.training is not None else [shown])
    return by_method_and_data(found)


def _change(gallery: Gallery, before: Grounding, after: Grounding, min_pairs: int) -> Iterator[Block]:
    yield Heading(f"From {before.name} to {after.name}")
    if not before.measured_classes & after.measured_classes:
        yield Note("Not one class was measured in both.", missing=True)
        return
    change = grounding_change(before.rows, after.rows, min_pairs=min_pairs)
    table = change_table(
        change,
        name=f"change-{before.name}-{after.name}",
        title=f"What changed from {before.name} to {after.name} ({after.label} on {after.data})",
        before=before.state or before.run,
        after=after.state or after.run,
        most=_MOST_CHANGES,
    )
    if table is None:
        same = "None of the classes has gained or lost anything."
        few = f"No class has {min_pairs} measured pairs on both sides."
        yield Note(same if change.classes else few, missing=True)
        return
    yield table
    if before.run == after.run:
        note = (
            "A training keeps no pictures by class: evaluate two of its checkpoints, and report on these, to see some."
        )
        yield Note(note, missing=True)
    else:
        yield from _changed_examples(gallery, change, before, after)


def _changed_examples(
    gallery: Gallery, change: GroundingChange, before: Grounding, after: Grounding
) -> Iterator[Block]:
    columns = {each.name: (each.run, each.label) for each in (before, after)}
    for what, changes in (("gained", change.gains(_MOST_CHANGES)), ("lost", change.losses(_MOST_CHANGES))):
        labels = {each.label for each in changes}
        if not labels:
            continue
        title = f"Classes that {what} most from {before.name} to {after.name}"
        found = gallery.side_by_side(columns, _of_classes(labels), title)
        if found is None:
            yield Note(f"{title}: the runs share no example of {', '.join(sorted(labels))}.", missing=True)
            continue
        sheet, rows = found
        alt = f"Heat maps of {rows} phrases of the classes {', '.join(sorted(labels))} in both runs."
        yield Sheet(f"examples-{what}-{after.name}", title, "Fixed examples of these classes.", alt, sheet)


def _class_chart(ranked: Mapping[str, ClassGaps], about: str) -> Chart:
    shown = dict(list(ranked.items())[:_MOST_COMPARED])
    note = "Mean and standard deviation, ordered by the first run."
    if len(shown) < len(ranked):
        note += f" {len(ranked) - len(shown)} more runs stand in the table only."
    name, first = next(iter(shown.items()))
    low, high = first.classes[0], first.classes[-1]
    alt = f"Mean γ by class; in {name} from {high.gamma_mean:.2f} ({high.label}) to {low.gamma_mean:.2f} ({low.label})."
    title = f"γ by class ({about})"
    return Chart(f"classes-{about}", title, note, alt, class_bars({n: g.classes for n, g in shown.items()}, title))


def _of_classes(labels: set[str]) -> Callable[[ExampleRecord], bool]:
    return lambda record: "class" in record.why and record.label in labels
