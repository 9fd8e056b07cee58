"""The table of grounding per epoch, for the terminal.

Nothing here needs torch: reports are read on machines that have no training environment.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from lightning_xai.results.record import state_name as epoch_name

__all__ = [
    "NO_VALUE",
    "epoch_name",
    "format_value",
    "grounding_table",
]

NO_VALUE = "–"

# Key of a row -> heading; gamma's mean is a share, the paper prints the other three in percent.
_GROUNDING_COLUMNS = {
    "gamma_mean": "γ mean",
    "gamma_above_50": "γ > 0.5 [%]",
    "gamma_above_80": "γ > 0.8 [%]",
    "rho": "ρ [%]",
    "targets": "targets",
}
_PERCENT = ("gamma_above_50", "gamma_above_80", "rho", "recall", "accuracy")


def is_percent(key: str) -> bool:
    """Whether a row's value under `key` is a fraction in [0, 1] that reports print in percent.

    >>> [is_percent(key) for key in ("rho", "text_to_image_recall@1", "gamma_mean", "val_loss")]
    [True, True, False, False]
    """
    return any(part in key for part in _PERCENT)


def format_value(key: str, value: object) -> str:
    """One cell as text: fractions in percent with one digit, other floats with four significant digits.

    >>> [format_value("rho", 0.5512), format_value("gamma_mean", 0.41), format_value("val_loss", 12.34567)]
    ['55.1', '0.410', '12.35']
    >>> [format_value("pairs", 3500), format_value("rho", float("nan")), format_value("rho", None)]
    ['3500', '–', '–']
    """
    if value is None:
        return NO_VALUE
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    if isinstance(value, numbers.Integral) and not is_percent(key):
        return str(int(value))
    number = float(value)
    if math.isnan(number):
        return NO_VALUE
    if is_percent(key):
        return f"{100 * number:.1f}"
    return f"{number:.3f}" if key == "gamma_mean" else f"{number:#.4g}"


def grounding_table(rows: Sequence[Mapping[str, object]], title: str = "Grounding per epoch") -> Table:
    """A table with one line per measurement, for `rich.print`.

    Args:
        rows: in the order to show. `epoch` is needed: the number of finished epochs (0: before training) or a name.
            `gamma_mean`, `gamma_above_50`, `gamma_above_80` and `rho` are fractions in [0, 1], higher is better;
            `targets` is how many were measured. Every further key becomes a further column (`val_loss`,
            `image_to_text_recall@1`, ...), in the order of first appearance. Missing and NaN values show as a dash.
        title: stands above the table.

    Raises:
        ValueError: a row has no `epoch`.

    >>> from rich.console import Console
    >>> row = {"epoch": 0, "gamma_mean": 0.25, "gamma_above_50": 0.04, "gamma_above_80": 0.0, "rho": 0.2, "targets": 9}
    >>> table = grounding_table([row, row | {"epoch": 1, "rho": 0.5, "val_loss": 3.21}])
    >>> [str(column.header) for column in table.columns]
    ['epoch', 'γ mean', 'γ > 0.5 [%]', 'γ > 0.8 [%]', 'ρ [%]', 'targets', 'val loss']
    >>> [str(cell) for cell in table.columns[4].cells]
    ['20.0', '50.0']
    """
    for number, row in enumerate(rows):
        if "epoch" not in row:
            raise ValueError(f"row {number} has no 'epoch' (0: before training); it has {sorted(row)}")
    extras = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _GROUNDING_COLUMNS]
    headings = _GROUNDING_COLUMNS | {key: _heading(key) for key in extras if key != "epoch"}
    table = Table(title=title)
    table.add_column("epoch", no_wrap=True)
    for heading in headings.values():
        # Text, not str: rich would read a heading such as "ρ [%]" or a name in brackets as markup.
        table.add_column(Text(heading), justify="right")
    for row in rows:
        cells = [epoch_name(row["epoch"]), *(format_value(key, row.get(key)) for key in headings)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _heading(key: str) -> str:
    name = key.replace("_", " ").replace("/", " ")
    return f"{name} [%]" if is_percent(key) else name
