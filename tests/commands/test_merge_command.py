"""`merge`: weights between two models, what is measured of them, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_xai import cli
from lightning_xai.commands import merge
from lightning_xai.data.shape_classes import prepare_shape_classes
from lightning_xai.evaluation.zero_shot import ZeroShot
from lightning_xai.metrics.grounding import SPEC
from lightning_xai.models import load_dual_encoder
from lightning_xai.models.interpolation import interpolated
from lightning_xai.models.weights_file import save_checkpoint
from lightning_xai.report.merging import merge_figure
from lightning_xai.report.paper_table import LOGGED_COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")


@pytest.fixture(scope="module")
def pair(architecture_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one architecture."""
    folder, paths = tmp_path_factory.mktemp("pair"), []
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        encoder = load_dual_encoder(architecture_file("vit"))
        with torch.no_grad():
            encoder.logit_scale.add_(seed)
        save_checkpoint(encoder, folder / f"{name}.ckpt")
        paths.append(folder / f"{name}.ckpt")
    return paths[0], paths[1]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_dual_encoder(path).model.state_dict()
    return state


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refusal(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge", *map(str, arguments)])
    return str(ended.value)


def test_weights_are_those_between_and_at_the_ends_the_models_bit_for_bit(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    cli.main(["merge", *map(str, pair), "--alpha", "1", "0", "0.25", "--out", str(tmp_path)])
    base, tuned = map(state_of, pair)
    for name, value in state_of(tmp_path / "alpha=0.25.ckpt").items():
        torch.testing.assert_close(value, 0.75 * base[name] + 0.25 * tuned[name], rtol=1e-6, atol=1e-7)
    for alpha, expected in (("0", base), ("1", tuned)):
        found = state_of(tmp_path / f"alpha={alpha}.ckpt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "merge.csv").exists()  # nothing was measured


def test_shared_tensors_masks_and_whole_numbers_stay_as_they_are() -> None:
    mask, third = torch.tensor([0.0, -torch.inf]), torch.tensor([1 / 3])
    base = {"mask": mask, "same": third, "count": torch.tensor(3), "half": torch.zeros(2, dtype=torch.bfloat16)}
    tuned = {**base, "count": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16), "logit_bias": third}
    found = interpolated(base, tuned, 0.3)
    assert torch.equal(found["mask"], mask)
    assert torch.equal(found["same"], third)
    assert found["count"] == 7
    assert torch.equal(found["half"], torch.full((2,), 0.3, dtype=torch.bfloat16))
    assert torch.equal(found["logit_bias"], third)


def test_zero_shot_accuracy_along_the_way_is_that_of_the_saved_weights(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "classes"
    prepare_shape_classes(images, 1)
    options = ["--images", images, "--template", "a {}", "--template", "one {}", "--num-workers", 0]
    best = ["--alpha", 0, 0.5, 1, "--save", "best", "--best-by", "zero_shot_accuracy"]
    cli.main(["merge", *map(str, [*pair, "--out", tmp_path / "out", *options, *best])])
    rows = rows_of(tmp_path / "out" / "merge.csv")
    highest = max(rows, key=lambda row: float(row["zero_shot_accuracy"]))
    (saved,) = (tmp_path / "out").glob("*.ckpt")
    assert saved.stem == f"alpha={float(highest['alpha']):g}"
    task = ZeroShot(images, templates=["a {}", "one {}"], num_workers=0)
    assert task.measure(load_dual_encoder(saved)).accuracy == float(highest["zero_shot_accuracy"])
    assert f"Best by zero_shot_accuracy: {saved.stem.replace('=', ' = ')}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["command"]["alpha"] == [0, 0.5, 1]
    assert (tmp_path / "out" / "merge.png").stat().st_size > 10_000


def test_what_was_measured_is_there_when_the_next_alpha_fails_and_a_best_that_has_no_value_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "classes"
    prepare_shape_classes(images, 1)
    found = [{"zero_shot_accuracy": math.nan, "zero_shot_images": 0.0}]
    monkeypatch.setattr(merge, "_measured", lambda *_: found.pop() if found else 1 / 0)
    options = ["--images", images, "--num-workers", 0, "--alpha", 0, 1, "--save", "best"]
    options += ["--best-by", "zero_shot_accuracy"]
    with pytest.raises(ZeroDivisionError):
        cli.main(["merge", *map(str, [*pair, "--out", tmp_path / "out", *options])])
    assert [row["alpha"] for row in rows_of(tmp_path / "out" / "merge.csv")] == ["0.0"]
    monkeypatch.setattr(merge, "_measured", lambda *_: {"zero_shot_accuracy": math.nan})
    message = refusal(*pair, "--out", tmp_path / "out", *options)
    assert "no alpha is the best by zero_shot_accuracy, which could be measured at none of them" in message


def test_no_two_scores_share_a_colour() -> None:
    row = {f"{score.name}{end}": 0.5 for score in SPEC.scores for end in ("", "_input")} | dict.fromkeys(
        LOGGED_COLUMNS, 0.5
    )
    figure = merge_figure([row | {"alpha": 0.0}, row | {"alpha": 1.0}], SPEC.scores, {"_input": "inputs", "": "last"})
    colours: dict[Any, set[str]] = {}
    for line in figure.axes[0].lines:
        colours.setdefault(line.get_color(), set()).add(str(line.get_label()).partition(", ")[0])
    assert len(colours) >= 10
    assert all(len(names) == 1 for names in colours.values())


@pytest.mark.slow
def test_grounding_is_what_a_validation_of_the_saved_weights_gives(
    pair: tuple[Path, Path], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, images, out = shapes / "val", tmp_path / "classes", tmp_path / "out"
    prepare_shape_classes(images, 1)
    options = ["--data", data, "--images", images, "--template", "simple", "--num-workers", 0, "--alpha", 0.5]
    cli.main(["merge", *map(str, [*pair, "--out", out, *options, "--device", "cpu"])])
    (row,) = rows_of(out / "merge.csv")
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"class_path": "lightning_xai.training.ContrastiveFineTuning", "init_args": {
            "model": str(out / "alpha=0.5.ckpt"), "pretrained": None,
        }},
        "data": {"class_path": "lightning_xai.data.ShardDataModule", "init_args": {
            "val": str(data), "batch_size": 64, "num_workers": 0,
        }},
        "trainer": {"accelerator": "cpu", "logger": False, "default_root_dir": "runs", "callbacks": [
            {"class_path": "lightning_xai.training.GroundingCallback"},
            {"class_path": "lightning_xai.training.ZeroShotCallback", "init_args": {
                "folder": str(images), "templates": "simple", "num_workers": 0,
            }},
        ]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["lightning_xai", "validate", "--config", "config.json"])
    cli.main()
    (summary,) = (tmp_path / "runs").rglob("summary-validate.csv")
    (found,) = rows_of(summary)
    for name in ("gamma_mean", "gamma_mean_input", "rho", "zero_shot_accuracy", "text_to_image_recall_at_1"):
        assert float(row[name]) == pytest.approx(float(found[name]), abs=1e-6)


def test_models_that_differ_in_more_than_their_weights_are_refused(
    architecture_file: Callable[[str], Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = load_dual_encoder(architecture_file("vit_layer_scale_quick_gelu"))
    save_checkpoint(other, tmp_path / "other.ckpt")
    message = refusal(pair[0], tmp_path / "other.ckpt", "--out", tmp_path / "out")
    assert "differ in model_cfg.quick_gelu, model_cfg.text_cfg.ls_init_value" in message
    tilted = load_dual_encoder(architecture_file("vit"), image_mean=(0.5, 0.5, 0.5))
    save_checkpoint(tilted, tmp_path / "tilted.ckpt")
    assert "differ in preprocess_cfg.mean" in refusal(pair[0], tmp_path / "tilted.ckpt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0.5", "1.5"], "numbers from 0 to 1, each once; got 0.5 1.5"),
        (["--alpha", "0.5", "0.5"], "each once"),
        (["--save", "best"], "--save best goes with --best-by"),
        (["--save", "best", "--best-by", "rho"], "--best-by rho is not measured here; what is: nothing"),
        (["--save", "none"], "nothing to do"),
        (["--classes", "imagenet"], "are about --images"),
        (["--images", "none"], "there is no such folder"),
        (["--data", "none"], "no such folder"),
    ],
)
def test_options_that_cannot_work_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refusal(*pair, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_one_model_three_models_and_random_weights_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "two models, BASE and TUNED" in refusal(pair[0], "--out", tmp_path)
    assert "two models, BASE and TUNED" in refusal(*pair, pair[0], "--out", tmp_path)
    assert "would have random weights: give --base-pretrained" in refusal("ViT-B-32", pair[1], "--out", tmp_path)
