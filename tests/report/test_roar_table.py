"""ROAR+ as tables."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_xai.report.roar import grid_tables, roar_table
from lightning_xai.results.schema import RoarMethod, RoarResult


def result_of(methods: dict[str, RoarMethod], **more: Any) -> RoarResult:
    original = {0: 2.0, 1: 4.0}
    return RoarResult({}, {}, {}, {}, original, methods, base_loss=2.5, **more)


METHODS = {
    "m2ib": RoarMethod("m2ib", {}, {"image": {0: 3.0, 1: 4.0}, "text": {0: 2.2}}),
    "integrated": RoarMethod("integrated_gradients", {}, {"image": {0: 2.0, 1: 5.0}, "text": {1: 5.0}}),
    "none yet": RoarMethod("rise", {}, {}),
}


def cells(table: Table) -> list[list[str]]:
    return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]


def bold(table: Table) -> list[str]:
    """What stands in bold, column by column."""
    return [
        str(cell)
        for column in table.columns
        for cell in column.cells
        if isinstance(cell, Text) and cell.style == "bold"
    ]


def test_scores_are_percent_with_the_standard_error_over_seeds_and_the_best_is_bold() -> None:
    table = roar_table(result_of(METHODS, missing=("none yet/image/0",)))
    # image: m2ib 50 % and 0 %, integrated 0 % and 25 %; s / sqrt(2) of two numbers is half of their distance
    assert cells(table) == [
        ["m2ib", "25.00 ± 25.00", "10.00 ± -"],
        ["integrated", "12.50 ± 12.50", "25.00 ± -"],
        ["none yet", "-", "-"],
    ]
    assert bold(table) == ["25.00 ± 25.00", "25.00 ± -"]
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "higher is better" in shown
    assert "base model 2.5000, retrained on original data 3.0000, 1 cells are missing" in shown


def test_controls_and_a_method_alone_are_not_called_the_best() -> None:
    controls = {
        "random": RoarMethod("random", {}, {"image": {0: 8.0}, "text": {0: 8.0}}),
        "noise": RoarMethod("gaussian", {}, {"image": {0: 9.0}}),
    }
    table = roar_table(result_of(METHODS | controls))
    assert cells(table)[3:] == [["random", "300.00 ± -", "300.00 ± -"], ["noise", "350.00 ± -", "-"]]
    assert bold(table) == ["25.00 ± 25.00", "25.00 ± -"]
    assert bold(roar_table(result_of({"m2ib": METHODS["m2ib"]} | controls))) == []


def test_a_modality_that_nobody_measured_has_no_column() -> None:
    only_image = {"m2ib": RoarMethod("m2ib", {}, {"image": {0: 3.0}})}
    assert [column.header for column in roar_table(result_of(only_image)).columns] == ["method", "image"]


def test_without_an_original_loss_there_is_no_score() -> None:
    result = RoarResult({}, {}, {}, {}, {}, METHODS, base_loss=math.nan)
    assert cells(roar_table(result))[0] == ["m2ib", "-", "-"]
    assert bold(roar_table(result)) == []


def test_a_grid_has_its_last_option_to_the_right_the_others_down_and_gaps_where_points_are_missing() -> None:
    scores = {(7, 1): 2.2, (7, 0.1): 2.4, (8, 1): 3.0}
    methods = {
        f"m2ib,layer={layer},beta={beta}": RoarMethod("m2ib", {"layer": layer, "beta": beta}, {"image": {0: loss}})
        for (layer, beta), loss in scores.items()
    }
    methods["random"] = RoarMethod("random", {"seed": 0}, {"image": {0: 9.0}})  # no point of the grid
    (table,) = grid_tables(result_of(methods, grid={"layer": (7, 8), "beta": (1, 0.1)}))
    assert [column.header for column in table.columns] == ["layer", "beta=1", "beta=0.1"]
    assert cells(table) == [["7", "10.00", "20.00"], ["8", "50.00", "-"]]
    assert bold(table) == ["50.00"]


def test_the_points_of_a_grid_are_found_by_value_whatever_their_options_look_like() -> None:
    scores = {(1.0, (7, 8)): 2.2, (0.1, (7, 8)): 3.0}
    methods = {
        f"m2ib,beta={beta}": RoarMethod("m2ib", {"beta": beta, "layers": layers}, {"image": {0: loss}})
        for (beta, layers), loss in scores.items()
    }
    methods["random"] = RoarMethod("random", {"beta": 0.1, "layers": [7, 8]}, {"image": {0: 9.0}})
    (table,) = grid_tables(result_of(methods, grid={"layers": ([7, 8],), "beta": (1, 0.1)}))
    assert cells(table) == [["[7, 8]", "10.00", "50.00"]]
    assert bold(table) == ["50.00"]


def test_without_a_grid_there_is_no_table_of_it() -> None:
    assert grid_tables(result_of(METHODS)) == []
