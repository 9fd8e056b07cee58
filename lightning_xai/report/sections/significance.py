"""Comparison of runs: distributions measured by one method on the same phrases, by almost stochastic order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_DOWN, Context, Decimal
from itertools import combinations

from lightning_xai.report.page import Block, Note
from lightning_xai.report.paper_table import Column, PaperTable, Value
from lightning_xai.results.record import settings_that_differ
from lightning_xai.results.runs import GROUNDING, Grounding, Run
from lightning_xai.results.stochastic_order import StochasticOrder, almost_stochastic_order


@dataclass(frozen=True)
class OrderTest:
    """Options of the comparison of distributions; see `almost_stochastic_order`."""

    epsilon: float = 0.2
    alpha: float = 0.005
    bootstrap_samples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two distributions of gamma.

    Attributes:
        first: the earlier one of the report.
        second: the later one.
        second_above: whether the second lies above the first.
        first_above: whether the first lies above the second.
    """

    first: Grounding
    second: Grounding
    second_above: StochasticOrder
    first_above: StochasticOrder

    @property
    def better(self) -> Grounding | None:
        """The one that dominates; None where neither does."""
        if self.second_above.dominates:
            return self.second
        return self.first if self.first_above.dominates else None

    @property
    def basis(self) -> str:
        """The other side of the verdict, and the numbers that it rests on."""
        other, order = (self.second, self.first_above) if self.better is self.first else (self.first, self.second_above)
        return f"{other.name} ({other.shown_label}): ε_min = {order.epsilon_min:.3f}, threshold {order.epsilon:g}"

    def __str__(self) -> str:
        """The verdict and its basis, in one line."""
        if self.better is None:
            return f"{self.second.name} is not shown to ground better or worse than {self.basis}"
        return f"{self.better.name} grounds better than {self.basis}"


def compare(runs: Sequence[Run], test: OrderTest) -> tuple[list[Comparison], list[str]]:
    """Compare all pairs that a reader wants compared; also the sentences on those that are not comparable."""
    comparisons, refused = [], []
    for first, second in _pairs(runs):
        reason = why_not(first, second)
        if reason is not None:
            refused.append(reason)
            continue
        sides = ((second.gammas, first.gammas), (first.gammas, second.gammas))
        orders = [almost_stochastic_order(*each, **asdict(test)) for each in sides]
        comparisons.append(Comparison(first, second, *orders))
        options = (first.method.options, second.method.options)
        differing = settings_that_differ(*options) if all(options) else []
        if differing:
            names = f"{first.name} and {second.name}"
            refused.append(f"{names}: options of {first.label} differ ({', '.join(differing)}).")
    return comparisons, list(dict.fromkeys(refused))


def significance_blocks(
    comparisons: Sequence[Comparison], refused: Sequence[str], test: OrderTest, runs: Sequence[Run]
) -> list[Block]:
    """The verdicts in a table, and the pairs that are not comparable."""
    blocks: list[Block] = [_table(comparisons, test)] if comparisons else []
    blocks += [Note(reason, missing=True) for reason in refused]
    if not blocks and any(run.groundings for run in runs):
        blocks.append(Note("Give two runs, or a training, to have them compared.", missing=True))
    return blocks


def why_not(first: Grounding, second: Grounding) -> str | None:
    """Reason why two distributions are not comparable, as a sentence; None where they are."""
    pair = f"{first.name} and {second.name}"
    if first.shown_label != second.shown_label or first.method.name != second.method.name:
        labels = f"{first.shown_label} and {second.shown_label}"
        return f"{pair} are not compared: {labels} are different methods, or at different layers."
    if not first.same_data(second, GROUNDING):
        return f"{pair} are not compared by {first.value} ({first.label}): {_difference(first, second)}."
    if not len(first.gammas) or not len(second.gammas):
        return f"{pair} are not compared ({first.label}): one of them has no measured phrase."
    return None


def _difference(first: Grounding, second: Grounding) -> str:
    classes = [set(each.rows["label"]) for each in (first, second)]
    if classes[0] != classes[1]:
        only = ", ".join(
            f"{len(own - other)} only in {each.name}"
            for own, other, each in zip(classes, reversed(classes), (first, second), strict=True)
        )
        return f"they were measured on different data, with other classes ({only})"
    what = f"{first.data} and {second.data}" if first.data != second.data else f"two versions of {first.data}"
    return f"they were measured on different data, {what}; evaluate both on the same shards with the same captions"


def _pairs(runs: Sequence[Run]) -> Iterator[tuple[Grounding, Grounding]]:
    """The pairs to compare: in a training the first, shown and second state; of two runs each method's.

    A training takes part in comparisons with other runs with the state that is shown, its best or last one. Baselines
    are left out: between models they differ by chance alone.
    """
    for run in runs:
        if run.is_training:
            states = run.groundings
            yield from combinations(dict.fromkeys((*states[:1], *_shown(run), *states[1:2])), 2)
    for one, other in combinations(runs, 2):
        ends = [_shown(run) if run.is_training else run.groundings for run in (one, other)]
        labels = {grounding.label: grounding for grounding in ends[1]}
        for first in ends[0]:
            if first.label in labels and not first.method.baseline:
                yield first, labels[first.label]


def _shown(run: Run) -> tuple[Grounding, ...]:
    return () if run.shown is None else (run.shown,)


def _table(comparisons: Sequence[Comparison], test: OrderTest) -> PaperTable:
    columns = [Column(name, numeric=False) for name in ("first", "second", "method", "verdict")]
    columns += [Column("first", "mean γ"), Column("second", "mean γ")]
    columns += [
        Column(name, f"is the {which} larger?") for which in ("second", "first") for name in ("ε_min", "violation")
    ]
    columns += [Column("first", "phrases"), Column("second", "phrases")]
    rows: list[list[Value]] = []
    for each in comparisons:
        better, sides = each.better, (each.first, each.second)
        verdict = "undecided" if better is None else "second better" if better is each.second else "first better"
        orders = (each.second_above, each.first_above)
        line: list[Value] = [each.first.name, each.second.name, each.first.shown_label, verdict]
        line += [float(side.gammas.mean()) for side in sides]
        line += [number for order in orders for number in (order.epsilon_min, order.violation_ratio)]
        rows.append(line + [len(side.gammas) for side in sides])
    note = (
        f"Almost stochastic order of the full γ distributions. ε_min is the upper confidence bound, at level α = "
        f"{test.alpha:g}, of that order's violation: 0 is order, 1 the opposite. One dominates where its ε_min < "
        f"{test.epsilon:g}. {test.bootstrap_samples:,} bootstrap samples, phrases taken as independent."
    )
    # Rounded down: a level above the share of each test would not hold for all.
    tests = 2 * len(comparisons)
    together = Context(prec=3, rounding=ROUND_DOWN).divide(Decimal(str(test.alpha)), Decimal(tests))
    counted = (
        "The comparison is two tests, one for each direction"
        if tests == 2
        else (f"The {len(comparisons)} comparisons are {tests} tests, two each, one for each direction")
    )
    note += (
        f" {counted}. α holds for each test; for an error of at most {test.alpha:g} in all of them together "
        f"(Bonferroni), ask for --alpha {together}."
    )
    return PaperTable("significance", "Which run grounds better", note, columns, rows)
