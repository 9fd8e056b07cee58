"""The classes that a model grounds badly, and the classes whose grounding changed between two runs.

Group-bys of the long table, after section 4.2 and Figure 6 of "Explaining Caption-Image Interactions in CLIP Models
with Second-Order Attributions". Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lightning_xai.results.stochastic_order import Values, sorted_sample

__all__ = [
    "ClassGaps",
    "EffectSize",
    "GroundingChange",
    "grounding_change",
    "knowledge_gaps",
    "standardised_mean_difference",
]


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
class ClassGaps:
    """The classes of one run, the worst first.

    Attributes:
        classes: index `label`, columns `mean`, `std` (sample standard deviation; NaN for a single phrase) and `count`
            of those with enough measured phrases, by ascending mean.
        too_few: label -> measured phrases, of all other classes.
    """

    classes: pd.DataFrame
    too_few: Mapping[str, int]


@dataclass(frozen=True)
class GroundingChange:
    """Change of the grounding of all classes, the largest gain first.

    Attributes:
        classes: index `label`, columns `count_before`, `count_after`, `mean_before`, `mean_after`, `difference` (after
            minus before), `smd` and `standard_error` of those with enough phrases in both runs, by descending `smd`;
            those without one (NaN) come last.
        only_before: classes that were measured in the earlier run alone.
        only_after: classes that were measured in the later run alone.
        too_few: label -> measured phrases before and after, of the classes that both have and one has too few of.
    """

    classes: pd.DataFrame
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    too_few: Mapping[str, tuple[int, int]]

    def gains(self, most: int = 5) -> pd.DataFrame:
        """At most so many classes that improved, the largest gain first."""
        return self.classes[self.classes["smd"] > 0].head(max(most, 0))

    def losses(self, most: int = 5) -> pd.DataFrame:
        """At most so many classes that got worse, the largest loss first."""
        return self.classes[self.classes["smd"] < 0].iloc[::-1].head(max(most, 0))


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


def knowledge_gaps(rows: pd.DataFrame, *, min_pairs: int = 10) -> ClassGaps:
    """The classes of a run by how badly they are grounded, the worst first.

    Args:
        rows: of one value of the long table (gamma), with `label`, `value` and `excluded`.
        min_pairs: classes with fewer measured phrases are only counted.

    Raises:
        ValueError: `min_pairs` is less than 1.

    >>> rows = pd.DataFrame({"label": ["dog", "cup"], "value": [0.75, 0.25], "excluded": ["", ""]})
    >>> knowledge_gaps(rows, min_pairs=1).classes["mean"].to_dict()
    {'cup': 0.25, 'dog': 0.75}
    """
    _check_min_pairs(min_pairs)
    classes = _by_class(rows)
    enough = classes["count"] >= min_pairs
    # The index is sorted: a stable sort leaves classes with the same mean in the order of their names.
    return ClassGaps(
        classes[enough].sort_values("mean", kind="stable"),
        {str(label): int(count) for label, count in classes.loc[~enough, "count"].items()},
    )


def grounding_change(before: pd.DataFrame, after: pd.DataFrame, *, min_pairs: int = 10) -> GroundingChange:
    """Compare the grounding of each class between two runs, by effect size.

    Args:
        before: rows of the earlier run, as for `knowledge_gaps`.
        after: rows of the later run.
        min_pairs: classes with fewer measured phrases in either run are only counted.

    Raises:
        ValueError: no class was measured in both runs, or `min_pairs` is less than 1.
    """
    _check_min_pairs(min_pairs)
    early, late = ({label: part.tolist() for label, part in _measured(rows)} for rows in (before, after))
    both = {label: (len(early[label]), len(late[label])) for label in sorted(early.keys() & late.keys())}
    if not both:
        raise ValueError(
            f"expected a class that was measured in both runs; before has {_some(early)}, after has {_some(late)}; "
            "compare runs on the same data"
        )
    found = []
    for label, counts in both.items():
        if min(counts) >= min_pairs:
            effect = standardised_mean_difference(late[label], early[label])
            means = math.fsum(early[label]) / counts[0], math.fsum(late[label]) / counts[1]
            found.append((label, *counts, *means, means[1] - means[0], effect.smd, effect.standard_error))
    columns = ["label", "count_before", "count_after", "mean_before", "mean_after"]
    classes = pd.DataFrame(found, columns=[*columns, "difference", "smd", "standard_error"]).set_index("label")
    return GroundingChange(
        classes=classes.sort_values("smd", ascending=False, kind="stable", na_position="last"),
        only_before=tuple(sorted(early.keys() - late.keys())),
        only_after=tuple(sorted(late.keys() - early.keys())),
        too_few={label: counts for label, counts in both.items() if min(counts) < min_pairs},
    )


def _measured(rows: pd.DataFrame) -> pd.api.typing.SeriesGroupBy:
    return rows[rows["excluded"] == ""].groupby("label")["value"]


def _by_class(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean, spread and count of every class that the rows name, measured or not."""
    found = {label: (math.fsum(part) / len(part), part.std(ddof=1), len(part)) for label, part in _measured(rows)}
    every = pd.Index(sorted(set(rows["label"])), name="label")
    classes = pd.DataFrame.from_dict(found, orient="index", columns=["mean", "std", "count"]).reindex(every)
    return classes.fillna({"count": 0}).astype({"mean": float, "std": float, "count": int})


def _check_min_pairs(min_pairs: int) -> None:
    if min_pairs < 1:
        raise ValueError(f"min_pairs: expected at least 1, got {min_pairs}")


def _some(classes: Mapping[str, object], most: int = 5) -> str:
    shown = ", ".join(map(repr, sorted(classes)[:most]))
    return f"{len(classes)} ({shown}{', ...' if len(classes) > most else ''})" if classes else "none"
