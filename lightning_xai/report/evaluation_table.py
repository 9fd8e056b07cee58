"""An evaluation on the terminal: a table for each group of metrics, a line for each method."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_xai.report.tables import NO_VALUE
from lightning_xai.results.schema import EvaluationResult, MethodResult

__all__ = ["GROUPS", "estimate_text", "evaluation_table"]

_DIGITS = {"delta_mean": 5}  # attributions are in units of the similarity, and a phrase adds little of it
GROUPS: dict[str, dict[str, tuple[str, bool]]] = {
    "Grounding": {
        "gamma_mean": ("γ mean ↑", False),
        "gamma_above_50": ("γ > 0.5 [%] ↑", True),
        "gamma_above_80": ("γ > 0.8 [%] ↑", True),
        "rho": ("ρ [%] ↑", True),
    },
    "Other objects and hard negatives": {
        "own_positive": ("own box positive [%] ↑", True),
        "other_negative": ("other box negative [%]", True),
        "delta_negative": ("δ < 0 [%] ↑", True),
        "delta_mean": ("δ mean ↓", False),
    },
    "Confidence and localization": {
        "image_drop": ("image drop [%] ↓", True),
        "image_increase": ("image increase [%] ↑", True),
        "text_drop": ("text drop [%] ↓", True),
        "text_increase": ("text increase [%] ↑", True),
        "localization_iou": ("IoU [%] ↑", True),
    },
}
"""Title -> metric -> heading, with an arrow to the better direction, and whether it is printed in percent."""


def evaluation_table(result: EvaluationResult) -> list[Table]:
    """A table for each group of metrics of which anything was measured."""
    tables = []
    for title, metrics in GROUPS.items():
        there = [name for name in metrics if any(name in method.metrics for method in result.methods.values())]
        if not there:
            continue
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("method", no_wrap=True)
        for name in there:
            table.add_column(Text(metrics[name][0].replace(" [%]", "\n[%]")), justify="right")
        for label, method in result.methods.items():
            table.add_row(label, *(Text(estimate_text(method, name, metrics[name][1])) for name in there))
        tables.append(table)
    return tables


def estimate_text(method: MethodResult, metric: str, percent: bool) -> str:
    """A metric of a method as text: the mean, and its standard error where the method was repeated.

    >>> method = MethodResult("m2ib", {}, False, (0, 1), {"rho": (0.5, 0.52), "gamma_mean": (0.25,)}, {})
    >>> [estimate_text(method, *cell) for cell in (("rho", True), ("gamma_mean", False), ("delta_mean", False))]
    ['51.0 ± 1.0', '0.250', '–']
    """
    estimate = method.estimate(metric)
    if math.isnan(estimate.mean):
        return NO_VALUE
    scale, digits = (100, 1) if percent else (1, _DIGITS.get(metric, 3))
    text = f"{scale * estimate.mean:.{digits}f}"
    error = estimate.standard_error
    return text if math.isnan(error) else f"{text} ± {scale * error:.{digits}f}"
