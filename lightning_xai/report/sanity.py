"""Result of a sanity check: curves over the stages of randomisation, the maps themselves, and a table.

After Figures 4 and 5 of Adebayo et al., "Sanity Checks for Saliency Maps" (2018), and Figure 4 of the M2IB paper.
Drawn from plain values and numpy arrays; nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from lightning_xai.report.paper_table import Column
from lightning_xai.report.plots import Example, GradedMap, Heat, evenly, heat_fault, progress_sheet, scaled
from lightning_xai.report.sheet import style

COLUMNS = ("method", "modality", "stage", "spearman", "ssim", "pairs", "constant")
"""What each row of a sanity check holds, in the order of its CSV file."""

_PANELS = {
    ("image", "spearman"): "image: rank correlation (Spearman)",
    ("image", "ssim"): "image: structure (SSIM)",
    ("text", "spearman"): "text: rank correlation (Spearman)",
}
_MOST_LABELS = 8
_MOST_STAGES = 3  # columns of the table, which has to fit a terminal

Row = Mapping[str, object]


@style()
def sanity_curves(rows: Sequence[Row], title: str = "Maps while the weights are randomised") -> Figure:
    """Draw the similarity of each method's maps to the original ones, against the stages of randomisation.

    Args:
        rows: of one sanity check, as `COLUMNS` says; `spearman` and `ssim` are at most 1, which is unchanged. A NaN
            leaves a gap.
        title: stands above the axes.

    Raises:
        ValueError: there are no rows.
    """
    stages, values = _values(rows)
    figure = Figure(figsize=(13.0, 4.6))
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    places, shown = np.arange(len(stages) + 1), evenly(len(stages) + 1, _MOST_LABELS)
    for axes, ((modality, measure), heading) in zip(panels, _PANELS.items(), strict=True):
        axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * mpl.rcParams["axes.prop_cycle"])
        for method in dict.fromkeys(values.index.get_level_values("method")):
            curve = values[measure].reindex([(method, modality, stage) for stage in stages])
            # A map is the same as itself before anything is random.
            axes.plot(places, [1.0, *curve], marker="o", label=method)
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        axes.set_xticks(shown, [["original", *stages][i] for i in shown], rotation=35, ha="right")
        axes.set_title(heading)
    panels[0].set_ylabel("similarity to the original map")
    figure.supxlabel("randomised from the last layer up to and with", fontsize="medium")
    figure.suptitle(title)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def sanity_sheet(
    example: Example,
    maps: Mapping[str, Sequence[Heat]],
    stages: Sequence[str],
    title: str = "Maps while the weights are randomised",
    *,
    columns: int = 8,
    side: int = 160,
) -> Figure:
    """One image's maps: a row for each method, a column for each stage, after Figure 4 of the M2IB paper.

    Maps with entries of both signs are red and blue, each relative to its own largest magnitude; others go from their
    lowest value (no colour) to their highest (red).

    Args:
        example: the image and its caption.
        maps: method -> [h, w] maps, one for each stage.
        stages: names of the stages, the first that of the original model.
        title: stands above the sheet.
        columns: at most so many stages, spread evenly, the first and the last among them.
        side: pixels of a picture's longer side.

    Raises:
        ValueError: no maps, or not one for each stage.
    """
    if not maps or any(len(given) != len(stages) for given in maps.values()):
        counts = {method: len(given) for method, given in maps.items()}
        raise ValueError(f"expected {len(stages)} maps of each method, one for each stage; got {counts or 'none'}")
    rows = [replace(example, caption=f"{method}: {example.caption}", spans=()) for method in maps]
    drawn = [[GradedMap(_unsigned(heats[i])) for heats in maps.values()] for i in range(len(stages))]
    return progress_sheet(rows, drawn, stages, title, columns=columns + 1, side=side)


def _unsigned(heat: Heat) -> Heat:
    """The map from its lowest value to its highest, unless it has both signs."""
    return heat if heat_fault(heat) is not None or np.min(heat) < 0 < np.max(heat) else scaled(heat, "range")


def sanity_table(
    rows: Sequence[Row], title: str = "Sanity check: similarity to the maps of the original model"
) -> Table:
    """A line for each method and modality: rank correlation at some stages, structure at the end, for `rich.print`.

    Args:
        rows: of one sanity check, as `COLUMNS` says.
        title: stands above the table.

    Raises:
        ValueError: there are no rows.

    >>> row = {"method": "rise", "modality": "image", "stage": "head", "spearman": 0.25, "pairs": 4, "constant": 1}
    >>> table = sanity_table([row | {"ssim": 0.5}])
    >>> [str(column.header) for column in table.columns]
    ['method', 'maps', 'ρ 1', 'SSIM 1', 'constant']
    >>> [str(next(iter(column.cells))) for column in table.columns]
    ['rise', 'image', '0.250', '0.500', '1/5']
    """
    stages, values = _values(rows)
    shown = evenly(len(stages), _MOST_STAGES)
    legend = "; ".join(f"{i + 1}: {stages[i]}" for i in shown)
    caption = f"1.000: the map is unchanged by what was randomised, up to and with stage {legend}"
    table = Table("method", "maps", title=title, box=box.SIMPLE, caption=caption)
    for heading in (*(f"ρ {i + 1}" for i in shown), f"SSIM {len(stages)}", "constant"):
        table.add_column(heading, justify="right")
    for (method, modality), found in values.groupby(level=["method", "modality"], sort=False):
        of_stage = found.droplevel(["method", "modality"])
        numbers = [
            *of_stage["spearman"].reindex([stages[i] for i in shown]),
            of_stage["ssim"].get(stages[-1], math.nan),
        ]
        constant, pairs = int(found["constant"].sum()), int(found["pairs"].sum())
        cells = [Column("").text(number) for number in numbers]
        table.add_row(*map(Text, (method, modality, *cells, f"{constant}/{constant + pairs}")))
    return table


def _values(rows: Sequence[Row]) -> tuple[list[str], pd.DataFrame]:
    """The stages in their order, and the rows by method, modality and stage."""
    if not rows:
        raise ValueError(f"expected the rows of a sanity check ({', '.join(COLUMNS)}); got none")
    frame = pd.DataFrame(list(rows))
    return list(frame["stage"].unique()), frame.set_index(["method", "modality", "stage"])
