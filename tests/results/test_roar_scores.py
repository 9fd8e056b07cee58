"""ROAR+ scores are (l_c - l_o) / l_o of each seed that has both losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from result_folders import write_grid, write_roar

from lightning_xai.results.roar import label_at, roar_scores


def test_scores_are_the_formula_of_seeds_with_both_losses(tmp_path: Path) -> None:
    losses = {("rise", "text"): (3.0, 2.2, 9.9), ("m2ib", "image"): (1.0,), ("m2ib", "text"): (float("nan"),)}
    record, table = write_roar(tmp_path, losses, original=(2.0, 2.0))
    found = roar_scores(record, table)
    assert list(found.columns) == ["method", "modality", "seed", "value"]
    assert found[["method", "modality", "seed"]].values.tolist() == [
        ["rise", "text", 0],
        ["rise", "text", 1],
        ["m2ib", "image", 0],
        ["m2ib", "text", 0],
    ]
    assert found["value"].tolist()[:3] == pytest.approx([0.5, 0.1, -0.5])
    assert found["value"].isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize("original", [(), (0.0,)])
def test_without_an_original_loss_there_is_no_score(original: tuple[float, ...], tmp_path: Path) -> None:
    assert not roar_scores(*write_roar(tmp_path, {("rise", "text"): (3.0,)}, original=original))["value"].notna().any()


def test_the_points_of_a_grid_are_found_by_value(tmp_path: Path) -> None:
    record, _ = write_grid(tmp_path)
    assert label_at(record, {"layer": 9, "beta": 1.0}) == "m2ib,layer=9,beta=1"
    assert label_at(record, {"layer": 4}) is None
    assert label_at(record, {"steps": 4}) is None
