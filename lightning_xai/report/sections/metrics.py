"""A section for each metric that any run measured: a table for each data set, and the charts that the metric asks for.

Everything is driven by the metrics' own records, so that those of plug-ins are shown like the built-in ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_xai.report.figures import Panels, bars, cumulative, distribution
from lightning_xai.report.page import Block, Chart, Note, Section
from lightning_xai.report.paper_table import Column, PaperTable, score_column
from lightning_xai.results.method_ranks import known_to_differ, method_scores, rank_correlation
from lightning_xai.results.record import MetricRecord, Score
from lightning_xai.results.roar import label_at
from lightning_xai.results.runs import Estimate, Measurement, Run, by_data

Groups = Sequence[Sequence[Measurement]]
_SYMBOLS = {"layer": "ℓ", "beta": "β", "variance": "σ²"}
_MOST_MISSING = 6


def metric_sections(runs: Sequence[Run]) -> Iterator[Section]:
    """The sections of all metrics, in the order of their first appearance."""
    every = [each for run in runs for each in run.measurements]
    for name in dict.fromkeys(name for each in every for name in each.record.metrics):
        groups = by_data((each for each in every if name in each.record.metrics), name)
        data = Counter(group[0].data for group in groups)
        blocks: list[Block] = []
        for group in groups:
            about = group[0].data + (f" ({group[0].run})" if data[group[0].data] > 1 else "")
            blocks += metric_tables(name, group, about, suffix=f"-{about}" if len(groups) > 1 else "")
        metric = groups[0][0].record.metrics[name]
        if metric.chart is not None:
            charts = {"cumulative": _cumulative_charts, "distribution": _distribution_charts, "bars": _bar_charts}
            blocks += charts[metric.chart](metric, runs, groups)
        if name == "roar":
            blocks += [block for run in runs for block in _trials(run)]
        if name == "road":
            blocks += agreement_table(every)
        yield Section(f"metric-{name}", metric.title, tuple(blocks) or (Note("Nothing was measured.", missing=True),))


def score_columns(metric: MetricRecord) -> list[Column]:
    """The columns of a metric's scores; scores with the same heading bear their names."""
    twice = Counter(score.heading for score in metric.scores)
    columns = [score_column(score) for score in metric.scores]
    named = zip(columns, metric.scores, strict=True)
    return [
        Column(f"{c.name} ({s.name})", percent=c.percent, digits=c.digits, better=c.better) if twice[c.name] > 1 else c
        for c, s in named
    ]


def _shown(group: Sequence[Measurement]) -> list[Measurement]:
    """Those whose scores are shown in lines of their own: all but the points of a grid."""
    return [each for each in group if not each.record.extra.get("grid")]


def metric_tables(name: str, group: Sequence[Measurement], about: str, suffix: str = "") -> Iterator[PaperTable]:
    """The scores of one metric on one data set, a line for each run, state and method, baselines last."""
    metric = group[0].record.metrics[name]
    states = any(each.state for each in group)
    lines: list[tuple[bool, list[Any]]] = []
    for each in _shown(group):
        for label, scores in each.estimates(name).items():
            count = max(found.count for found in scores.values())
            head = [each.run, *([each.state] if states else []), each.record.shown(label)]
            cells = [scores.get(score.name) for score in metric.scores]
            lines.append((each.record.methods[label].baseline, [*head, *cells, count]))
    if not lines:
        return
    columns = [Column(heading, numeric=False) for heading in (("run", "state") if states else ("run",))]
    columns += [Column("method", numeric=False), *score_columns(metric), Column("targets")]
    if all(line[-1] == 1 for _, line in lines):  # one for each seed: there is nothing to count
        columns, lines = columns[:-1], [(baseline, line[:-1]) for baseline, line in lines]
    note = f"{metric.note} The best of each column is bold, baselines aside."
    if any(isinstance(cell, Estimate) and cell.error == cell.error for _, line in lines for cell in line):
        note += " Mean ± standard error over seeds, where there are several."
    yield PaperTable(
        f"{name}{suffix}",
        f"{metric.title} on {about}",
        note,
        columns,
        [line for _, line in sorted(lines, key=lambda line: line[0])],
        baselines=sum(baseline for baseline, _ in lines),
    )


def _cumulative_charts(metric: MetricRecord, runs: Sequence[Run], groups: Groups) -> Iterator[Chart]:
    """A figure for each run with its methods or states, and one for each data set with the runs by method."""
    there = {each for group in groups for each in group}
    for run in runs:
        own = [(each, label) for each in run.measurements if each in there for label in each.record.methods]
        found = [(each, label, each.sample(label, metric.scores[0].value)) for each, label in own]
        samples = {each.state or each.record.shown(label): values for each, label, values in found if len(values)}
        if len(samples) > 1 or (samples and len(runs) == 1):
            baselines = [run.record.shown(label) for label, method in run.record.methods.items() if method.baseline]
            yield _cumulative_chart(metric, {"": samples}, _about(run), baselines)
    for group in groups:
        latest = {each.run: each for each in group}  # of a training its last state
        panels = _by_method(metric, latest.values())
        shared = {label: samples for label, samples in panels.items() if len(samples) > 1}
        if shared:
            yield _cumulative_chart(metric, shared, f"runs side by side on {group[0].data}")


def _about(run: Run) -> str:
    """The run and its data; of a training, whose curves are of states, also its method and layers."""
    methods = f" ({', '.join(run.methods)})" if run.is_training else ""
    return f"{run.name} on {run.data}{methods}"


def _by_method(metric: MetricRecord, group: Iterable[Measurement]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Method and layers -> run and state -> the first value that a metric sums up, baselines aside."""
    panels: dict[str, dict[str, NDArray[np.float64]]] = {}
    for each in group:
        for label, method in each.record.methods.items():
            values = each.sample(label, metric.scores[0].value)
            if len(values) and not method.baseline:
                panels.setdefault(each.record.shown(label), {})[each.full_name] = values
    return panels


def _cumulative_chart(metric: MetricRecord, panels: Panels, about: str, baselines: Sequence[str] = ()) -> Chart:
    value = _symbol(metric)
    first = metric.scores[0].value
    shares = [score for score in metric.scores if score.reduce == "share_above" and score.value == first]
    title = f"Cumulative distributions of {value}, {about}"
    return Chart(
        f"{first}-{about}",
        title,
        "The higher a curve, the better. Dotted: the thresholds of the table.",
        f"Curves of the share of targets above each {value}. {_alt(shares[:1], panels)}",
        cumulative(panels, title, value, [score.threshold for score in shares], baselines=baselines),
    )


def _distribution_charts(metric: MetricRecord, runs: Sequence[Run], groups: Groups) -> Iterator[Chart]:
    """A panel for each method with the runs in it: the maps of each method have a scale of their own."""
    value, scores = _symbol(metric), metric.scores[:1]
    note = "Each method has its own scale; the outermost bins hold what lies beyond."
    for group in groups:
        panels, data = _by_method(metric, group), group[0].data
        if panels:
            title = f"Distribution of {value}: {metric.title} on {data}"
            figure = distribution(panels, title, value)
            yield Chart(f"{scores[0].value}-{data}", title, note, _alt(scores, panels), figure)


def _bar_charts(metric: MetricRecord, runs: Sequence[Run], groups: Groups) -> Iterator[Chart]:
    """A figure for each data set."""
    for group in groups:
        yield from _bar_chart(metric, group)


def _bar_chart(metric: MetricRecord, group: Sequence[Measurement]) -> Iterator[Chart]:
    """A panel for each score, a bar for each method of each run."""
    panels: dict[str, dict[str, Estimate]] = {}
    baselines = []
    shown = _shown(group)
    for each in shown:
        for label, scores in each.estimates(metric.name).items():
            method = each.record.shown(label)
            name = method if len(shown) == 1 else f"{each.full_name}, {method}"
            if each.record.methods[label].baseline:
                baselines.append(name)
            for score, column in zip(metric.scores, score_columns(metric), strict=True):
                if score.name in scores and scores[score.name].mean == scores[score.name].mean:
                    mean, error = column.numbers(scores[score.name])
                    panels.setdefault(column.heading, {})[name] = Estimate(mean, error, scores[score.name].count)
    if panels:
        title = f"{metric.title} on {group[0].data}"
        alt = "; ".join(
            f"{heading}: {', '.join(f'{name} {found.mean:.1f}' for name, found in each.items())}"
            for heading, each in panels.items()
        )
        yield Chart(f"bars-{metric.name}-{group[0].data}", title, "", f"{alt}.", bars(panels, baselines, title))


def _trials(run: Run) -> Iterator[Block]:
    """The retrainings of a ROAR+ that are missing, and its grid, as the M2IB paper's Table 2."""
    extra = run.record.extra
    missing = list(map(str, extra.get("missing", ())))
    if missing:
        some = ", ".join(missing[:_MOST_MISSING]) + (", …" if len(missing) > _MOST_MISSING else "")
        yield Note(f"{run.name}: {len(missing)} of the retrainings have not been run yet: {some}.", missing=True)
    if extra.get("grid") and "roar" in run.record.metrics:
        for score in run.record.metrics["roar"].scores:
            yield from grid_table(run.measurements[-1], score, f" on {run.data} ({run.name})")


def grid_table(measurement: Measurement, score: Score, about: str = "") -> Iterator[PaperTable]:
    """ROAR+ at each point of a grid: the last option to the right, the others down; nothing where none was measured."""
    grid: dict[str, list[Any]] = measurement.record.extra["grid"]
    found = {
        label: scores[score.name] for label, scores in measurement.estimates("roar").items() if score.name in scores
    }
    if not found:
        return
    *down, right = grid
    rows = []
    for above in product(*(grid[option] for option in down)):
        labels = [label_at(measurement.record, dict(zip(grid, (*above, value), strict=True))) for value in grid[right]]
        rows.append([*map(str, above), *(found.get(label) if label else None for label in labels)])
    columns = [Column(_SYMBOLS.get(option, option), numeric=False) for option in down]
    columns += [Column(f"{_SYMBOLS.get(right, right)} = {value}", percent=True, digits=2) for value in grid[right]]
    best = max((found.mean for found in found.values() if found.mean == found.mean), default=None)
    note = "Rise of the loss after retraining without what is important; higher is better."
    if best is not None:
        note += f" The best is {100 * best:.2f} %."
    yield PaperTable(
        f"grid-{measurement.run}-{score.value}", f"{score.heading}: hyperparameters{about}", note, columns, rows
    )


def agreement_table(measurements: Sequence[Measurement]) -> Iterator[PaperTable]:
    """Spearman's rank correlation of methods by ROAD and by ROAR+ on images, of each two runs that have both."""
    rows: list[list[Any]] = []
    for one, other in product(measurements, measurements):
        if not ("road" in one.record.metrics and "roar" in other.record.metrics):
            continue
        scores = (method_scores(one, "road", "road"), method_scores(other, "roar", "roar_image"))
        correlation, count = rank_correlation(*scores)
        if count > 1 and not known_to_differ(one.record.model, other.record.model):
            rows.append([one.full_name, other.full_name, correlation, count])
    if rows:
        columns = [Column("ROAD", numeric=False), Column("ROAR+", numeric=False), Column("Spearman"), Column("methods")]
        note = "Rank correlation of the methods that both runs measured with the same options, baselines included."
        yield PaperTable("road-roar", "Do ROAD and ROAR+ order methods alike?", note, columns, rows)


def _symbol(metric: MetricRecord) -> str:
    """Name in charts of the value that a metric sums up first: its heading's first letter, where that is Greek."""
    first = metric.scores[0]
    greek = next((char for char in first.heading if "α" <= char <= "ω"), "")
    return greek or first.value.replace("_", " ")


def _alt(scores: Sequence[Score], panels: Panels) -> str:
    """The scores of every sample of a chart, for those who do not see it."""
    named = (
        f"{', '.join(filter(None, (heading, name)))}: {score.heading} {_percent(score, values)}"
        for score in scores
        for heading, samples in panels.items()
        for name, values in samples.items()
    )
    return "; ".join(named) + "."


def _percent(score: Score, values: NDArray[np.float64]) -> str:
    return score_column(score).text(score.of(values.tolist())) + (" %" if score.percent else "")
