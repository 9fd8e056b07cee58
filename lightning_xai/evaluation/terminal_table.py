"""Results on the terminal: a table for each metric, a line for each method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_xai.results.record import ResultRecord, Score, standard_error

__all__ = ["score_text", "terminal_tables"]

_ARROWS = {"up": " ↑", "down": " ↓", None: ""}


def terminal_tables(record: ResultRecord, scores: Mapping[tuple[str, int, str], float]) -> list[Table]:
    """Make a table for each metric of which anything was measured, for `rich.print`.

    Args:
        record: of the results.
        scores: (method, seed, score) -> value.
    """
    tables = []
    for metric in record.metrics.values():
        values = {
            (label, score.name): [
                value
                for seed in method.seeds
                if not math.isnan(value := scores.get((label, seed, score.name), math.nan))
            ]
            for label, method in record.methods.items()
            for score in metric.scores
        }
        # A spread over targets would be read as that over seeds.
        wanted = [score for score in metric.scores if score.reduce != "std"]
        shown = [score for score in wanted if any(values[label, score.name] for label in record.methods)]
        if not shown:
            continue
        table = Table(title=metric.title, box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("method", no_wrap=True)
        for score in shown:
            # Text, not str: rich would read "[%]" as markup.
            unit = "\n[%]" if score.percent else ""
            table.add_column(Text(score.heading + unit + _ARROWS[score.better]), justify="right")
        for label in record.methods:
            table.add_row(label, *(Text(score_text(score, values[label, score.name])) for score in shown))
        tables.append(table)
    return tables


def score_text(score: Score, values: Sequence[float]) -> str:
    """Write a score as text: the mean over seeds, and its standard error where there are several.

    >>> rho = Score(name="rho", value="rho", heading="ρ", percent=True)
    >>> mean = Score(name="delta_mean", value="delta", heading="δ mean")
    >>> score_text(rho, [0.5, 0.52]), score_text(mean, [0.25]), score_text(mean, [0.001234]), score_text(mean, [])
    ('51.0 ± 1.0', '0.250', '0.00123', '–')
    """
    if not values:
        return "–"
    mean, error = statistics.fmean(values), standard_error(values)
    scale, digits = (100, 1) if score.percent else (1, 3 if abs(mean) >= 0.01 else 5)
    text = f"{scale * mean:.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {scale * error:.{digits}f}"
