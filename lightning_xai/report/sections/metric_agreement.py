"""Agreement of metrics on the order of methods, with each other and with where the objects are; cost of methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from lightning_xai.report.figures import correlations
from lightning_xai.report.page import Block, Chart, Note
from lightning_xai.report.paper_table import Column, PaperTable, score_column
from lightning_xai.results.record import Score
from lightning_xai.results.runs import Estimate, Measurement, Run

__all__ = ["agreement_blocks", "agreement_sentence", "method_scores"]

_FEWEST = 4  # methods that have an order to speak of
_MOST = 0.9  # of the methods; a referee is not compared with itself
_COST = "seconds_per_pair"


def agreement_blocks(runs: Sequence[Run]) -> list[Block]:
    """All scores of all methods, their rank agreement and the methods' cost, for each evaluation of several methods."""
    return [block for run in runs if run.record.kind == "evaluation" for block in _of_run(run)]


def _of_run(run: Run) -> Iterator[Block]:
    measurement = run.measurements[-1]
    frame, truths = method_scores(measurement), truth_names(measurement)
    if len(frame.index) < _FEWEST or len(frame.columns) < 2:
        return
    about = f"on {run.data} ({run.name})"
    yield _every_score(measurement, about)
    matrix = rank_agreement(frame)
    known = sum(name in truths for name in matrix)
    sentence = agreement_sentence(frame, truths)
    yield Note(sentence)
    title = f"Rank agreement between metrics {about}"
    note = (
        f"Spearman's rank correlation between the orders of {len(frame.index)} methods by each two scores, best first; "
        "baselines are left out. The line parts scores that know where the objects are from those that ask the model "
        "alone."
    )
    yield Chart(f"agreement-{run.name}", title, note, sentence, correlations(matrix, title, known))
    yield from _costs(measurement, about)


def _scores(measurement: Measurement) -> dict[str, tuple[str, Score]]:
    """Name of a score that is better up or down -> its metric and itself, those of the truth first."""
    metrics = sorted(measurement.record.metrics.values(), key=lambda metric: not metric.knows_objects)
    return {score.name: (metric.name, score) for metric in metrics for score in metric.scores if score.better}


def truth_names(measurement: Measurement) -> list[str]:
    """The scores that are measured against where the objects are."""
    metrics = measurement.record.metrics
    return [name for name, (metric, _) in _scores(measurement).items() if metrics[metric].knows_objects]


def method_scores(measurement: Measurement) -> pd.DataFrame:
    """A row for each method but baselines, a column for each score that is better up or down: means over seeds."""
    found: dict[str, dict[str, float]] = {}
    for metric in measurement.record.metrics:
        for label, scores in measurement.estimates(metric).items():
            if not measurement.record.methods[label].baseline:
                found.setdefault(label, {}).update({name: each.mean for name, each in scores.items()})
    frame = pd.DataFrame.from_dict(found, orient="index", dtype="float64")
    signs = {name: -1.0 if score.better == "down" else 1.0 for name, (_, score) in _scores(measurement).items()}
    frame = frame.reindex(columns=[name for name in signs if name in frame and frame[name].nunique() > 1])
    return frame * pd.Series(signs, dtype="float64").reindex(frame.columns)


def rank_agreement(scores: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each two columns, over the rows that have both; NaN below four of them.

    Args:
        scores: a row for each method, a column for each score, where more is better.

    >>> table = pd.DataFrame({"one": [1, 2, 3, 4.0], "other": [10, 20, 40, 30.0]})
    >>> float(rank_agreement(table).loc["one", "other"].round(2))
    0.8
    """
    return scores.corr(method="spearman", min_periods=_FEWEST)


def agreement_sentence(scores: pd.DataFrame, truths: Sequence[str]) -> str:
    """Say which scores order methods as those do that know where the objects are, on average, and which do not.

    Correlations that are smaller in magnitude than 2 / sqrt(n + 2) may be chance (Student's t at 5 %).

    Args:
        scores: a row for each method, a column for each score, where more is better.
        truths: the columns that know where the objects are.
    """
    matrix, count = rank_agreement(scores), scores.count()
    # What signed methods alone have, or what is in units of each method, orders other methods than the rest does.
    known = [name for name in scores if name in truths and count[name] == len(scores)]
    others = [name for name in scores if name not in truths and count[name] >= _MOST * len(scores)]
    few = [f"{name} ({count[name]})" for name in scores if name not in truths and name not in others]
    if not known or not others:
        return "There are no metrics of both kinds, with and without boxes, that all methods have."
    bound = 2 / math.sqrt(len(scores) + 2)
    means = matrix.loc[others, known].mean(axis="columns").sort_values(ascending=False, kind="stable")
    parts = {
        "agree": means[means >= bound],
        "cannot be distinguished from chance": means[means.abs() < bound],
        "have the opposite order": means[means <= -bound],
    }
    said = [
        f"{what}: {', '.join(f'{name} ({value:.2f})'.replace('-0.00', '0.00') for name, value in found.items())}"
        for what, found in parts.items()
        if len(found)
    ]
    left_out = f" Too few methods have {', '.join(few)}." if few else ""
    return (
        f"Of the scores that ask the model alone, compared with {', '.join(known)}, which know where objects are (mean "
        f"rank correlation over {len(scores)} methods, chance below {bound:.2f}), these "
        f"{'; these '.join(said)}.{left_out}"
    )


def _every_score(measurement: Measurement, about: str) -> PaperTable:
    """Methods by all scores in one table, baselines last."""
    record, columns = measurement.record, [Column("method", numeric=False)]
    cells: dict[str, list[Estimate | None]] = {label: [] for label in record.methods}
    for name, metric in record.metrics.items():
        found = measurement.estimates(name)
        for score in (score for score in metric.scores if score.better):
            columns.append(score_column(score, metric.title))
            for label, row in cells.items():
                row.append(found.get(label, {}).get(score.name))
    labels = sorted(cells, key=lambda label: record.methods[label].baseline)
    return PaperTable(
        f"judge-{measurement.run}",
        f"All methods by all metrics {about}",
        "The best of each column is bold, baselines aside; a dash where a method has not what the metric reads.",
        columns,
        [[record.shown(label), *cells[label]] for label in labels],
        baselines=sum(record.methods[label].baseline for label in labels),
    )


def _costs(measurement: Measurement, about: str) -> Iterator[PaperTable]:
    """What each method's maps take, on top of the forward pass that all share; nothing where it was not measured."""
    speed = measurement.record.speed
    forward = speed.get(_COST)
    found = {label: speed[f"{_COST}/{label}"] for label in measurement.record.methods if f"{_COST}/{label}" in speed}
    if forward and found:
        yield PaperTable(
            f"cost-{measurement.run}",
            f"Cost {about}",
            "Seconds for an image with its caption, and in forward passes of the model, with all maps that the metrics "
            "ask for: methods with token-patch attributions explain phrases within their caption, others each as a "
            "separate caption.",
            [
                Column("method", numeric=False),
                Column("seconds a pair", digits=4, better="down"),
                Column("forward passes", digits=1, better="down"),
            ],
            [[measurement.record.shown(label), seconds, seconds / forward] for label, seconds in found.items()],
        )
