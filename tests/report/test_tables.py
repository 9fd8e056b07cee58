from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from lightning_xai.report.tables import grounding_table

ROW: dict[str, object] = {
    "epoch": 0,
    "gamma_mean": 0.25,
    "gamma_above_50": 0.0412,
    "gamma_above_80": 0.0,
    "rho": 0.231,
    "targets": 512,
}


def shown(rows: list[dict[str, object]]) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(grounding_table(rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").strip("│ \n").split("│")]


def test_the_table_prints_shares_in_percent_and_the_mean_as_it_is() -> None:
    lines = shown([ROW, ROW | {"epoch": 1, "rho": 1.0}]).splitlines()
    assert cells(lines[2]) == ["epoch", "γ mean", "γ > 0.5 [%]", "γ > 0.8 [%]", "ρ [%]", "targets"]
    assert cells(lines[4]) == ["before", "0.250", "4.1", "0.0", "23.1", "512"]
    assert cells(lines[5]) == ["epoch 1", "0.250", "4.1", "0.0", "100.0", "512"]


def test_an_epoch_without_any_pair_shows_dashes_instead_of_nan() -> None:
    empty = dict.fromkeys(("gamma_mean", "gamma_above_50", "gamma_above_80", "rho"), math.nan)
    line = shown([ROW | empty | {"targets": 0}]).splitlines()[4]
    assert cells(line) == ["before", "–", "–", "–", "–", "0"]


def test_names_in_brackets_are_not_taken_for_markup() -> None:
    assert "[red]run[/red]" in shown([ROW | {"epoch": "[red]run[/red]", "[bold]": 1}])
    assert "[bold]" in shown([ROW | {"[bold]": 1}])


def test_a_row_without_epoch_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match="row 1 has no 'epoch'"):
        grounding_table([ROW, {"rho": 0.5}])
