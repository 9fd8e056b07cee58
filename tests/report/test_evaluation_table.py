"""An evaluation on the terminal."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from lightning_xai.report.evaluation_table import GROUPS, estimate_text, evaluation_table
from lightning_xai.results.schema import EvaluationResult, MethodResult


def result_of(**metrics: dict[str, tuple[float, ...]]) -> EvaluationResult:
    methods = {
        label: MethodResult(label, {}, True, tuple(range(len(next(iter(values.values()), ())))), values, {})
        for label, values in metrics.items()
    }
    return EvaluationResult({}, {}, {}, {}, methods)


def cells(result: EvaluationResult) -> list[dict[str, list[str]]]:
    """Heading -> cells, table by table."""
    return [
        {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
        for table in evaluation_table(result)
    ]


def test_every_method_has_a_line_and_every_measured_metric_a_column() -> None:
    result = result_of(
        feature_pair={"gamma_mean": (0.25,), "rho": (0.5,), "delta_mean": (-0.0125,)},
        m2ib={"rho": (0.5, 0.52), "gamma_mean": (0.25, 0.75)},
    )
    grounding, negatives = cells(result)
    assert grounding == {
        "method": ["feature_pair", "m2ib"],
        "γ mean ↑": ["0.250", "0.500 ± 0.250"],
        "ρ\n[%] ↑": ["50.0", "51.0 ± 1.0"],
    }
    assert list(negatives) == ["method", "δ mean ↓"]
    assert negatives["δ mean ↓"][1] == "–"
    assert [table.title for table in evaluation_table(result)] == list(GROUPS)[:2]


def test_a_group_of_which_nothing_was_measured_has_no_table() -> None:
    assert evaluation_table(result_of()) == []
    assert evaluation_table(result_of(m2ib={})) == []
    (only,) = evaluation_table(result_of(m2ib={"localization_iou": (0.25,)}))
    assert only.title == "Confidence and localization"


def test_every_metric_of_an_evaluation_stands_in_one_group() -> None:
    documented = MethodResult.__doc__ or ""
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names)) == 13
    for name in names:
        assert f"`{name}`" in documented


@pytest.mark.parametrize(
    ("values", "percent", "text"),
    [
        ((), True, "–"),
        ((math.nan,), True, "–"),
        ((0.5, math.nan), False, "–"),
        ((0.12345,), True, "12.3"),
        ((0.12345,), False, "0.123"),
        ((0.1, 0.2, 0.3), True, "20.0 ± 5.8"),
        ((0.1, 0.2, 0.3), False, "0.200 ± 0.058"),
        ((0.5, 0.5), True, "50.0 ± 0.0"),
    ],
)
def test_numbers_are_means_with_their_standard_error(values: tuple[float, ...], percent: bool, text: str) -> None:
    method = MethodResult("m2ib", {}, False, (), {"rho": values}, {})
    assert estimate_text(method, "rho", percent) == text


def test_tables_print_as_they_are_not_as_markup() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    for table in evaluation_table(result_of(m2ib={"image_drop": (0.01,), "rho": (0.5,)})):
        console.print(table)
    text = console.export_text()
    assert "[%] ↓" in text
    assert "1.0" in text
