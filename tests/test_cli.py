"""The command line as a user meets it: in a process of its own, on real shards, from preparation to export."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch

from lightning_xai.cli import main
from lightning_xai.commands.prepare import SOURCES
from lightning_xai.data import Manifest
from lightning_xai.models import load_dual_encoder
from lightning_xai.training import ContrastiveFineTuning

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")


class Result(NamedTuple):
    code: int
    out: str
    err: str


def together(folder: Path, *commands: list[str]) -> list[Result]:
    """Run commands side by side, each in a process of its own: much of their time is loading torch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "lightning_xai", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    results = []
    for process in started:
        out, err = process.communicate(timeout=300)
        results.append(Result(process.returncode, out, err))
    return results


def done(result: Result) -> Result:
    assert result.code == 0, result.out[-3000:] + result.err[-3000:]
    return result


def config_in(folder: Path, architecture: Path, train: Path, val: Path) -> Path:
    """A run of two steps."""
    config: dict[str, Any] = {
        "model": {
            "class_path": "ContrastiveFineTuning",
            "init_args": {"model": str(architecture), "pretrained": None, "initial_lr": 1e-4, "final_lr": 1e-3},
        },
        "data": {
            "class_path": "ShardDataModule",
            "init_args": {"train": str(train), "val": str(val), "test": str(val), "batch_size": 16, "num_workers": 0},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 2,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder / "runs"), "name": "run"},
            },
            "callbacks": [
                {"class_path": "GroundingCallback", "init_args": {"examples": 2}},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "best-grounding", "monitor": "val/gamma_mean", "mode": "max"},
                },
            ],
        },
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


# --- in processes of their own ---


def test_the_overview_lists_every_command(tmp_path: Path) -> None:
    asked, bare = (done(result) for result in together(tmp_path, ["--help"], []))
    assert asked.out == bare.out
    commands = ("prepare", "export", "explain", "sanity-check", "roar", "report")
    for command in ("fit", "validate", "test", "predict", *commands):
        assert f"\n  {command} " in asked.out
    assert "fit --config configs/demo.yaml" in asked.out


@pytest.mark.slow
def test_shapes_are_prepared_trained_on_measured_and_exported_and_mistakes_on_the_way_are_told_shortly(
    tmp_path: Path, architecture_file: Callable[[str], Path]
) -> None:
    prepare, shards = ["prepare", "shapes", "--out", "shapes"], tmp_path / "shapes"
    config = config_in(tmp_path, architecture_file("vit"), shards / "train", shards / "val")
    helped, too_early = together(tmp_path, ["fit", "--help"], ["fit", "--config", str(config)])
    assert "--trainer.max_epochs" in done(helped).out
    assert_short(too_early, "train: no such folder; make the shards with `python -m lightning_xai prepare")
    (prepared,) = together(tmp_path, [*prepare, "--train", "40", "--val", "12"])
    assert re.search(r"samples +40\n", done(prepared).out)
    assert Manifest.load(shards / "val").samples == 12

    fitted, again = together(tmp_path, ["fit", "--config", str(config)], [*prepare, "--train", "3", "--val", "2"])
    assert_short(again, "choose another folder, or delete this one")
    run = tmp_path / "runs" / "run" / "version_1"  # version 0 came too early
    assert "Grounding per epoch" in done(fitted).out
    assert "before" in fitted.out
    assert "epoch 1" in fitted.out
    assert f"Look at {run / 'grounding' / 'progress.png'}" in fitted.out
    assert (run / "grounding" / "progress.png").is_file()
    assert (run / "config.yaml").is_file()

    checkpoint, weights = run / "checkpoints" / "best-grounding.ckpt", tmp_path / "exported" / "tiny.safetensors"
    measured, exported = together(
        tmp_path,
        ["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)],
        ["export", str(checkpoint), str(weights)],
    )
    assert "val/gamma_mean" in done(measured).out
    assert "summary-validate.csv" in {path.name for path in tmp_path.rglob("*.csv")}
    check_exported(checkpoint, done(exported).out)


def check_exported(checkpoint: Path, told: str) -> None:
    """The lines that the command prints build the very same function."""
    place: dict[str, Any] = {}
    exec(told[told.index("import open_clip") :], place)
    model, encoder = place["model"].eval(), load_dual_encoder(checkpoint).eval()
    images = torch.randn(2, 3, *encoder.image_transform.size, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenizer.encode(["a red ring", "a blue star"])
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), encoder.encode_image(images))
        torch.testing.assert_close(model.encode_text(tokens), encoder.encode_text(tokens))


@pytest.mark.slow
def test_real_coco_files_are_prepared_trained_on_tested_and_embedded(
    tmp_path: Path, coco_mini: Path, architecture_file: Callable[[str], Path]
) -> None:
    def prepare(split: str) -> list[str]:
        notes = coco_mini / "annotations"
        files = ["--images", str(coco_mini / split), "--captions", str(notes / f"captions_{split}.json")]
        files += ["--instances", str(notes / f"instances_{split}.json")]
        return ["prepare", "coco", *files, "--split", split, "--out", split, "--samples_per_shard", "50"]

    splits = ("train2017", "val2017")
    for split, result in zip(splits, together(tmp_path, *map(prepare, splits)), strict=True):
        manifest = Manifest.load(tmp_path / split)
        assert re.search(rf"samples +{manifest.samples}\n", done(result).out)
        captions = json.loads((coco_mini / "annotations" / f"captions_{split}.json").read_text())["annotations"]
        assert (manifest.samples, manifest.captions) == (len({c["image_id"] for c in captions}), len(captions))
    config = config_in(tmp_path, architecture_file("vit"), tmp_path / "train2017", tmp_path / "val2017")
    (fitted,) = together(tmp_path, ["fit", "--config", str(config)])
    assert "Grounding per epoch" in done(fitted).out
    run = tmp_path / "runs" / "run" / "version_0"
    checkpoint = str(run / "checkpoints" / "best-grounding.ckpt")

    tested, embedded = together(
        tmp_path,
        ["test", "--config", str(config), "--ckpt_path", checkpoint],
        ["predict", "--config", str(config), "--ckpt_path", checkpoint, "--trainer.logger.init_args.name=embedded"],
    )
    assert "test/gamma_mean" in done(tested).out
    path = tmp_path / "runs" / "embedded" / "version_0" / "embeddings" / "rank_0.npz"
    assert f"Embeddings: {path}" in done(embedded).out
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["image"].shape == (Manifest.load(tmp_path / "val2017").samples, 24)
        assert arrays["text"].shape == (len(arrays["captions"]), 24)
        assert len(arrays["captions"]) == Manifest.load(tmp_path / "val2017").captions
        for name in ("image", "text"):
            np.testing.assert_allclose(np.linalg.norm(arrays[name], axis=1), 1, atol=1e-5)


def assert_short(result: Result, message: str) -> None:
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.err.strip().splitlines()[-1].startswith("lightning_xai ")


# --- the same entry point, in this process ---


@pytest.fixture
def config(tmp_path: Path, shapes: Path, architecture_file: Callable[[str], Path]) -> Path:
    return config_in(tmp_path, architecture_file("vit"), shapes / "train", shapes / "val")


def message_of(*args: str) -> str:
    """What a command says as it gives up."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert isinstance(stopped.value.code, str), "a traceback or a usage text, not a message"
    assert len(stopped.value.code) < 600
    return stopped.value.code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init_args.model=ViT-B-61"], "unknown model 'ViT-B-61'; did you mean ViT-B-16"),
        (["--model.init_args.model=missing.json"], "missing.json cannot be read"),
        (["--model.init_args.pretrained=nobody"], "neither a file nor a tag"),
        (["--model.init_args.initial_lr=-1"], "have to be positive; got -1"),
        (["--data.init_args.batch_size=0"], "batch_size has to be at least 1; got 0"),
        (["--data.init_args.batch_size=97"], "lower batch_size to at most 96"),
        (["--trainer.callbacks.init_args.filename=x", "--ckpt_path=gone.ckpt"], "gone.ckpt"),
        (["--trainer.inference_mode=true"], "--trainer.inference_mode=false"),
        (["--trainer.max_epochs=-1"], "give the trainer max_epochs or max_steps"),
    ],
)
def test_a_wrong_setting_is_named_without_a_traceback(config: Path, options: list[str], message: str) -> None:
    assert message in message_of("fit", "--config", str(config), *options)


def test_a_callback_with_a_layer_that_does_not_exist_is_named(config: Path) -> None:
    settings = json.loads(config.read_text())
    settings["trainer"]["callbacks"][0]["init_args"]["image_layer"] = 12
    config.write_text(json.dumps(settings))
    assert "image tower has layers 0 to 2 (or -3 to -1); got layer 12" in message_of("fit", "--config", str(config))


def test_a_checkpoint_of_another_architecture_is_named(
    config: Path, tmp_path: Path, architecture_file: Callable[[str], Path]
) -> None:
    other = ContrastiveFineTuning(str(architecture_file("resnet")), None)
    checkpoint: dict[str, Any] = {"state_dict": other.state_dict(), "pytorch-lightning_version": "2.5.0", "epoch": 0}
    other.on_save_checkpoint(checkpoint)
    torch.save(checkpoint | {"global_step": 0, "callbacks": {}}, tmp_path / "other.ckpt")
    told = message_of("validate", "--config", str(config), "--ckpt_path", str(tmp_path / "other.ckpt"))
    assert "a resnet of another configuration, this run trains a vit" in told


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "gone.ckpt", "out.pt"], "gone.ckpt does not exist"),
        (["export", "weights.pt", "out.pt"], "export takes a .ckpt file that fit has written; got weights.pt"),
        (["export", "broken.ckpt", "out.pt"], "broken.ckpt cannot be read"),
        (["export", "plain.ckpt", "out.pt"], "no checkpoint of this project"),
        (
            ["prepare", "coco", "--images=i", "--captions=c", "--instances=n", "--split=v", "--out=o"],
            "i is not a folder",
        ),
        (["explain", "--model.name=ViT-B-32", "--out=o"], "lightning_xai explain: give an image"),
        (
            ["sanity-check", "--model.name=ViT-B-32", "--image=i", "--out=o", "--limit=0"],
            "lightning_xai sanity-check: --limit has to be at least 1; got 0",
        ),
    ],
)
def test_a_wrong_file_is_named_without_a_traceback(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.ckpt").write_bytes(b"this is no checkpoint")
    torch.save({"weight": torch.zeros(1)}, "plain.ckpt")
    assert message in message_of(*args)


def test_shards_that_are_there_are_not_overwritten(coco_mini: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    notes = coco_mini / "annotations"
    args = ["--images", str(coco_mini / "val2017"), "--captions", str(notes / "captions_val2017.json")]
    args += ["--instances", str(notes / "instances_val2017.json"), "--split", "val", "--out", str(tmp_path)]
    told = message_of("prepare", "coco", *args)
    assert str(tmp_path) in told
    assert "overwrite" in told


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fly"], "invalid choice: 'fly' (choose from"),
        (["fit", "--config", "gone.yaml"], "gone.yaml"),
        (["prepare"], 'expected "subcommand" to be one of {shapes,coco'),
        (["prepare", "shapes"], "required: shapes.out"),
    ],
)
def test_a_mistyped_command_line_gives_usage_and_what_was_expected(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "usage:" in told


@pytest.mark.parametrize("name", ["two-words", "two_words"])
def test_a_data_set_of_two_words_is_found_with_either_sign_between_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []

    def prepare(rows_a_shard: int = 1) -> None:
        called.append(rows_a_shard)

    monkeypatch.setitem(SOURCES, "two-words", prepare)
    main(["prepare", name, "--rows-a-shard=2"])
    assert called == [2]


@pytest.mark.parametrize("error", [KeyError("a slip"), ValueError("of somebody else"), AssertionError("an invariant")])
def test_an_error_that_nobody_foresaw_keeps_its_traceback(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slip(*args: Any) -> None:
        raise error

    monkeypatch.setattr("lightning_xai.data.shapes.prepare_shapes", slip)
    with pytest.raises(type(error)) as kept:
        main(["prepare", "shapes", "--out", str(tmp_path)])
    assert kept.value is error


# --- export ---


@pytest.mark.parametrize(("quick_gelu", "suffix"), [(False, ".pt"), (True, ".safetensors")])
def test_a_model_that_open_clip_knows_is_exported_under_its_name_and_with_its_activation(
    tmp_path: Path, quick_gelu: bool, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ViT-S-32-alt"
    settings = dict(open_clip.get_model_config(name) or {})
    settings["quick_gelu"] = quick_gelu
    encoder_config = tmp_path / f"{name}.json"
    encoder_config.write_text(json.dumps(settings))
    torch.manual_seed(0)
    task = ContrastiveFineTuning(str(encoder_config), None)
    checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "fine-tuned.ckpt")
    main(["export", str(tmp_path / "fine-tuned.ckpt"), str(tmp_path / f"fine-tuned{suffix}")])
    told = capsys.readouterr().out
    assert f"create_model('{name}'" in told
    assert ("force_quick_gelu=True" in told) == quick_gelu
    check_exported(tmp_path / "fine-tuned.ckpt", told)
