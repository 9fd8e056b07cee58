"""What a model grounds badly, class by class, and what changed between two runs.

Read from the tables with one row per phrase (`read_csv`). A row with the reason "measured" has a gamma, the share of
the phrase's positive attribution inside its object's box, and a hit (rho), whether the largest attribution lies there.
After section 4.2 and Figure 6 of "Explaining caption-image interactions in CLIP models with second-order attributions".
Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lightning_xai.report.tables import csv_field
from lightning_xai.results.stochastic_order import Values, sorted_sample

__all__ = [
    "ClassChange",
    "ClassGaps",
    "ClassGrounding",
    "EffectSize",
    "GroundingChange",
    "grounding_change",
    "knowledge_gaps",
    "standardised_mean_difference",
]

Row = Mapping[str, object]

_MEASURED = "measured"
_COLUMNS = ("label", "reason", "gamma", "hit")


@dataclass(frozen=True)
class EffectSize:
    """A standardised mean difference.

    Attributes:
        smd: difference of the means in pooled standard deviations; positive: the later one is the larger one.
        standard_error: of `smd`, in the same unit. Both are NaN where there is no spread to divide by.
    """

    smd: float
    standard_error: float


@dataclass(frozen=True)
class ClassGrounding:
    """How well one class is grounded; fractions in [0, 1], higher is better.

    Attributes:
        label: the class.
        pairs: measured pairs, at least one.
        gamma_mean: mean over pairs.
        gamma_std: sample standard deviation (divided by pairs - 1); NaN for a single pair.
        gamma_above_50: share of pairs with gamma > 0.5.
        rho: share of pairs whose largest attribution lies inside the box.
    """

    label: str
    pairs: int
    gamma_mean: float
    gamma_std: float
    gamma_above_50: float
    rho: float


@dataclass(frozen=True)
class ClassGaps:
    """The classes of one run, the worst first.

    Attributes:
        classes: those with enough pairs, by ascending mean gamma.
        too_few: label -> measured pairs, of all other classes that the table names.
        left_out: reason -> rows that were not measured.
    """

    classes: tuple[ClassGrounding, ...]
    too_few: Mapping[str, int]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class ClassChange:
    """How the grounding of one class changed from one run to another.

    Attributes:
        label: the class.
        pairs_before: measured pairs.
        pairs_after: measured pairs.
        mean_before: mean gamma, in [0, 1].
        mean_after: mean gamma, in [0, 1].
        difference: mean_after - mean_before; positive is better.
        smd: the same in pooled standard deviations; NaN where neither run has any spread.
        standard_error: of `smd`.
    """

    label: str
    pairs_before: int
    pairs_after: int
    mean_before: float
    mean_after: float
    difference: float
    smd: float
    standard_error: float


@dataclass(frozen=True)
class GroundingChange:
    """How the grounding of all classes changed, the largest gain first.

    Attributes:
        classes: those with enough pairs in both runs, by descending `smd`; those without one (NaN) come last.
        only_before: classes that were measured in the earlier run alone.
        only_after: classes that were measured in the later run alone.
        too_few: label -> measured pairs before and after, of the classes that both have and one has too few of.
        left_out_before: reason -> rows that were not measured.
        left_out_after: reason -> rows that were not measured.
    """

    classes: tuple[ClassChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    too_few: Mapping[str, tuple[int, int]]
    left_out_before: Mapping[str, int]
    left_out_after: Mapping[str, int]

    def gains(self, most: int = 5) -> tuple[ClassChange, ...]:
        """At most so many classes that improved, the largest gain first."""
        return tuple(change for change in self.classes if change.smd > 0)[: max(most, 0)]

    def losses(self, most: int = 5) -> tuple[ClassChange, ...]:
        """At most so many classes that got worse, the largest loss first."""
        return tuple(change for change in reversed(self.classes) if change.smd < 0)[: max(most, 0)]


def standardised_mean_difference(after: Values, before: Values) -> EffectSize:
    """The difference of two means in units of the spread within the samples: Cohen's d.

        smd = (mean_after - mean_before) / s,    s^2 = ((n - 1) s_after^2 + (m - 1) s_before^2) / (n + m - 2)

    with the sample variances (divided by n - 1 and m - 1), and no correction for small samples (Hedges' g would be
    smaller by about 3 / (4 (n + m) - 9)). The standard error is the usual large-sample one,
    sqrt((n + m) / (n m) + smd^2 / (2 (n + m))), for independent samples; where both are measured on the same pairs, it
    is too large in general.

    Args:
        after: [n], in any order.
        before: [m], in any order.

    Returns:
        NaN for both where a side has fewer than two values, or where neither side has any spread: a difference then is
        infinitely many standard deviations, or 0/0.

    Raises:
        ValueError: a sample is not [n], or not finite.

    >>> standardised_mean_difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]).smd
    2.0
    """
    late, early = sorted_sample(after, "after", at_least=0), sorted_sample(before, "before", at_least=0)
    n, m = late.size, early.size
    # Equal values are compared, since rounding gives them a variance that is not quite zero.
    if min(n, m) < 2 or (late[0] == late[-1] and early[0] == early[-1]):
        return EffectSize(math.nan, math.nan)
    pooled = ((n - 1) * late.var(ddof=1) + (m - 1) * early.var(ddof=1)) / (n + m - 2)
    smd = float((late.mean() - early.mean()) / np.sqrt(pooled))
    return EffectSize(smd, math.sqrt((n + m) / (n * m) + smd**2 / (2 * (n + m))))


def knowledge_gaps(rows: Sequence[Row], *, min_pairs: int = 10) -> ClassGaps:
    """The classes of a run by how badly they are grounded, the worst first.

    Args:
        rows: one per phrase, as `read_csv` gives them, with `label`, `reason`, `gamma` and `hit`.
        min_pairs: classes with fewer measured pairs are only counted.

    Raises:
        ValueError: `min_pairs` is less than 1, a column is missing, or a measured row has no gamma in [0, 1] or no hit.

    >>> row = {"label": "dog", "reason": "measured", "gamma": "0.75", "hit": "1"}
    >>> gaps = knowledge_gaps([row, row | {"label": "cup", "gamma": "0.25"}], min_pairs=1)
    >>> [(found.label, found.gamma_mean) for found in gaps.classes]
    [('cup', 0.25), ('dog', 0.75)]
    """
    _check_min_pairs(min_pairs)
    pairs, left_out = _pairs_by_class(rows, "row")
    classes = [_grounding(label, found) for label, found in pairs.items() if len(found) >= min_pairs]
    return ClassGaps(
        classes=tuple(sorted(classes, key=lambda found: (found.gamma_mean, found.label))),
        too_few={label: len(found) for label, found in sorted(pairs.items()) if len(found) < min_pairs},
        left_out=left_out,
    )


def grounding_change(before: Sequence[Row], after: Sequence[Row], *, min_pairs: int = 10) -> GroundingChange:
    """How the grounding of each class changed between two runs, by effect size.

    Args:
        before: rows of the earlier run, as for `knowledge_gaps`.
        after: rows of the later run.
        min_pairs: classes with fewer measured pairs in either run are only counted.

    Raises:
        ValueError: no class was measured in both runs, or as for `knowledge_gaps`.
    """
    _check_min_pairs(min_pairs)
    early, left_out_before = _pairs_by_class(before, "before, row")
    late, left_out_after = _pairs_by_class(after, "after, row")
    had, has = ({label for label, found in pairs.items() if found} for pairs in (early, late))
    if not had & has:
        raise ValueError(
            f"expected a class that was measured in both runs; before has {_some(had)}, after has {_some(has)}; "
            "compare runs on the same data"
        )
    sizes = {label: (len(early[label]), len(late[label])) for label in sorted(had & has)}
    changes = [_change(label, early[label], late[label]) for label, both in sizes.items() if min(both) >= min_pairs]
    return GroundingChange(
        classes=tuple(sorted(changes, key=_largest_gain_first)),
        only_before=tuple(sorted(had - has)),
        only_after=tuple(sorted(has - had)),
        too_few={label: both for label, both in sizes.items() if min(both) < min_pairs},
        left_out_before=left_out_before,
        left_out_after=left_out_after,
    )


class _Pair(NamedTuple):
    gamma: float
    hit: bool


def _pairs_by_class(rows: Sequence[Row], where: str) -> tuple[dict[str, list[_Pair]], dict[str, int]]:
    """The measured pairs of every class that a table names, and the number of other rows by reason."""
    pairs: dict[str, list[_Pair]] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows):
        missing = [column for column in _COLUMNS if column not in row]
        if missing:
            raise ValueError(f"{where} {number} has no {missing}; expected a table with one row per phrase")
        found = pairs.setdefault(str(row["label"]), [])
        if row["reason"] == _MEASURED:
            found.append(_pair(row, f"{where} {number}"))
        else:
            left_out[str(row["reason"])] += 1
    return pairs, dict(sorted(left_out.items()))


def _pair(row: Row, where: str) -> _Pair:
    gamma, hit = csv_field(row["gamma"]), csv_field(row["hit"])  # rows that no file has held yet are read alike
    try:
        share = float(gamma)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1 or hit not in ("0", "1"):
        found = f"gamma {gamma!r}, hit {hit!r}"
        raise ValueError(f"{where} is measured: expected gamma in [0, 1], hit 0 or 1; got {found}; evaluate again")
    return _Pair(share, hit == "1")


def _grounding(label: str, pairs: Sequence[_Pair]) -> ClassGrounding:
    gammas = sorted_sample([pair.gamma for pair in pairs], label)
    return ClassGrounding(
        label=label,
        pairs=len(pairs),
        gamma_mean=float(gammas.mean()),
        gamma_std=float(gammas.std(ddof=1)) if len(pairs) > 1 else math.nan,
        gamma_above_50=float(np.mean(gammas > 0.5)),
        rho=float(np.mean([pair.hit for pair in pairs])),
    )


def _change(label: str, before: Sequence[_Pair], after: Sequence[_Pair]) -> ClassChange:
    early, late = _grounding(label, before), _grounding(label, after)
    effect = standardised_mean_difference([pair.gamma for pair in after], [pair.gamma for pair in before])
    return ClassChange(
        label=label,
        pairs_before=early.pairs,
        pairs_after=late.pairs,
        mean_before=early.gamma_mean,
        mean_after=late.gamma_mean,
        difference=late.gamma_mean - early.gamma_mean,
        smd=effect.smd,
        standard_error=effect.standard_error,
    )


def _largest_gain_first(change: ClassChange) -> tuple[bool, float, str]:
    undefined = math.isnan(change.smd)
    return undefined, 0.0 if undefined else -change.smd, change.label


def _check_min_pairs(min_pairs: int) -> None:
    if min_pairs < 1:
        raise ValueError(f"min_pairs: expected at least 1, got {min_pairs}")


def _some(labels: set[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, sorted(labels)[:most]))
    return f"{len(labels)} ({shown}{', ...' if len(labels) > most else ''})" if labels else "none"
