"""Whether two scores, of two runs or of one, put the same methods in the same order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import pandas as pd

from lightning_xai.results.runs import Measurement
from lightning_xai.results.trials import options_that_count

__all__ = ["known_to_differ", "method_scores", "rank_correlation"]


def method_scores(measurement: Measurement, metric: str, score: str) -> dict[str, float]:
    """A score of each method, over seeds, by what the method is: its name and all options that change its maps."""
    methods = measurement.record.methods
    return {
        _identity(methods[label].name, methods[label].options): found[score].mean
        for label, found in measurement.estimates(metric).items()
        if score in found
    }


def _identity(name: str, options: Mapping[str, Any]) -> str:
    # As text in one form: options of a result file are lists where those of another are tuples.
    return msgspec.json.encode([name, options_that_count(options)], order="deterministic").decode()


def known_to_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the models of two records have weights that are known, and not the same."""
    return len({each.get("fingerprint") for each in (one, other)} - {None}) > 1


def rank_correlation(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, int]:
    """Spearman's rank correlation over the keys that have a finite score in both, and their number.

    Ties are at their mean rank. NaN below two keys, and where a score is the same for all.

    >>> rank_correlation({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 5.0, "b": 9.0, "c": 7.0, "d": 0.0})
    (0.5, 3)
    """
    both = [name for name in one if name in other and math.isfinite(one[name]) and math.isfinite(other[name])]
    # Not pandas' own correlation, which rounds: equal orders have exactly 1.
    ranks = pd.DataFrame({"one": [one[name] for name in both], "other": [other[name] for name in both]}).rank()
    centred = ranks.to_numpy() - (len(both) + 1) / 2
    norms = math.sqrt(math.prod((centred**2).sum(axis=0).tolist()))
    correlation = float((centred[:, 0] * centred[:, 1]).sum()) / norms if len(both) > 1 and norms else math.nan
    return correlation, len(both)
