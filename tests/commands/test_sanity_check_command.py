"""`sanity-check` through the object that the command line makes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.sanity_check import SanityCheck
from lightning_xai.models import DualEncoder, save_open_clip
from lightning_xai.report.sanity import COLUMNS

STAGES = ["head", "block 2", "block 1", "block 0", "embedding"]


@pytest.fixture
def model(
    make_encoder: Callable[..., DualEncoder], architecture_file: Callable[[str], Path], tmp_path: Path
) -> ModelChoice:
    weights = tmp_path / "weights" / "vit.safetensors"
    save_open_clip(make_encoder(), weights)
    return ModelChoice(str(architecture_file("vit")), str(weights), "cpu")


def picture(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for seed in range(3):
        picture(tmp_path / f"{seed}.png", seed)
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = ["image,caption", "broken.png,a dog", "0.png,a red ring", "1.png,two blue stars", "2.png,a ring and a star"]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "list.csv"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_curves_maps_and_settings_are_written(
    model: ModelChoice, listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    SanityCheck(model, out, listed, method="grad_cam, gaussian", limit=2, batch_size=2)()
    rows = read(out / "sanity.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["stage"], row["method"], row["modality"]) for row in rows] == [
        (stage, method, modality)
        for stage in STAGES
        for method in ("grad_cam", "gaussian")
        for modality in ("image", "text")
    ]
    pictures = [row for row in rows if row["modality"] == "image"]
    assert {row["spearman"] for row in pictures if row["method"] == "gaussian"} == {"1.0"}
    assert all(float(row["spearman"]) < 0.99 for row in pictures if row["method"] == "grad_cam")
    assert {row["pairs"] for row in pictures} == {"2"}
    for name in ("sanity.png", "sanity_maps.png"):
        assert np.asarray(Image.open(out / name)).std() > 0
    record = json.loads((out / "sanity.json").read_text())
    assert record["stages"] == ["original", *STAGES]
    assert [pair["caption"] for pair in record["pairs"]] == ["a red ring", "two blue stars"]
    assert list(record["skipped"]) == ["0000-broken"]
    assert list(record["methods"]) == ["grad_cam", "gaussian"]
    assert record["command"]["limit"] == 2, "pairs that can be used"
    printed = capsys.readouterr().out
    assert "Skipped 0000-broken: " in printed
    assert "gaussian" in printed
    assert "sanity_maps.png" in printed


def test_a_single_image_one_tower_and_options_of_one_method(model: ModelChoice, listed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    image = listed.parent / "0.png"
    SanityCheck(
        model, out, image, caption="a red ring", method="feature_pair", options={"steps": 2}, towers="text", seed=5
    )()
    record = json.loads((out / "sanity.json").read_text())
    assert record["methods"]["feature_pair"]["steps"] == 2
    assert record["command"]["towers"] == "text"
    assert len(read(out / "sanity.csv")) == len(STAGES) * 2


def test_of_several_methods_those_that_cannot_serve_the_model_are_skipped(
    architecture_file: Callable[[str], Path],
    listed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resnet = ModelChoice(str(architecture_file("resnet")), device="cpu")
    SanityCheck(resnet, tmp_path / "out", listed, method="attention_relevance,gaussian", limit=2)()
    assert "Skipped attention_relevance: " in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "sanity.json").read_text())
    assert list(record["methods"]) == ["gaussian"]
    assert "GradCAM" in record["not_served"]["attention_relevance"]


def test_what_cannot_be_done_is_an_error_in_words(model: ModelChoice, listed: Path, tmp_path: Path) -> None:
    useless = tmp_path / "useless.csv"
    useless.write_text("image,caption\nbroken.png,a dog\n")
    cases: dict[str, dict[str, Any]] = {
        "--limit has to be at least 1; got 0": {"limit": 0},
        "unknown method 'lime'": {"method": "gaussian,lime"},
        r"--options.NAME.x 1; got layer": {"method": "gaussian,grad_cam", "options": {"layer": 1}},
        "batch_size has to be at least 1": {"batch_size": 0, "method": "gaussian"},
        "none of the 1 pairs can be used": {"image": useless},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            SanityCheck(**{"model": model, "out": tmp_path / "out", "image": listed, **settings})()
    assert not (tmp_path / "out").exists()
