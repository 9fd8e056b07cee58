"""The tables of docs/scaling.md are those the calculator prints, and its measurements measure."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import scaling
import scaling_measures
from scaling_formulas import DataMeasures, Plan

from lightning_xai.data import Manifest

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def options(text: str = "") -> argparse.Namespace:
    return scaling.parser().parse_args(shlex.split(text))


def page_command() -> str:
    """The options with which the page says that its tables were made."""
    command: str
    (command,) = re.findall(
        r"python benchmarks/scaling\.py ((?:[^\n]|\\\n)*?--write docs/scaling\.md)", PAGE.read_text()
    )
    return command.replace("\\\n", " ")


def test_the_pages_tables_are_what_the_calculator_prints_for_its_inputs() -> None:
    page, tables = PAGE.read_text(encoding="utf-8"), scaling.tables(options(page_command()))
    assert scaling.with_tables(page, tables) == page
    assert scaling.tables(options()) == tables  # they are the defaults


def test_writing_replaces_the_tables_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    text = PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    scaling.main(["--write", str(page), "--batch-size", "64"])
    changed = page.read_text(encoding="utf-8")
    assert changed == scaling.with_tables(text, scaling.tables(options("--batch-size 64")))
    outside = re.compile(r"<!-- table.*?<!-- end -->", re.DOTALL)
    assert changed != text
    assert outside.sub("", changed) == outside.sub("", text)


def test_a_page_that_lacks_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        scaling.with_tables("<!-- table: steps -->\n<!-- end -->\n", {"steps": "", "memory": ""})


def test_options_reach_the_inputs() -> None:
    shape, plan, cluster, data = scaling.read(
        options("--model ViT-L-14 --gpu A100 --fsdp --chunk-size 16 --storage 1e9 --reader-rate 7")
    )
    assert (shape.name, cluster.gpu.name) == ("ViT-L-14", "NVIDIA A100 SXM 80 GB")
    assert plan == Plan(fsdp=True, chunk_size=16)
    assert cluster.storage == 1e9
    assert data == DataMeasures(reader_rate=7)


def test_what_is_measured_can_be_given_back_as_options() -> None:
    data = DataMeasures(1234, 56.5, 178, 2.5e-5, 345)
    assert scaling.read(options(scaling.command(data)))[3] == data


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999.9, "B", "1.00 kB"),
        (2.5e15, "B", "2.50 PB"),
        (3e-7, "s", "0.30 µs"),
        (9000, "s", "2.5 h"),
    ],
)
def test_amounts_are_shortened(value: float, unit: str, text: str) -> None:
    assert scaling.amount(value, unit) == text


def test_a_batch_too_large_for_an_epoch_is_told_and_not_divided_by() -> None:
    shape, plan, cluster, data = scaling.read(options())
    (coco,) = (line for line in scaling.epoch_table(shape, plan, cluster, data).splitlines() if "| COCO " in line)
    assert coco.endswith("| batch_size at most 110 |")


def test_reading_is_measured_on_real_shards(shapes: Path) -> None:
    manifest = Manifest.load(shapes / "train")
    assert 1 < scaling_measures.measure_reader(shapes / "train", manifest, "ViT-B-32", 128) < 1e5


def test_a_manifest_is_measured_by_the_shard(tmp_path: Path) -> None:
    size, seconds, memory = scaling_measures.measure_manifest(tmp_path, 500)
    file = (tmp_path / "manifest.json").stat().st_size
    assert size == file / 500
    assert 1e-7 < seconds < 1e-2
    assert 100 < memory < 5000
