"""ROAR+ as tables to read: every method in both modalities, and the points of a grid as the M2IB paper's Table 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_xai.results.schema import CONTROLS, MODALITIES, Estimate, RoarResult

_NOTHING = "-"


def roar_table(result: RoarResult) -> Table:
    """Mean and standard error over seeds of (l_c - l_o) / l_o in percent; the highest of each modality is bold.

    Controls are left aside, and where only one other method has a score nothing is bold, as on the page.
    """
    seeds = len(result.original)
    table = Table(
        title=f"ROAR+ in % (higher is better), mean ± standard error over up to {seeds} seeds",
        caption=_losses(result),
    )
    table.add_column("method")
    modalities = _modalities(result)
    own = [label for label, method in result.methods.items() if method.method not in CONTROLS]
    best = {modality: _best({label: result.score(label, modality) for label in own}) for modality in modalities}
    for modality in modalities:
        table.add_column(modality, justify="right")
    for label in result.methods:
        cells = (_percent(result.score(label, each), label == best[each]) for each in modalities)
        table.add_row(label, *cells)
    return table


def grid_tables(result: RoarResult) -> list[Table]:
    """For each modality the mean score in percent of each point of the grid, the highest in bold.

    The last option of the grid goes to the right, the others down. Empty where the result has no grid.
    """
    if not result.grid:
        return []
    return [_grid_table(result, modality) for modality in _modalities(result)]


def _grid_table(result: RoarResult, modality: str) -> Table:
    *down, right = result.grid
    rows = [
        [result.label_at(dict(zip(result.grid, (*above, value), strict=True))) for value in result.grid[right]]
        for above in product(*(result.grid[option] for option in down))
    ]
    scores: dict[str | None, Estimate] = {
        label: result.score(label, modality) for row in rows for label in row if label is not None
    }
    best = _best(scores)
    table = Table(title=f"{modality}: ROAR+ in % (higher is better)")
    for option in down:
        table.add_column(option)
    for value in result.grid[right]:
        table.add_column(f"{right}={value}", justify="right")
    for above, row in zip(product(*(result.grid[option] for option in down)), rows, strict=True):
        cells = (_percent(scores.get(label), label == best, error=False) for label in row)
        table.add_row(*map(str, above), *cells)
    return table


def _modalities(result: RoarResult) -> list[str]:
    present = {modality for method in result.methods.values() for modality in method.losses}
    return [modality for modality in MODALITIES if modality in present]


def _best(scores: Mapping[Any, Estimate]) -> Any:
    """The key of the highest mean; None where there are no two to tell apart."""
    known = {key: score.mean for key, score in scores.items() if not math.isnan(score.mean)}
    return max(known, key=lambda key: known[key]) if len(known) > 1 else None


def _percent(score: Estimate | None, bold: bool, error: bool = True) -> Text:
    if score is None or math.isnan(score.mean):
        return Text(_NOTHING)
    text = f"{100 * score.mean:.2f}"
    if error:
        spread = _NOTHING if math.isnan(score.standard_error) else f"{100 * score.standard_error:.2f}"
        text += f" ± {spread}"
    return Text(text, style="bold" if bold else "")


def _losses(result: RoarResult) -> str:
    losses: Sequence[float] = list(result.original.values())
    parts = [f"validation loss: base model {result.base_loss:.4f}"]
    if losses:
        parts.append(f"retrained on original data {Estimate(tuple(losses)).mean:.4f}")
    if result.missing:
        parts.append(f"{len(result.missing)} cells are missing")
    return ", ".join(parts)
