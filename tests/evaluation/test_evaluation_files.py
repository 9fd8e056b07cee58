"""The files of an evaluation: as reports read them, the same in any order of the rows, and the result last."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_xai.evaluation.evaluation_files import Shown, write_evaluation
from lightning_xai.evaluation.example_gallery import Candidate
from PIL import Image

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import GroundingMetric, GroundingSummary
from lightning_xai.report.tables import read_csv
from lightning_xai.results.schema import TABLES, EvaluationResult, MethodResult, load_result, read_examples

RESULT = EvaluationResult({}, {}, {}, {}, {"m2ib": MethodResult("m2ib", {}, False, (0, 1), {"rho": (0.5, 0.25)}, {})})


def grounding_rows() -> list[dict[str, Any]]:
    return [
        {"seed": seed, "index": index, "key": f"k{index}", "caption_index": caption, "caption": "a dog, a „cat“\n"}
        | {"phrase": label, "label": label, "reason": "measured", "gamma": 0.1 + 0.2, "hit": index % 2 == 0}
        | {"x0": 0.0, "y0": 1.0, "x1": 2.0, "y1": 3.0}
        for seed in (0, 1)
        for index in (2, 10)
        for caption in (-1, 0, 1)
        for label in ("cat", "dog")
    ]


def swap_rows() -> list[dict[str, Any]]:
    where = {"seed": 0, "index": 0, "key": "k", "caption_index": 0, "caption": "c", "phrase": "p", "label": "cat"}
    numbers = {"positive": 0.5, "negative": 0.25, "delta": -0.25, "negative_caption": "n"}
    return [where | numbers | {"replacement": words} for words in ("ant", "bee", "cow")]


def summary() -> GroundingSummary:
    metric = GroundingMetric(["dog", "cat"])
    labels, reasons = torch.tensor([0, 0, 1]), torch.tensor([0, 0, int(Exclusion.OUTSIDE_CROP)])
    metric.update(torch.tensor([0.25, 0.75, 0.0]), torch.tensor([True, False, False]), labels, reasons)
    return metric.compute()


def shown(key: str = "k1", value: int = 90, gamma: float = 0.5, size: tuple[int, int] = (6, 8)) -> Shown:
    record = {"key": key, "caption": "a dog", "phrase": "dog", "spans": ((2, 5),), "hit": True}
    record |= {"box": (0.0, 1.0, 2.0, 3.0), "heat": [[0.5, -1.0], [0.0, 2.0]]}
    pixels = np.full((*size, 3), value, dtype=np.uint8)
    return Shown(("fixed", "class"), Candidate(3, 0, "dog", gamma, record), pixels)


def test_tables_are_the_same_in_any_order_of_the_rows(tmp_path: Path) -> None:
    rows = {"grounding": grounding_rows(), "hard_negatives": swap_rows()}
    write_evaluation(tmp_path / "a", RESULT, {"m2ib": rows}, {}, {})
    mixed = {table: random.Random(1).sample(lines, len(lines)) for table, lines in rows.items()}
    write_evaluation(tmp_path / "b", RESULT, {"m2ib": mixed}, {}, {})
    for table, lines in rows.items():
        first, second = ((tmp_path / out / "m2ib" / f"{table}.csv").read_bytes() for out in "ab")
        assert first == second
        found = read_csv(tmp_path / "a" / "m2ib" / f"{table}.csv")
        assert list(found[0]) == list(TABLES[table])
        assert len(found) == len(lines)
    found = read_csv(tmp_path / "a" / "m2ib" / "grounding.csv")
    order = [(int(row["seed"]), int(row["index"]), int(row["caption_index"]), row["label"]) for row in found]
    assert order == sorted(order)
    assert order[0][1] < order[-1][1]
    assert {float(row["gamma"]) for row in found} == {0.1 + 0.2}
    assert {row["caption"] for row in found} == {"a dog, a „cat“\n"}


def test_a_table_without_rows_still_has_its_columns(tmp_path: Path) -> None:
    write_evaluation(tmp_path, RESULT, {"m2ib": {"localization": []}}, {}, {})
    assert (tmp_path / "m2ib" / "localization.csv").read_text() == ",".join(TABLES["localization"]) + "\n"
    assert read_examples(tmp_path / "m2ib") == []
    assert load_result(tmp_path) == RESULT


def test_classes_have_a_line_each_with_what_was_left_out(tmp_path: Path) -> None:
    write_evaluation(tmp_path, RESULT, {"m2ib": {}, "other": {}}, {"m2ib": summary()}, {})
    dog, cat = read_csv(tmp_path / "m2ib" / "classes.csv")
    assert (dog["label"], dog["pairs"], dog["gamma_mean"], dog["rho"]) == ("dog", "2", "0.5", "0.5")
    assert (cat["label"], cat["pairs"], cat["gamma_mean"]) == ("cat", "0", "nan")
    assert (dog["left_out_outside_crop"], cat["left_out_outside_crop"]) == ("0", "1")
    assert not (tmp_path / "other" / "classes.csv").exists()


def test_examples_are_what_was_shown_and_share_their_pictures(tmp_path: Path) -> None:
    examples = {"m2ib": [shown(), shown("k2", 200, math.nan)], "other": [shown()]}
    write_evaluation(tmp_path, RESULT, {"m2ib": {}, "other": {}}, {}, examples)
    first, second = read_examples(tmp_path / "m2ib")
    (shared,) = read_examples(tmp_path / "other")
    assert (first.why, first.label, first.gamma, first.key) == (("fixed", "class"), "dog", 0.5, "k1")
    assert first.heat == ((0.5, -1.0), (0.0, 2.0))
    assert (first.box, first.spans, first.hit) == ((0.0, 1.0, 2.0, 3.0), ((2, 5),), True)
    assert math.isnan(second.gamma)
    assert shared == first
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == ["k1.jpg", "k2.jpg"]
    for record, value in ((first, 90), (second, 200)):
        with Image.open(tmp_path / record.image) as picture:
            assert picture.size == (8, 6)
            assert np.abs(np.asarray(picture).astype(int) - value).max() <= 2


def test_pictures_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    write_evaluation(tmp_path, RESULT, {"m2ib": {}}, {}, {"m2ib": [shown()]})
    write_evaluation(tmp_path, RESULT, {"m2ib": {}}, {}, {"m2ib": [shown(size=(4, 4))]})
    with Image.open(tmp_path / "examples" / "k1.jpg") as picture:
        assert picture.size == (4, 4)


def test_a_picture_stays_in_its_folder_whatever_the_key(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "out", RESULT, {"m2ib": {}}, {}, {"m2ib": [shown("../../x/é")]})
    (record,) = read_examples(tmp_path / "out" / "m2ib")
    assert (tmp_path / "out" / record.image).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_result_comes_last_so_that_where_it_lies_all_else_does(tmp_path: Path) -> None:
    rows = [*swap_rows(), {**swap_rows()[0], "heat": [[1.0]]}]
    with pytest.raises(ValueError, match="unknown columns"):
        write_evaluation(tmp_path, RESULT, {"m2ib": {"hard_negatives": rows}}, {}, {})
    assert not (tmp_path / "result.json").exists()
    broken = Shown((), shown().candidate, np.zeros((0, 0, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"."):
        write_evaluation(tmp_path, RESULT, {"m2ib": {}}, {}, {"m2ib": [broken]})
    assert not (tmp_path / "result.json").exists()
