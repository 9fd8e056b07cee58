"""Methods by the layers that they attribute to, as heat maps, and how far each method agrees with the referee."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lightning_xai.report.figures import LayerMap, layer_maps
from lightning_xai.report.page import Block, Chart, Note
from lightning_xai.report.paper_table import Column, PaperTable, Value, score_column
from lightning_xai.results.layers import LAYER_SCORES, GammaAgreement, Sweep, gamma_agreement, layer_scores, sweeps
from lightning_xai.results.runs import Estimate, Measurement, Run

_UNDERSTATES = 0.05
_HEADINGS = {
    "agreement": Column("maps: rank correlation"),
    "completeness_error": Column("completeness error"),
    "prefix_share": Column("on CLS and registers", percent=True, digits=1),
    "spearman": Column("faithfulness (Spearman)"),
}
_CORRELATION, _DIFFERENCE = Column("γ: rank correlation"), Column("γ less the referee's", signed=True)
_BOTH = Column("both γ > 0.5", percent=True, digits=1)
_TABLE_NOTE = "The layers are those whose inputs are attributed to: image tower, text tower; 0 is the towers' inputs."
_REFEREE_NOTE = (
    " With the referee: the mean rank correlation of its maps of each phrase with the method's, the rank correlation "
    "of both γ over phrases, the mean difference ± its standard error, and the share of phrases with γ > 0.5 in both."
)


def layer_blocks(runs: Sequence[Run]) -> list[Block]:
    """Of each run that has several pairs of layers, or a referee: what stands out, heat maps, and the table."""
    blocks: list[Block] = []
    for run in runs:
        for each in run.measurements:
            for sweep in sweeps(each):
                blocks += [*(Note(text) for text in sentences(each, sweep)), _chart(each, sweep)]
            blocks += layer_tables(each)
    return blocks


def layer_tables(measurement: Measurement) -> Iterator[PaperTable]:
    """A line for each method of a sweep, with a referee for each method; nothing where there is neither."""
    referee = _referee(measurement)
    labels = list(dict.fromkeys(label for sweep in sweeps(measurement) for label in sweep.labels.values()))
    if referee is not None:
        labels += [label for label in measurement.record.methods if label not in (*labels, referee)]
        labels.append(referee)
    if not labels:
        return
    scores = layer_scores(measurement, labels).dropna(axis="columns", how="all")
    columns = [Column("method", numeric=False), *(_column(measurement, name) for name in scores.columns)]
    rows: list[list[Value]] = [
        [measurement.record.shown(label) + (" (referee)" if label == referee else ""), *scores.loc[label].tolist()]
        for label in labels
    ]
    if referee is not None:
        columns += [_CORRELATION, _DIFFERENCE, _BOTH, Column("phrases")]
        rows = [row + _compared_with(measurement, label, referee) for row, label in zip(rows, labels, strict=True)]
    note = _TABLE_NOTE + (_REFEREE_NOTE if referee is not None else "")
    yield PaperTable(f"layers-{measurement.run}", f"Layers and referee on {measurement.data}", note, columns, rows)


def sentences(measurement: Measurement, sweep: Sweep) -> Iterator[str]:
    """Say which layers agree with the referee and which understate it, from the numbers."""
    referee = _referee(measurement)
    if referee is None:
        yield f"{sweep.method} was measured at {len(sweep.labels)} pairs of layers, without a referee."
        return
    labels = list(sweep.labels.values())
    maps = layer_scores(measurement, [*labels, referee])["agreement"]
    gammas = {label: gamma_agreement(measurement, label, referee) for label in labels}
    correlations = {
        "Maps": {label: float(maps[label]) for label in labels},
        "γ over phrases": {label: found.correlation for label, found in gammas.items()},
    }
    for what, values in correlations.items():
        known = {label: value for label, value in values.items() if not math.isnan(value)}
        if known:
            best, least = max(known, key=lambda label: known[label]), min(known, key=lambda label: known[label])
            yield (
                f"{what}: {measurement.record.shown(best)} agrees best with {referee} (rank correlation "
                f"{known[best]:.2f}), {measurement.record.shown(least)} least ({known[least]:.2f})."
            )
    yield from _chance(measurement, referee)
    if not math.isnan(maps[referee]):
        yield (
            f"{referee} agrees with itself at other seeds to {maps[referee]:.2f}; the further from 1, the more samples "
            "it needs, and the lower all other correlations are."
        )
    yield _understated(measurement, sweep, referee, gammas)


def _chance(measurement: Measurement, referee: str) -> Iterator[str]:
    """How far the gammas of baselines agree with the referee's: what a correlation of gammas is worth."""
    for label, method in measurement.record.methods.items():
        found = gamma_agreement(measurement, label, referee).correlation if method.baseline else math.nan
        if not math.isnan(found):
            yield (
                f"γ over phrases: {label}, which ignores the model, agrees with {referee} to {found:.2f}, since a "
                "large box holds more of any map; only what is above it says something of the model."
            )


def _understated(measurement: Measurement, sweep: Sweep, referee: str, gammas: Mapping[str, GammaAgreement]) -> str:
    """Name the pairs of layers whose gamma is below the referee's, and those where it is not."""
    low = {label: found for label, found in gammas.items() if found.difference < -max(_UNDERSTATES, 2 * found.error)}
    where = {label: f"({', '.join(map(_layer, pair))})" for pair, label in sweep.labels.items()}
    above = 100 * layer_scores(measurement, [*where, referee])["gamma_above_50"]
    rule = f"lower by more than {_UNDERSTATES} on average, and than two standard errors"
    if not low:
        return f"{sweep.method} understates γ at none of these layers ({rule})."
    named = ", ".join(
        f"{where[label]} by {-found.difference:.2f} (γ > 0.5: {above[label]:.0f} %)" for label, found in low.items()
    )
    rest = ", ".join(name for label, name in where.items() if label not in low)
    not_at = f"; not at {rest}" if rest else ""
    return (
        f"{sweep.method} understates γ at layers {named}{not_at}. {referee} has γ > 0.5 for {above[referee]:.0f} %. "
        f"To understate is to be {rule}."
    )


def _chart(measurement: Measurement, sweep: Sweep) -> Chart:
    """A heat map over (image layer, text layer) for each score, with the referee's number as its mark."""
    referee, labels = _referee(measurement), list(sweep.labels.values())
    frame = layer_scores(measurement, [*labels, *(() if referee is None else (referee,))])
    columns = {name: _column(measurement, name) for name in frame.columns if frame.loc[labels, name].notna().any()}
    if referee is not None:
        gammas = pd.DataFrame([gamma_agreement(measurement, label, referee) for label in labels], index=labels)
        frame[["correlation", "difference"]] = gammas[["correlation", "difference"]]
        columns |= {"correlation": _CORRELATION, "difference": _DIFFERENCE}
    rows, across = sweep.axes
    maps = []
    for name, column in columns.items():
        values = np.full((len(rows), len(across)), math.nan)
        for (image, text), label in sweep.labels.items():
            values[rows.index(image), across.index(text)] = column.numbers(float(frame.loc[label, name]))[0]
        mark = math.nan if referee is None else column.numbers(float(frame.loc[referee, name]))[0]
        maps.append(LayerMap(column.heading, values, mark))
    title = f"{sweep.method} by layer on {measurement.data}" + (f", referee: {referee}" if referee else "")
    figure = layer_maps(maps, [_layer(each) for each in rows], [_layer(each) for each in across], title)
    alt = "; ".join(f"{each.heading}: {', '.join(f'{value:.2f}' for value in each.values.flat)}" for each in maps)
    note = "Down: image layer; across: text layer; 0 is the towers' inputs."
    note += " The line on a colour bar is the referee's own number." if referee else ""
    return Chart(f"layers-{measurement.run}-{sweep.method}", title, note, f"{alt}.", figure)


def _layer(layer: int) -> str:
    return "last" if layer == -1 else str(layer)


def _compared_with(measurement: Measurement, label: str, referee: str) -> list[Value]:
    if label == referee:
        return [None] * 4
    found = gamma_agreement(measurement, label, referee)
    difference = Estimate(found.difference, found.error, found.count)
    return [found.correlation, difference, found.both_above_50, found.count]


def _column(measurement: Measurement, name: str) -> Column:
    """The column of a score, nothing of it bold: a larger γ is not a truer one."""
    if name in _HEADINGS:
        return _HEADINGS[name]
    scores = measurement.record.metrics[LAYER_SCORES[name]].scores
    return replace(score_column(next(score for score in scores if score.name == name)), better=None)


def _referee(measurement: Measurement) -> str | None:
    """The label of the referee, where it was measured."""
    label = measurement.record.settings.get("referee")
    return label if label in measurement.record.methods and "grounding" in measurement.record.metrics else None
