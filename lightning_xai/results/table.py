"""The long table of results: one row for each measured value of each target.

`values.csv` has a row (method, seed, target, metric, value, excluded). `excluded` is empty where the value was
measured, else the reason why not. `targets.csv` describes each target once: a phrase and the box of its object, a
caption, a hard negative, ... Join them on `target`. Every mean, class table and count is a group-by of these two.

Rows are in a canonical order and floats are written so that reading gives the same bits: the files are identical
whatever the number of processes. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from lightning_xai.atomic_file import replaced_at_once
from lightning_xai.results.record import ResultError, ResultRecord, Score, read_record, write_record

__all__ = [
    "TARGET_COLUMNS",
    "VALUE_COLUMNS",
    "ResultTable",
    "exclusions",
    "phrase_table",
    "read_csv",
    "read_result",
    "score_table",
    "summary_table",
    "write_csv",
    "write_result",
]

VALUES_NAME = "values.csv"
TARGETS_NAME = "targets.csv"
VALUE_COLUMNS = ("method", "seed", "target", "metric", "value", "excluded")
TARGET_COLUMNS = ("target", "kind", "index", "ordinal", "key", "caption_index", "caption", "label")
"""Columns that every target has; each kind adds its own (`phrase`, `x0`, `y0`, `x1`, `y1`, ...), empty elsewhere."""
_TEXT = {
    *("method", "target", "metric", "excluded", "kind", "key", "caption", "label"),
    *("phrase", "other_label", "negative_caption", "replacement"),
}

# Before pandas 3.1, the default parser may be off by a bit; since then, the option is deprecated.
_EXACT: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}
)


@dataclass(frozen=True, eq=False)
class ResultTable:
    """The long table.

    Attributes:
        values: columns `VALUE_COLUMNS`; `value` is float64, NaN where `excluded` gives a reason.
        targets: columns `TARGET_COLUMNS` and those that the kinds of targets add.
    """

    values: pd.DataFrame
    targets: pd.DataFrame

    @classmethod
    def of(cls, values: Iterable[Sequence[Any]], targets: Iterable[Mapping[str, Any]]) -> ResultTable:
        """Build it from rows in any order.

        Args:
            values: rows of `VALUE_COLUMNS`.
            targets: one mapping for each target; several processes or methods may describe the same one.
        """
        described = {target["target"]: target for target in targets}
        ordered = sorted(described.values(), key=lambda row: (row["index"], row["kind"], row["ordinal"]))
        more = sorted({column for row in ordered for column in row} - set(TARGET_COLUMNS))
        frame = pd.DataFrame(ordered, columns=[*TARGET_COLUMNS, *more])
        texts = [column for column in frame.columns if column in _TEXT]
        frame[texts] = frame[texts].fillna("").astype("str")
        places = {row["target"]: place for place, row in enumerate(ordered)}
        found = pd.DataFrame(list(values), columns=list(VALUE_COLUMNS)).astype(
            {"value": "float64"} | {column: "str" for column in VALUE_COLUMNS if column in _TEXT}
        )
        found["place"] = found["target"].map(places)
        found = found.sort_values(["method", "seed", "place", "metric"], kind="stable", ignore_index=True)
        return cls(found.drop(columns="place"), frame)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Values with the columns of their targets."""
        return self.values.merge(self.targets, on="target", how="left", validate="many_to_one")

    def measured(self, metric: str) -> pd.DataFrame:
        """The rows of `frame` of one metric that were measured."""
        frame = self.frame
        return frame[(frame["metric"] == metric) & (frame["excluded"] == "")]


def score_table(frame: pd.DataFrame, scores: Iterable[Score], by: Sequence[str] = ("method", "seed")) -> pd.DataFrame:
    """Scores by group: the one place where values become means, shares and counts.

    Args:
        frame: `ResultTable.values`, or `frame` where `by` names columns of targets.
        scores: how to sum up which values.
        by: columns whose combinations make a group.

    Returns:
        One row for each group and score of which the group has rows: the columns `by`, `score`, `value` and `count`
        (measured values). `value` is NaN where nothing was measured.
    """
    rows = []
    wanted: dict[str, list[Score]] = {}
    for score in scores:
        wanted.setdefault(score.value, []).append(score)
    columns = ["metric", *by, "value", "excluded"]
    frame = frame.loc[frame["metric"].isin(list(wanted)), columns]
    for (metric, *group), part in frame.groupby(["metric", *by], sort=True, dropna=False, observed=True):
        measured = part.loc[part["excluded"] == "", "value"].tolist()
        rows += [(*group, score.name, score.of(measured), len(measured)) for score in wanted[metric]]
    return pd.DataFrame(rows, columns=[*by, "score", "value", "count"])


def summary_table(frame: pd.DataFrame, scores: Sequence[Score], by: Sequence[str]) -> pd.DataFrame:
    """Scores of one metric, in columns: a line for each group.

    Args:
        frame: as for `score_table`.
        scores: of one metric; the first one's value counts the targets.
        by: columns whose combinations make a group.

    Returns:
        The columns `by`, `targets` (measured ones), each score by its name, and `excluded_REASON` for each reason that
        some target has.
    """
    by = list(by)
    summed = score_table(frame, scores, by)
    targets = summed[summed["score"] == scores[0].name].set_index(by)["count"].rename("targets")
    values = summed.pivot(index=by, columns="score", values="value").reindex(columns=[score.name for score in scores])
    reasons = exclusions(frame[(frame["metric"] == scores[0].value) & (frame["excluded"] != "")], by)
    excluded = reasons.pivot(index=by, columns="excluded", values="count").reindex(targets.index).fillna(0)
    found = [targets, values.reindex(targets.index), excluded.astype("int64").add_prefix("excluded_")]
    return pd.concat(found, axis="columns").reset_index()


def phrase_table(table: ResultTable, values: Sequence[str]) -> pd.DataFrame:
    """Phrases and what was measured of them: a line for each method, seed and phrase, in the order of the long table.

    Args:
        table: the long table.
        values: the metrics of the long table that make a column each, such as gamma and rho.

    Returns:
        The columns `method`, `seed`, `key`, `caption`, `phrase`, `label` and `values`, NaN where one was not measured;
        phrases of which none was measured are left out.
    """
    about = ["method", "seed", "key", "caption", "phrase", "label"]
    frame = table.frame
    frame = frame[frame["metric"].isin(list(values)) & (frame["excluded"] == "")]
    if frame.empty:
        return pd.DataFrame(columns=[*about, *values])
    lines = frame.groupby(["method", "seed", "target"], sort=False)[about].first()
    measured = frame.pivot(index=["method", "seed", "target"], columns="metric", values="value")
    return lines.join(measured.reindex(columns=list(values))).reset_index(drop=True)


def exclusions(frame: pd.DataFrame, by: Sequence[str] = ("method", "metric")) -> pd.DataFrame:
    """Count values that were measured, and those that were not by reason: columns `by`, `excluded` and `count`.

    `excluded` is empty for the values that were measured.
    """
    return frame.groupby([*by, "excluded"], sort=True, dropna=False).size().rename("count").reset_index()


def write_result(folder: Path, record: ResultRecord, table: ResultTable) -> None:
    """Write a result folder; `result.json` comes last, so that where it is, all else is."""
    write_csv(folder / TARGETS_NAME, table.targets)
    write_csv(folder / VALUES_NAME, table.values)
    write_record(folder, msgspec.structs.replace(record, rows=len(table.values)))


def read_result(folder: Path) -> tuple[ResultRecord, ResultTable]:
    """Read a result folder.

    Raises:
        ResultError: a file is missing, broken or of another version.
    """
    record = read_record(folder)
    values, targets = (read_csv(folder / name) for name in (VALUES_NAME, TARGETS_NAME))
    for frame, columns, name in ((values, VALUE_COLUMNS, VALUES_NAME), (targets, TARGET_COLUMNS, TARGETS_NAME)):
        missing = [column for column in columns if column not in frame.columns]
        if missing:
            raise ResultError(f"{folder / name}: the columns {', '.join(missing)} are missing; run it again")
    if record.rows not in (None, len(values)):
        raise ResultError(f"{folder / VALUES_NAME}: {len(values)} rows, expected {record.rows}; run it again")
    try:
        table = ResultTable(values.assign(value=pd.to_numeric(values["value"]).astype("float64")), targets)
        frame = table.frame
    except ValueError as error:
        raise ResultError(f"{folder}: {VALUES_NAME} and {TARGETS_NAME} do not fit ({error}); run it again") from error
    twice = values.duplicated(["method", "seed", "target", "metric"])
    if twice.any():
        row = values[twice].iloc[0]
        where = f"{row['metric']} of {row['method']}, target {row['target']}"
        raise ResultError(f"{folder / VALUES_NAME}: {where} is there twice; run it again")
    orphan = ~frame["target"].isin(targets["target"])
    if orphan.any():
        raise ResultError(f"{folder}: {TARGETS_NAME} lacks {frame.loc[orphan, 'target'].iloc[0]!r}; run it again")
    measured = frame[frame["excluded"] == ""]
    if record.kind != "roar":  # a retraining may diverge
        _check_values(folder, measured, np.isfinite(measured["value"]), "a finite number")
    for score in record.scores.values():
        if score.bounds is not None:
            found = measured[measured["metric"] == score.value]
            _check_values(folder, found, found["value"].between(*score.bounds), f"a number in {list(score.bounds)}")
    return record, table


def _check_values(folder: Path, rows: pd.DataFrame, right: pd.Series, expected: str) -> None:
    if not right.all():
        row = rows[~right].iloc[0]
        where = f"{row['metric']} of {row['method']}, target {row['target']}"
        raise ResultError(f"{folder / VALUES_NAME}, {where}: expected {expected}, got {row['value']}; run it again")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame as CSV (UTF-8): floats with all their digits, NaN and None as empty fields."""
    with (
        replaced_at_once(path) as part,
        # JSON allows lone surrogates, which are no UTF-8, in captions: spell them out rather than lose the table.
        part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        frame.to_csv(file, index=False, lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table that `write_csv` wrote; text columns keep words such as "nan" and "NA" as they are.

    Raises:
        ResultError: the file is missing or no such table.
    """
    try:
        header = pd.read_csv(path, nrows=0, encoding="utf-8").columns
        text = {column: str for column in header if column in _TEXT}
        numbers = {column: [""] for column in header if column not in text}
        return pd.read_csv(
            path,
            encoding="utf-8",
            dtype=text,
            keep_default_na=False,
            na_values=numbers,
            **_EXACT,
        )
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise ResultError(f"{path}: not a table of results ({error}); run it again") from error
