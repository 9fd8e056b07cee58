"""What each variant of `objectives` changed: by what it was not trained on, where it was trained, and what is lost."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_xai.report.figures import bars
from lightning_xai.report.page import Block, Chart, Folded, Note, Section
from lightning_xai.report.paper_table import Column, PaperTable, Value, score_column
from lightning_xai.report.sections.significance import OrderTest
from lightning_xai.results.objectives import LEAST_SEEDS, Change, Variant, logged_score
from lightning_xai.results.record import Score, standard_error
from lightning_xai.results.runs import Estimate
from lightning_xai.results.table import score_table

_VERDICTS = ("better", "worse", "undecided")
_SEEDS = "Mean ± standard error over seeds, where there are several."
_BLANK = "A dash: not measured, or the variant was trained on it (see the next section)."


@dataclass(frozen=True)
class ObjectivesStudy:
    """All variants and their comparison with the base.

    Attributes:
        base: name of the base.
        variants: all, the base included.
        scores: those that are compared.
        logged: names of the logged numbers that are compared, which were logged.
        changes: of all variants but the base.
        test: options of the comparison.
    """

    base: str
    variants: Sequence[Variant]
    scores: Sequence[Score]
    logged: Sequence[str]
    changes: Sequence[Change]
    test: OrderTest

    def of(self, variant: str) -> list[Change]:
        """The changes of one variant."""
        return [change for change in self.changes if change.variant == variant]

    def shown(self, method: str) -> str:
        """A judging method with the layers that its maps are of."""
        return self.variants[0].record.shown(method) if method else "the model itself"


def objective_sections(study: ObjectivesStudy) -> Iterator[Section]:
    """The findings in sentences, tables of what was not trained on, of what was, of what is lost, and the tests."""
    sentences = [Note(text) for variant in study.variants for text in sentences_on(study, variant.name)]
    yield Section("overview", "At a glance", [*sentences, verdict_table(study)])
    yield Section("not-trained-on", "Judged by what it was not trained on", [*_charts(study), *_score_tables(study)])
    yield Section("trained-on", "Where it was trained", _trained_blocks(study))
    if study.logged:
        yield Section("validation", "Retrieval and caption choice", [logged_table(study)])
    yield Section("significance", "Significance", [Folded("Every comparison with its test", (_test_table(study),))])


def sentences_on(study: ObjectivesStudy, variant: str) -> Iterator[str]:
    """Say in plain sentences which way the numbers of a variant went, better or worse."""
    changes = study.of(variant)
    if not changes:
        return
    first = study.scores[0]
    trained = [change for change in changes if change.trained and (change.score == first or not change.method)]
    if trained:
        parts = "; ".join(f"{_subject(study, change)} {_went(change)}" for change in trained)
        yield f"{variant}, where it was trained: {parts}."
    judged = [change for change in changes if not change.trained and change.method and change.score == first]
    if judged:
        yield f"{variant}, where it was not trained: {first.heading} {_extremes(study, judged)}."
    elsewhere = [change for change in changes if not change.trained and change.method]
    if elsewhere:
        tested = Counter(change.verdict for change in elsewhere if change.verdict)
        gains = sum(change.gain > 0 for change in elsewhere)
        losses = sum(change.gain < 0 for change in elsewhere)
        text = (
            f"{variant}: of {len(elsewhere)} scores that it was not trained on, {gains} are better and {losses} worse"
        )
        text += f" than those of {study.base}"
        if tested:
            text += f"; by the test, {tested['better']} are better, {tested['worse']} worse, {tested['undecided']} open"
        yield f"{text}."
    lost = [change for change in changes if not change.method and not change.trained]
    if lost:
        yield f"{variant}: {'; '.join(f'{change.score.heading} {_went(change)}' for change in lost)}."


def _subject(study: ObjectivesStudy, change: Change) -> str:
    return f"{change.score.heading} by {study.shown(change.method)}" if change.method else change.score.heading


def _went(change: Change) -> str:
    """Direction and size of a change, as "rose from 44.9 to 97.1 %"."""
    column, unit = score_column(change.score), " %" if change.score.percent else ""
    before, after = (column.text(statistics.fmean(side)) for side in (change.base, change.own))
    if before == after:
        return f"stayed at {after}{unit}"
    good = "" if change.gain > 0 else ", which is worse"
    return f"{'rose' if change.difference > 0 else 'fell'} from {before} to {after}{unit}{good}"


def _extremes(study: ObjectivesStudy, changes: Sequence[Change]) -> str:
    """The largest gain and the largest loss."""
    best, worst = max(changes, key=lambda each: each.gain), min(changes, key=lambda each: each.gain)
    shown = [best] if best is worst or worst.gain >= 0 else [worst] if best.gain <= 0 else [best, worst]
    parts = [f"{_went(each)} by {study.shown(each.method)}" for each in shown]
    better = sum(each.gain > 0 for each in changes)
    count = f"is better by {better} of {len(changes)} methods"
    return f"{count}; it {' and '.join(parts)}"


def verdict_table(study: ObjectivesStudy) -> PaperTable:
    """How many scores of each variant are better, worse or undecided against the base, by the test."""
    columns = [Column("variant", numeric=False)]
    groups = {"not trained on": False, "trained on": True}
    columns += [Column(verdict, group) for group in groups for verdict in _VERDICTS]
    rows: list[list[Value]] = []
    for variant in study.variants:
        changes = study.of(variant.name)
        if changes:
            counts = [
                Counter(each.verdict for each in changes if each.trained is trained) for trained in groups.values()
            ]
            rows.append([variant.name, *(count[verdict] for count in counts for verdict in _VERDICTS)])
    note = f"Scores against {study.base}, by almost stochastic order. {_about_test(study)}"
    return PaperTable("verdicts", f"Scores that differ from those of {study.base}", note, columns, rows)


def _about_test(study: ObjectivesStudy) -> str:
    test, tests = study.test, 2 * sum(bool(change.verdict) for change in study.changes)
    fewest = min(len(variant.seeds) for variant in study.variants)
    if fewest >= LEAST_SEEDS:
        unit = f"The values compared are the scores of the {fewest} trainings of each variant."
    else:
        unit = (
            f"With fewer than {LEAST_SEEDS} seeds no test over trainings can be significant: the values compared are "
            "those of single phrases and captions, so that the verdicts are about these models, not about others that "
            "the same objectives would train."
        )
    return (
        f"{unit} One side is better where its ε_min, the upper bound of the violation at level α = {test.alpha:g}, is "
        f"below {test.epsilon:g}. α holds for each of {tests} tests, not for all of them together."
    )


def _estimate(values: Sequence[float]) -> Estimate:
    mean = statistics.fmean(values) if values else math.nan
    return Estimate(mean, standard_error(values), len(values))


def _cells(study: ObjectivesStudy, score: Score) -> dict[tuple[str, str], Estimate]:
    """(variant, method) -> a score over seeds, of what was measured."""
    found: dict[tuple[str, str], Estimate] = {}
    for variant in study.variants:
        table = score_table(variant.table.values, [score])
        for method, part in table[table["count"] > 0].groupby("method"):
            found[variant.name, method] = _estimate(part["value"].tolist())
    return found


def _score_tables(study: ObjectivesStudy) -> Iterator[PaperTable]:
    """A table for each score: a line for each variant, a column for each judging method."""
    for score in study.scores:
        cells, like = _cells(study, score), score_column(score)
        methods = [label for label in study.variants[0].record.methods if any(label == each for _, each in cells)]
        if not methods:
            continue
        columns = [Column("variant", numeric=False)]
        columns += [
            Column(study.shown(each), percent=like.percent, digits=like.digits, better=like.better) for each in methods
        ]
        rows: list[list[Value]] = [
            [
                variant.name,
                *(None if each in variant.trained_on else cells.get((variant.name, each)) for each in methods),
            ]
            for variant in study.variants
        ]
        note = f"{_BLANK} The best of each column is bold. {_SEEDS}"
        title = f"{score.heading} by methods that a variant was not trained on"
        yield PaperTable(f"objectives-{score.name}", title, note, columns, rows)


def _charts(study: ObjectivesStudy) -> Iterator[Chart]:
    """Bars of the first score: a panel for each judging method, a bar for each variant."""
    score = study.scores[0]
    column, cells = score_column(score), _cells(study, score)
    panels: dict[str, dict[str, Estimate]] = {}
    for (variant, method), found in cells.items():
        trained = next(method in each.trained_on for each in study.variants if each.name == variant)
        mean, error = column.numbers(found)
        name = f"{variant} (trained on it)" if trained else variant
        panels.setdefault(study.shown(method), {})[name] = Estimate(mean, error, found.count)
    if panels:
        title = f"{column.heading} by each method"
        alt = "; ".join(
            f"{heading}: {', '.join(f'{name} {found.mean:.1f}' for name, found in each.items())}"
            for heading, each in panels.items()
        )
        yield Chart(f"objectives-{score.name}", title, _SEEDS, f"{alt}.", bars(panels, [], title))


def _trained_blocks(study: ObjectivesStudy) -> list[Block]:
    trained = [change for change in study.changes if change.trained]
    if not trained:
        return [Note("No variant was trained on what a judging method measures.", missing=True)]
    columns = [Column(name, numeric=False) for name in ("variant", "judged by", "score")]
    columns += [Column(study.base), Column("variant's"), Column("difference")]
    rows = [_head(study, change) + _numbers(change) for change in trained]
    note = f"A gain here shows that the objective was learned, not that the model understands more. {_SEEDS}"
    return [PaperTable("trained-on", "Where each variant was trained", note, columns, rows)]


def _head(study: ObjectivesStudy, change: Change) -> list[Value]:
    return [change.variant, study.shown(change.method), score_column(change.score).heading]


def _numbers(change: Change) -> list[Value]:
    """Base, variant and difference, printed in the unit of the score."""
    column = score_column(change.score)
    signed = Column(column.name, percent=column.percent, digits=column.digits, signed=True)
    base, own = change.estimates()
    return [column.text(base), column.text(own), signed.text(change.difference)]


def logged_table(study: ObjectivesStudy) -> PaperTable:
    """What the validation logged of the model itself: a line for each variant."""
    columns = [Column("variant", numeric=False), *(score_column(logged_score(name)) for name in study.logged)]
    rows: list[list[Value]] = [
        [
            variant.name,
            *(
                None if name in variant.trained_on else _estimate(list(variant.logged.get(name, {}).values()))
                for name in study.logged
            ),
        ]
        for variant in study.variants
    ]
    note = f"On the whole validation split. {_BLANK} {_SEEDS}"
    return PaperTable("objectives-validation", "What the validation after training measured", note, columns, rows)


def _test_table(study: ObjectivesStudy) -> PaperTable:
    columns = [Column(name, numeric=False) for name in ("variant", "judged by", "score", "trained on it")]
    columns += [Column(study.base), Column("variant's"), Column("difference"), Column("SMD", signed=True, digits=2)]
    columns += [Column("verdict", numeric=False), Column("variant better", "ε_min"), Column("variant worse", "ε_min")]
    columns.append(Column("over", numeric=False))
    rows = [list(_tested(study, change)) for change in study.changes]
    note = (
        f"{_about_test(study)} SMD: difference of the means in pooled standard deviations of the values compared, "
        "positive where the variant's are larger."
    )
    return PaperTable("objectives-tests", f"Every variant against {study.base}", note, columns, rows)


def _tested(study: ObjectivesStudy, change: Change) -> Iterable[Value]:
    yield from _head(study, change)
    yield "yes" if change.trained else "no"
    yield from _numbers(change)
    yield None if change.effect is None else change.effect.smd
    yield change.verdict or "not tested"
    yield from (None if order is None else order.epsilon_min for order in (change.above, change.below))
    yield change.over
