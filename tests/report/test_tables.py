from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lightning_xai.report.tables import PAIR_COLUMNS, grounding_table, per_pair_csv, read_csv, replaced_at_once

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


def test_every_float_comes_back_exactly(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float(np.nextafter(1, 2)), np.float64(0.1), np.float32(0.1)]
    path = tmp_path / "deep" / "er" / "pairs.csv"
    assert per_pair_csv(path, ({"gamma": value} for value in values)) == len(values)
    assert [float(row["gamma"]) for row in read_csv(path)] == [float(value) for value in values]


def test_captions_with_commas_quotes_line_breaks_and_other_alphabets_survive(tmp_path: Path) -> None:
    captions = ['a "big", red ring', "two\nlines", "two\r\nlines", "", "ein Löwe, 一只狗 🦊", "=1+1"]
    per_pair_csv(tmp_path / "pairs.csv", [{"caption": caption, "key": "k"} for caption in captions])
    assert [row["caption"] for row in read_csv(tmp_path / "pairs.csv")] == captions


def test_a_lone_surrogate_in_a_caption_does_not_lose_the_table(tmp_path: Path) -> None:
    per_pair_csv(tmp_path / "pairs.csv", [{"caption": "a \ud800 b"}])
    assert read_csv(tmp_path / "pairs.csv")[0]["caption"] == "a \\ud800 b"


def test_the_header_stays_in_order_whatever_the_rows_hold(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    per_pair_csv(path, [])
    assert path.read_text().splitlines() == [",".join(PAIR_COLUMNS)]
    per_pair_csv(path, [{"hit": True, "index": 3, "gamma": math.nan, "reason": None}])
    with path.open(newline="") as file:
        header, row = csv.reader(file)
    assert tuple(header) == PAIR_COLUMNS
    assert dict(zip(header, row, strict=True)) == dict.fromkeys(PAIR_COLUMNS, "") | {
        "hit": "1",
        "index": "3",
        "gamma": "nan",
    }


def test_an_unknown_column_is_refused_and_the_old_table_stays(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    per_pair_csv(path, [{"key": "old"}])
    with pytest.raises(ValueError, match=r"row 2: unknown columns \['gama'\]"):
        per_pair_csv(path, [{"key": "new"}, {"gama": 0.5}])
    assert read_csv(path)[0]["key"] == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.csv"]


def test_a_reader_never_sees_a_part_of_the_new_table(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    per_pair_csv(path, [{"key": "old"}])
    with replaced_at_once(path) as part:
        part.write_text("half a ta")
        assert read_csv(path)[0]["key"] == "old"
        part.write_text("key\nnew\n")
    assert read_csv(path) == [{"key": "new"}]
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a header line"),
        (b"a,b\n1,2\n3\n", "line 3: expected 2 fields"),
        (b"a,b\n1,2,3\n", "line 2: expected 2 fields"),
        (b"a,b\n\xff\xfe,2\n", "not a CSV file in UTF-8"),
        (b'a,b\n"1,2\n', "not a CSV file in UTF-8"),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(path)
    assert str(path) in str(caught.value)
