"""Results on the terminal are the numbers of the long table."""

from __future__ import annotations

import io
import re
from pathlib import Path

from result_folders import SKILLS, made_table, write_evaluation, write_grid, write_roar
from rich.console import Console

from lightning_xai.report.terminal import result_tables, roar_tables
from lightning_xai.results.record import ResultRecord
from lightning_xai.results.table import ResultTable


def printed(record: ResultRecord, table: ResultTable) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    for each in roar_tables(record, table) if record.kind == "roar" else result_tables(record, table):
        console.print(each)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_an_evaluation_has_a_table_for_each_metric_that_was_measured(tmp_path: Path) -> None:
    record = write_evaluation(tmp_path, SKILLS, examples=False, seeds=2)
    text = printed(record, made_table(SKILLS, ["grounding"], seeds=2))
    assert "Visual-linguistic grounding on shapes" in text
    assert "Hard negative" not in text
    assert re.search(r"γ mean ↑ +0\.\d{4} +0\.\d{4} ± 0\.\d{4} +0\.\d{4} *\n", text)


def test_roar_has_its_scores_losses_and_missing_trials(tmp_path: Path) -> None:
    losses = {("m2ib", "image"): (2.5, 3.3), ("rise", "image"): (2.0, 2.2), ("random", "image"): (2.2, 2.2)}
    text = printed(*write_roar(tmp_path, losses, missing=["rise/text/0"]))
    assert re.search(r"m2ib +37\.5 ± 12\.5 +–", text)
    assert "validation loss: base model 1.5000, retrained on original data 2.1000, 1 trials are missing" in text


def test_a_grid_has_its_last_option_to_the_right_and_gaps_where_points_are_missing(tmp_path: Path) -> None:
    text = printed(*write_grid(tmp_path))
    assert re.search(r"β = 0.1 +β = 1 *\n +ℓ", text)
    assert re.search(r"3 +0\.00 +12\.50", text)
    assert re.search(r"9 +25\.00 +–", text)
