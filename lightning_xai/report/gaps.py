"""Knowledge gaps as tables: every class of the runs, and which ones gained and lost between two of them.

What is behind the numbers stands in `effect_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_xai.report.paper_table import Body, Cell, Column, PaperTable, count, number, percent, words
from lightning_xai.report.tables import NO_VALUE
from lightning_xai.results.effect_size import ClassChange, ClassGaps, GroundingChange

__all__ = ["change_table", "class_table"]


def class_table(runs: Mapping[str, ClassGaps], *, name: str, title: str, min_pairs: int) -> PaperTable:
    """Every class of the first run, the worst first, beside the same class of the others.

    Args:
        runs: name -> its classes.
        name: of the table's files.
        title: of the table.
        min_pairs: how many pairs a class needs to be ranked.
    """
    by_label = {run: {found.label: found for found in gaps.classes} for run, gaps in runs.items()}
    order = list(dict.fromkeys(label for found in by_label.values() for label in found))
    columns = [Column("class", numeric=False)]
    for run in runs:
        group = run if len(runs) > 1 else ""
        columns += [Column(heading, group) for heading in ("γ mean", "γ std", "γ > 0.5 [%]", "ρ [%]", "pairs")]
    rows = []
    for label in order:
        cells = [words(label)]
        for found in by_label.values():
            one = found.get(label)
            if one is None:
                cells += [Cell(NO_VALUE)] * 5
                continue
            cells += [number(one.gamma_mean), number(one.gamma_std), percent(one.gamma_above_50), percent(one.rho)]
            cells.append(count(one.pairs))
        rows.append(tuple(cells))
    few = {label: pairs for gaps in runs.values() for label, pairs in gaps.too_few.items()}
    note = "Ordered by the first run, the worst on top."
    if few:
        some = ", ".join(f"{label} ({pairs})" for label, pairs in list(few.items())[:8])
        more = ", …" if len(few) > 8 else ""
        note += f" Not ranked for fewer than {min_pairs} measured pairs: {some}{more}."
    return PaperTable(name, title, note, tuple(columns), (Body("", tuple(rows)),))


def change_table(
    change: GroundingChange, *, name: str, title: str, before: str, after: str, most: int
) -> PaperTable | None:
    """The classes that gained and lost most by effect size; None where no class with enough pairs in both did."""
    bodies = [
        Body(heading, tuple(map(_change_row, changes)))
        for heading, changes in (("Largest gains", change.gains(most)), ("Largest losses", change.losses(most)))
        if changes
    ]
    if not bodies:
        return None
    columns = [Column("class", numeric=False), Column("effect size"), Column("± standard error")]
    columns += [Column(f"γ mean, {before}"), Column(f"γ mean, {after}"), Column("difference"), Column("pairs")]
    note = "Effect size: standardised mean difference of γ, in pooled standard deviations; positive is better."
    if not change.losses(1):
        note += " No class got worse."
    if change.only_before or change.only_after:
        only = [
            f"{', '.join(labels[:5])} ({where})"
            for labels, where in ((change.only_before, before), (change.only_after, after))
            if labels
        ]
        note += f" Measured on one side only: {'; '.join(only)}."
    return PaperTable(name, title, note, tuple(columns), tuple(bodies))


def _change_row(change: ClassChange) -> tuple[Cell, ...]:
    pairs = change.pairs_after if change.pairs_before == change.pairs_after else None
    both = f"{change.pairs_before} → {change.pairs_after}"
    return (
        words(change.label),
        _signed(change.smd, 2),
        number(change.standard_error, 2),
        number(change.mean_before),
        number(change.mean_after),
        _signed(change.difference, 3),
        count(pairs) if pairs is not None else Cell(both, min(change.pairs_before, change.pairs_after)),
    )


def _signed(value: float, digits: int) -> Cell:
    cell = number(value, digits)
    return replace(cell, text=f"+{cell.text}") if value > 0 else cell
