"""The papers' tables from runs: which numbers go where. How they are printed is `table_formats`' business.

Grounding as Tables 1 and 2 of "Explaining caption-image interactions in CLIP models with second-order attributions";
degradation, localization and the grid as Tables 1 and 2 of "Visual Explanations of Image-Text Representations via
Multi-Modal Information Bottleneck Attribution".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from lightning_xai.report.paper_table import (
    Better,
    Body,
    Cell,
    Column,
    PaperTable,
    count,
    estimate,
    mark_best,
    number,
    percent,
    words,
)
from lightning_xai.report.tables import NO_VALUE, epoch_name, is_percent
from lightning_xai.results.runs import FEATURE_PAIR, Run, by_data
from lightning_xai.results.schema import CONTROLS, MODALITIES, Estimate, MethodResult, RoarResult

__all__ = [
    "degradation_table",
    "grid_tables",
    "grounding_table",
    "hard_negatives_table",
    "left_out_table",
    "progress_table",
    "runs_table",
    "signs_table",
]

_CONTROLS_HEADING = "Controls, which know nothing of the model"
_GROUNDING = {"gamma_above_50": "γ > 0.5 [%] ↑", "gamma_above_80": "γ > 0.8 [%] ↑", "rho": "ρ [%] ↑"}
_SAYS_NO_DATA = ("folder", "broken_records")
_MEASURES: dict[str, dict[str, tuple[str, Better]]] = {
    "image": {
        "image_drop": ("Conf. drop [%] ↓", "down"),
        "image_increase": ("Conf. increase [%] ↑", "up"),
        "roar": ("ROAR+ [%] ↑", "up"),
        "localization_iou": ("Localization [%] ↑", "up"),
    },
    "text": {
        "text_drop": ("Conf. drop [%] ↓", "down"),
        "text_increase": ("Conf. increase [%] ↑", "up"),
        "roar": ("ROAR+ [%] ↑", "up"),
    },
}


def runs_table(runs: Sequence[Run]) -> PaperTable:
    """What the report is about."""
    rows = []
    for run in runs:
        kind = "training" if run.training else "ROAR+" if run.roar else "evaluation"
        rows.append((words(run.name), words(kind), words(run.model), words(run.data), words(str(run.folder))))
    return PaperTable(
        name="runs",
        title="Runs",
        note="What each was measured with stands at the end of the page.",
        columns=tuple(Column(name, numeric=False) for name in ("run", "kind", "model", "data", "folder")),
        bodies=(Body("", tuple(rows)),),
    )


class _Entry(NamedTuple):
    """One line of the grounding table on one data set."""

    run: str
    state: str
    label: str
    control: bool
    data: str  # key of the data set
    cells: list[Cell]  # γ > 0.5, γ > 0.8, ρ, pairs
    model: str  # what makes two runs one line, where they are of different data sets


def grounding_table(runs: Sequence[Run]) -> PaperTable | None:
    """Gamma and rho by run and method, with columns of its own for each data set; None where nobody measured them.

    The results of one model on several data sets stand in one line.
    """
    keys, data = _data_sets(runs)
    entries = [entry for run in runs for entry in _grounding_entries(run, keys)]
    if not entries:
        return None
    sets = list(dict.fromkeys(entry.data for entry in entries))
    states = any(entry.state for entry in entries)
    lines: dict[tuple[str, str, str], dict[str, _Entry]] = defaultdict(dict)
    for entry in entries:
        key = (entry.model, entry.state, entry.label)
        if entry.data in lines[key]:  # the same model twice on the same data: two lines
            key = (entry.run, entry.state, entry.label)
        lines[key][entry.data] = entry
    own = [line for line in lines.values() if not next(iter(line.values())).control]
    controls = [line for line in lines.values() if next(iter(line.values())).control]
    width = len(_GROUNDING) + 1
    nothing = [Cell(NO_VALUE)] * width
    columns = [Column("run", numeric=False), *([Column("state", numeric=False)] if states else [])]
    columns += [Column("method", numeric=False)]
    columns += [
        Column(name, data[key] if len(sets) > 1 else "") for key in sets for name in (*_GROUNDING.values(), "pairs")
    ]
    bodies = []
    for heading, group in (("", own), (_CONTROLS_HEADING, controls)):
        rows = []
        for line in group:
            some = next(iter(line.values()))
            head = [words(" / ".join(dict.fromkeys(entry.run for entry in line.values())))]
            head += [words(some.state), words(some.label)] if states else [words(some.label)]
            rows.append([*head, *(cell for key in sets for cell in (line[key].cells if key in line else nothing))])
        if group is own:
            places = [i for i, column in enumerate(columns) if column.heading in _GROUNDING.values()]
            rows = _best_of_columns(rows, dict.fromkeys(places, "up"))
        if rows:
            bodies.append(Body(heading, tuple(map(tuple, rows))))
    where = "" if len(sets) > 1 else f" on {data[sets[0]]}"
    return PaperTable(
        name="grounding",
        title=f"Visual-linguistic grounding{where}",
        note="γ: share of a phrase's positive attribution that lies in the box of its object; ρ: share of phrases "
        "whose largest attribution lies in it. The best of each column is bold, controls aside.",
        columns=tuple(columns),
        bodies=tuple(bodies),
    )


def signs_table(runs: Sequence[Run]) -> PaperTable | None:
    """Signs of the attributions to a phrase's own object and to other objects; None where nobody measured them."""
    columns: dict[str, tuple[str, Better | None]] = {
        "own_positive": ("own box positive [%] ↑", "up"),
        "other_negative": ("other box negative [%]", None),
    }
    return _methods_table(
        runs,
        "other_objects",
        columns,
        PaperTable(
            "other_objects",
            "Attribution to a phrase's own object and to another object that the caption names",
            "Share of pairs of objects with a positive total in the own box, and with a negative one in the other's. "
            "For methods that know a sign. The best on each data set is bold, controls aside.",
            (),
            (),
        ),
    )


def hard_negatives_table(runs: Sequence[Run]) -> PaperTable | None:
    """What swapping an object's name does to its box; None where nobody measured it."""
    columns: dict[str, tuple[str, Better | None]] = {
        "delta_negative": ("δ < 0 [%] ↑", "up"),
        "delta_mean": ("mean δ ↓", None),
    }
    return _methods_table(
        runs,
        "hard_negatives",
        columns,
        PaperTable(
            "hard_negatives",
            "Hard negative captions",
            "δ: attribution of the wrong object's name to the true object's box minus that of the true name. Below "
            "0 the model has noticed. The mean has the scale of the method's maps. The best on each data set is bold, "
            "controls aside.",
            (),
            (),
        ),
    )


def degradation_table(runs: Sequence[Run]) -> PaperTable | None:
    """Confidence, ROAR+ and localization: methods side by side, as in the M2IB paper's Table 1; None without any.

    Runs of the same model on the same data follow each other, so that ROAR+ stands below confidence.
    """
    lines = [
        (run, modality, measure, scores)
        for run in sorted(runs, key=lambda run: _place_of(run, runs))
        for modality, measures in _MEASURES.items()
        for measure in measures
        if (scores := _scores(run, modality, measure))
    ]
    if not lines:
        return None
    lines.sort(key=lambda line: (_place_of(line[0], runs), MODALITIES.index(line[1])))
    labels = list(dict.fromkeys(label for *_, scores in lines for label in scores))
    names = {label: _method_of(label, runs) for label in labels}
    own = [label for label in labels if names[label] not in CONTROLS]
    labels = own + [label for label in labels if label not in own]
    columns = [Column("run", numeric=False), Column("of", numeric=False), Column("measure", numeric=False)]
    columns += [Column(label, "" if label in own else "controls") for label in labels]
    rows = []
    for run, modality, measure, scores in lines:
        heading, better = _MEASURES[modality][measure]
        cells = [estimate(scores[label]) if label in scores else Cell(NO_VALUE) for label in labels]
        rows.append((words(run.name), words(modality), words(heading), *mark_best(cells, better, range(len(own)))))
    return PaperTable(
        name="degradation",
        title="What is left, and what is lost, when the important parts are kept or removed",
        note="Confidence with only the important part kept; ROAR+: rise of the loss after retraining without it. Mean "
        "± standard error over seeds, where there are several; the best of each row is bold, controls aside.",
        columns=tuple(columns),
        bodies=(Body("", tuple(rows)),),
    )


def grid_tables(runs: Sequence[Run]) -> list[PaperTable]:
    """ROAR+ of the points of a grid, as in the M2IB paper's Table 2: one table for each run and modality.

    The last option of the grid goes to the right, the others down, in groups by the first of three or more.
    """
    return [
        _grid_table(run, run.roar, modality)
        for run in runs
        if run.roar is not None and run.roar.grid
        for modality in MODALITIES
        if any(modality in method.losses for method in run.roar.methods.values())
    ]


def _grid_table(run: Run, roar: RoarResult, modality: str) -> PaperTable:
    *down, right = roar.grid
    places = list(product(*(roar.grid[option] for option in down)))
    cells = mark_best(
        [
            estimate(roar.score(label, modality))
            if (label := roar.label_at(dict(zip(roar.grid, (*above, value), strict=True))))
            else Cell(NO_VALUE)
            for above in places
            for value in roar.grid[right]
        ],
        "up",
    )
    grouped, width = len(down) > 1, len(roar.grid[right])
    bodies: dict[str, list[tuple[Cell, ...]]] = {}
    for place, above in enumerate(places):
        heading = f"{_symbol(down[0])} = {above[0]}" if grouped else ""
        row = (*map(words, map(str, above[grouped:])), *cells[place * width : (place + 1) * width])
        bodies.setdefault(heading, []).append(row)
    columns = [Column(_symbol(option), numeric=False) for option in down[grouped:]]
    columns += [Column(f"{_symbol(right)} = {value}") for value in roar.grid[right]]
    return PaperTable(
        f"grid-{run.name}-{modality}",
        f"Hyperparameters by ROAR+ [%] on {run.data}, {modality} ({run.name})",
        "Rise of the loss after retraining without what is important; higher is better, the best is bold.",
        tuple(columns),
        tuple(Body(heading, tuple(rows)) for heading, rows in bodies.items()),
    )


def progress_table(run: Run) -> PaperTable | None:
    """A training's grounding at each measurement, with the most telling of what else was logged."""
    if run.training is None:
        return None
    summary = run.training.summary
    extras = [key for key in ("loss", "image_to_text_recall_at_1", "text_to_image_recall_at_1") if key in summary[-1]]
    columns = [Column("after", numeric=False), Column("γ mean ↑"), *map(Column, _GROUNDING.values()), Column("pairs")]
    columns += [Column(_logged_heading(key)) for key in extras]
    rows = []
    for row in summary:
        cells = [words(epoch_name(row["epoch"])), number(_float(row, "gamma_mean"))]
        cells += [percent(_float(row, key)) for key in _GROUNDING]
        cells.append(count(row["pairs"]))
        cells += [percent(_float(row, key)) if is_percent(key) else number(_float(row, key)) for key in extras]
        rows.append(cells)
    best: dict[int, Better] = {1: "up", 2: "up", 3: "up", 4: "up"}
    best |= {6 + i: "up" if is_percent(key) else "down" for i, key in enumerate(extras)}
    return PaperTable(
        name=f"progress-{run.name}",
        title=f"Grounding while {run.name} learned",
        note="R@1: share of pairs whose partner is found first among all images or captions of the split.",
        columns=tuple(columns),
        bodies=(Body("", tuple(map(tuple, _best_of_columns(rows, best)))),),
    )


def left_out_table(runs: Sequence[Run]) -> PaperTable | None:
    """How much was measured and how much left out, by reason; None where no run says so."""
    counts: list[tuple[str, str, str, dict[str, int]]] = []
    for run in runs:
        if run.evaluation is not None:
            for label, method in run.evaluation.methods.items():
                counts += [(run.name, label, metric, dict(found)) for metric, found in method.counts.items()]
        if run.training is not None:
            last = run.training.summary[-1]
            left_out = {
                key.removeprefix("left_out_"): int(value)
                for key, value in last.items()
                if key.startswith("left_out_") and value == value
            }
            counts.append((run.name, FEATURE_PAIR, "grounding", {"measured": last["pairs"], **left_out}))
    reasons = [why for why in dict.fromkeys(why for *_, found in counts for why in found) if why != "measured"]
    reasons = [why for why in reasons if any(found.get(why) for *_, found in counts)]
    if not counts:
        return None
    columns = [Column(name, numeric=False) for name in ("run", "method", "metric")]
    columns += [Column("measured"), *(Column(why.replace("_", " "), "left out") for why in reasons)]
    rows = []
    for run_name, label, metric, found in counts:
        cells = [
            count(found.get("measured", 0)),
            *(count(found[why]) if why in found else Cell(NO_VALUE) for why in reasons),
        ]
        rows.append((words(run_name), words(label), words(metric.replace("_", " ")), *cells))
    return PaperTable(
        name="left_out",
        title="What was measured, and what was left out and why",
        note="Summed over the seeds of a method; of a training, the last measurement. A dash: the metric knows no "
        "such reason.",
        columns=tuple(columns),
        bodies=(Body("", tuple(rows)),),
    )


def _grounding_entries(run: Run, keys: Mapping[tuple[str, str], str]) -> list[_Entry]:
    entries = []
    if run.training is not None:
        for row in run.training.summary:
            state = epoch_name(row["epoch"])
            cells = [percent(_float(row, key)) for key in _GROUNDING]
            key = keys.get((run.name, state), _unknown(run))
            entries.append(_Entry(run.name, state, FEATURE_PAIR, False, key, [*cells, count(row["pairs"])], run.name))
    if run.evaluation is not None:
        model = str(run.evaluation.model.get("fingerprint") or run.name)
        for label, method in run.evaluation.methods.items():
            if "grounding" not in method.counts:
                continue
            cells = [estimate(method.estimate(key), digits=1) for key in _GROUNDING]
            cells.append(count(_pairs(method, "grounding")))
            control = method.method in CONTROLS
            entries.append(
                _Entry(run.name, "", label, control, keys.get((run.name, label), _unknown(run)), cells, model)
            )
    return entries


def _methods_table(
    runs: Sequence[Run], metric: str, measures: Mapping[str, tuple[str, Better | None]], empty: PaperTable
) -> PaperTable | None:
    """A line for each run and method with these measures; `empty` with columns and rows."""
    own: list[list[Cell]] = []
    data: list[str] = []  # of each of these lines: the best is that of one data set
    controls: list[list[Cell]] = []
    for run in runs:
        for label, method in run.evaluation.methods.items() if run.evaluation else ():
            if not any(name in method.metrics for name in measures):
                continue
            cells = [_metric_cell(method.estimate(name), heading) for name, (heading, _) in measures.items()]
            row = [words(run.name), words(run.data), words(label), *cells, count(_pairs(method, metric))]
            if method.method in CONTROLS:
                controls.append(row)
            else:
                own.append(row)
                data.append(_evaluated_data(run))
    if not own and not controls:
        return None
    best = {3 + i: better for i, (_, better) in enumerate(measures.values()) if better is not None}
    for each in dict.fromkeys(data):
        lines = [i for i, key in enumerate(data) if key == each]
        for i, row in zip(lines, _best_of_columns([own[i] for i in lines], best), strict=True):
            own[i] = row
    groups = [("", own), (_CONTROLS_HEADING, controls)]
    columns = [Column(name, numeric=False) for name in ("run", "data", "method")]
    columns += [Column(heading) for heading, _ in measures.values()]
    return PaperTable(
        empty.name,
        empty.title,
        empty.note,
        (*columns, Column("pairs")),
        tuple(Body(heading, tuple(map(tuple, rows))) for heading, rows in groups if rows),
    )


def _evaluated_data(run: Run) -> str:
    """What tells the data of an evaluation from those of another one: all that is known, but where they lie."""
    data = run.evaluation.data if run.evaluation is not None else {}
    return repr(sorted((name, str(value)) for name, value in data.items() if name not in _SAYS_NO_DATA))


def _metric_cell(measured: Estimate, heading: str) -> Cell:
    return estimate(measured, digits=1) if "[%]" in heading else estimate(measured, scale=1, digits=4)


def _best_of_columns(rows: Sequence[Sequence[Cell]], places: Mapping[int, Better]) -> list[list[Cell]]:
    marked = [list(row) for row in rows]
    for place, better in places.items():
        for row, cell in zip(marked, mark_best([row[place] for row in rows], better), strict=True):
            row[place] = cell
    return marked


def _pairs(method: MethodResult, metric: str) -> int:
    """Measured of each seed: the same for all."""
    return method.counts.get(metric, {}).get("measured", 0) // max(len(method.seeds), 1)


def _scores(run: Run, modality: str, measure: str) -> dict[str, Estimate]:
    """Label -> score, of the methods that have one."""
    found: dict[str, Estimate] = {}
    if measure == "roar" and run.roar is not None and not run.roar.grid:
        found = {label: run.roar.score(label, modality) for label in run.roar.methods}
    elif run.evaluation is not None:
        found = {label: method.estimate(measure) for label, method in run.evaluation.methods.items()}
    return {label: score for label, score in found.items() if not math.isnan(score.mean)}


def _method_of(label: str, runs: Sequence[Run]) -> str:
    for run in runs:
        result = run.evaluation or run.roar
        if result is not None and label in result.methods:
            return result.methods[label].method
    return label


def _place_of(run: Run, runs: Sequence[Run]) -> int:
    """Place of the first run with the same model on the same data."""
    return next(i for i, other in enumerate(runs) if (other.model, other.data) == (run.model, run.data))


def _data_sets(runs: Sequence[Run]) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Run and label, or state, -> key of its data set; and the key of each data set -> a name that no other one has."""
    keys: dict[tuple[str, str], str] = {}
    names: dict[str, str] = {}
    for place, group in enumerate(by_data(each for run in runs for each in run.groundings)):
        keys |= {(each.run, each.state or each.label): str(place) for each in group}
        taken = group[0].data in names.values()
        names[str(place)] = f"{group[0].data} ({group[0].run})" if taken else group[0].data
    return keys, names | {_unknown(run): f"{run.data} ({run.name})" for run in runs}


def _unknown(run: Run) -> str:
    """Key of the data set of a run whose tables are not there."""
    return f"run {run.name}"


def _float(row: Mapping[str, Any], key: str) -> float:
    return float(row.get(key, math.nan))


def _logged_heading(key: str) -> str:
    names = {"image_to_text_recall_at_1": "i→t R@1 [%] ↑", "text_to_image_recall_at_1": "t→i R@1 [%] ↑"}
    return names.get(key, f"{key} ↓")


def _symbol(option: str) -> str:
    return {"layer": "ℓ", "beta": "β", "variance": "σ²"}.get(option, option)
