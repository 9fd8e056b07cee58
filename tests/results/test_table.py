"""The long table: the same bits in any order, text as it was, and sums as plain Python has them."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest

from lightning_xai.metrics.grounding import SPEC
from lightning_xai.results.record import ResultError, ResultRecord, Score, read_record, write_record
from lightning_xai.results.table import ResultTable, exclusions, read_result, score_table, summary_table, write_result

RECORD = ResultRecord(kind="evaluation", methods={})
WORDS = ["nan", "NA", "None", "", "1.0", 'a „dog“, "and"\na\tcat', "null"]


def target(index: int, ordinal: int = 0, label: str = "dog", **more: Any) -> dict[str, Any]:
    common = {"target": f"phrase-{index}-{ordinal}", "kind": "phrase", "index": index, "ordinal": ordinal}
    return common | {"key": f"k{index}", "caption_index": 0, "caption": "a dog", "label": label} | more


def rows_of(count: int, seed: int = 0) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    draw = random.Random(seed)
    targets = [target(index, ordinal, draw.choice(["dog", "cat"])) for index in range(count) for ordinal in range(2)]
    values = []
    for method in ("b", "a"):
        for each in targets:
            excluded = draw.choice(["", "", "no_positive"])
            for metric in ("rho", "gamma"):
                number = math.nan if excluded else draw.random()
                values.append((method, 0, each["target"], metric, number, excluded))
    return values, targets


def test_the_files_are_the_same_in_any_order_of_the_rows_and_read_to_the_last_bit(tmp_path: Path) -> None:
    values, targets = rows_of(12)
    for name in ("first", "second"):
        write_result(tmp_path / name, RECORD, ResultTable.of(values, [*targets, targets[3]]))
        random.Random(1).shuffle(values)
        random.Random(2).shuffle(targets)
    for file in ("values.csv", "targets.csv", "result.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    record, table = read_result(tmp_path / "first")
    assert record == msgspec.structs.replace(RECORD, rows=len(values))
    assert table.values.equals(ResultTable.of(values, targets).values)
    assert table.targets.equals(ResultTable.of(values, targets).targets)
    assert list(dict.fromkeys(table.values["target"]))[:4] == ["phrase-0-0", "phrase-0-1", "phrase-1-0", "phrase-1-1"]


def test_text_stays_text_and_unknown_columns_are_kept(tmp_path: Path) -> None:
    targets = [target(index, caption=word, phrase=word, mine=index / 3) for index, word in enumerate(WORDS)]
    table = ResultTable.of([("m", 0, "phrase-0-0", "gamma", 0.1 + 0.2, "")], targets)
    write_result(tmp_path, RECORD, table)
    _, found = read_result(tmp_path)
    assert found.targets["caption"].tolist() == found.targets["phrase"].tolist() == WORDS
    assert found.targets["mine"].tolist() == [index / 3 for index in range(len(WORDS))]
    assert found.values["value"].tolist() == [0.1 + 0.2]


def test_an_empty_table_can_be_written_read_and_summed_up(tmp_path: Path) -> None:
    write_result(tmp_path, RECORD, ResultTable.of([], []))
    _, table = read_result(tmp_path)
    assert len(table.values) == len(table.targets) == 0
    assert len(score_table(table.values, SPEC.scores)) == 0
    assert list(summary_table(table.frame, SPEC.scores, ["label"]).columns)[:2] == ["label", "targets"]


def test_scores_and_exclusions_agree_with_plain_python() -> None:
    values, targets = rows_of(40)
    table = ResultTable.of(values, targets)
    labels = {each["target"]: each["label"] for each in targets}
    summed = score_table(table.frame, SPEC.scores, ["method", "label"]).set_index(["method", "label", "score"])
    lines = summary_table(table.frame, SPEC.scores, ["method", "label"]).set_index(["method", "label"])
    for method in ("a", "b"):
        for label in ("cat", "dog"):
            own = [row for row in values if row[0] == method and labels[row[2]] == label and row[3] == "gamma"]
            numbers = [row[4] for row in own if not row[5]]
            expected = {
                "gamma_mean": statistics.fmean(numbers),
                "gamma_std": statistics.stdev(numbers),
                "gamma_above_50": sum(number > 0.5 for number in numbers) / len(numbers),
            }
            for name, number in expected.items():
                assert summed.loc[(method, label, name), "value"] == pytest.approx(number, abs=1e-12)
                assert lines.loc[(method, label), name] == summed.loc[(method, label, name), "value"]
            assert lines.loc[(method, label), "targets"] == len(numbers)
            assert lines.loc[(method, label), "excluded_no_positive"] == len(own) - len(numbers)
    counts = exclusions(table.values)
    assert counts["count"].sum() == len(values)


def test_the_order_of_rows_does_not_change_a_bit_of_a_score() -> None:
    values, targets = rows_of(200)
    values = [(*row[:4], row[4] * 10.0 ** random.Random(i).randrange(-12, 12), row[5]) for i, row in enumerate(values)]
    frames = []
    for seed in range(4):
        random.Random(seed).shuffle(values)
        frame = pd.DataFrame(values, columns=["method", "seed", "target", "metric", "value", "excluded"])
        frames.append(score_table(frame, SPEC.scores))
    assert all(frame.equals(frames[0]) for frame in frames)
    assert targets


def test_nothing_measured_is_nan_and_thresholds_are_strict() -> None:
    frame = pd.DataFrame(
        [("m", 0, "t", "gamma", math.nan, "no_positive"), ("n", 0, "t", "gamma", 0.5, "")],
        columns=["method", "seed", "target", "metric", "value", "excluded"],
    )
    above = Score(name="above", value="gamma", reduce="share_above", threshold=0.5, heading="")
    summed = score_table(frame, [above])
    assert summed["count"].tolist() == [0, 1]
    assert math.isnan(summed["value"][0])
    assert summed["value"][1] == 0


def test_a_table_that_was_cut_off_or_holds_an_impossible_value_is_refused(tmp_path: Path) -> None:
    record = msgspec.structs.replace(RECORD, metrics={SPEC.name: SPEC.record({})})
    write_result(tmp_path, record, ResultTable.of(*rows_of(2)))
    path = tmp_path / "values.csv"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(ResultError, match=r"values\.csv: 15 rows, expected 16"):
        read_result(tmp_path)
    lines = whole.splitlines()
    number = next(i for i, line in enumerate(lines) if ",gamma," in line)
    fields = lines[number].split(",")
    lines[number] = ",".join([*fields[:4], "7.5", ""])
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultError, match=r"gamma of a, target .*: expected a number in \[0\.?0?, 1\.?0?\], got 7\.5"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff", "codec"),
        (b'{"version": 2, "kind": "roar", "methods": {"../outside": {"name": "a"}}}', "a label has"),
        (b'{"version": 2, "kind": "roar", "methods": 3}', "Expected `object`"),
        (b'{"version": 1}', "version 1 of the result format, this release reads 2; run the same command again"),
    ],
    ids=["nested", "no text", "label that leaves the folder", "type", "version 1"],
)
def test_a_record_that_cannot_be_used_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ResultError, match=rf"result\.json: .*{message}"):
        read_record(tmp_path)


def test_a_folder_whose_name_is_no_utf_8_can_be_recorded(tmp_path: Path) -> None:
    record = msgspec.structs.replace(RECORD, data={"folder": "/data/\udcff"}, logged={"loss": math.nan})
    write_record(tmp_path, record)
    found = read_record(tmp_path)
    assert found.data == record.data
    assert found.logged == {"loss": None}
