"""The command line as a user meets it: in its own process, on real shards, from preparation to export."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch

from lightning_xai import __version__
from lightning_xai.cli import main
from lightning_xai.commands import COMMANDS, summary
from lightning_xai.data import Manifest
from lightning_xai.models import load_dual_encoder
from lightning_xai.registry import Registry
from lightning_xai.results.predictions import read_predictions
from lightning_xai.training import ContrastiveFineTuning

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")


class Result(NamedTuple):
    code: int
    out: str
    err: str


def together(folder: Path, *commands: list[str]) -> list[Result]:
    """Run commands side by side, each in its own process: much of their time is loading torch."""
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


@dataclass
class Join:
    """Join parts.

    An example:
      join a b

    Attributes:
        parts: what to join.
        dry_run: only say what would be joined.
    """

    parts: list[Path]
    dry_run: bool = False

    def __call__(self) -> None:
        sys.stdout.write(f"{self}\n")


# --- in their own processes ---


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lightning_xai {__version__}\n"


def test_the_overview_lists_every_command_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    asked = capsys.readouterr().out
    main([])
    assert capsys.readouterr().out == asked
    for command in ("fit", "validate", "test", "predict", *COMMANDS):
        (line,) = re.findall(rf"\n  {command} +(\w.*)", asked)
        assert line.endswith(summary(command).removesuffix(".") if command in COMMANDS else "")
    assert "fit --config configs/demo.yaml" in asked
    assert max(map(len, asked.splitlines())) <= 120


@pytest.mark.usefixtures("names_are_forgotten")
@pytest.mark.slow
def test_shapes_are_prepared_trained_on_measured_and_exported_and_mistakes_on_the_way_get_short_messages(
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
    assert f"Saved {run / 'grounding' / 'progress.png'}" in fitted.out
    assert (run / "grounding" / "progress.png").is_file()
    assert (run / "config.yaml").is_file()

    checkpoint, weights = run / "checkpoints" / "best-grounding.ckpt", tmp_path / "exported" / "tiny.safetensors"
    measured, exported = together(
        tmp_path,
        ["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)],
        ["export", str(run), str(weights)],
    )
    assert "val/gamma_mean" in done(measured).out
    assert "summary-validate.csv" in {path.name for path in tmp_path.rglob("*.csv")}
    check_exported(checkpoint, done(exported).out)


def check_exported(checkpoint: Path, printed: str) -> None:
    """The lines that the command prints build the very same function."""
    place: dict[str, Any] = {}
    exec(printed[printed.index("import open_clip") :], place)
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
        [
            *("predict", "--config", str(config), "--ckpt_path", checkpoint),
            *("--maps=phrases", "--trainer.logger.init_args.name=embedded"),
        ],
    )
    assert "test/gamma_mean" in done(tested).out
    path = tmp_path / "runs" / "embedded" / "version_0" / "predictions"
    assert f"in {path}" in done(embedded).out
    (part,) = read_predictions(path)
    assert part.arrays["image"].shape == (Manifest.load(tmp_path / "val2017").samples, 24)
    assert part.arrays["text"].shape == (len(part.texts["captions"]), 24)
    assert len(part.texts["captions"]) == Manifest.load(tmp_path / "val2017").captions
    assert part.arrays["maps"].shape == (len(part.texts["phrases"]), 4, 4)
    for name in ("image", "text"):
        np.testing.assert_allclose(np.linalg.norm(part.arrays[name], axis=1), 1, atol=1e-5)


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
    ("option", "message"),
    [
        ("--model.init_args.initial_lr=-1", "have to be positive; got -1"),
        ("--data.init_args.batch_size=97", "lower batch_size to at most 96"),
        ("--ckpt_path=gone.ckpt", "gone.ckpt"),
        ("--trainer.inference_mode=true", "--trainer.inference_mode=false"),
        ("--trainer.max_epochs=-1", "give the trainer max_epochs or max_steps"),
    ],
)
def test_a_wrong_setting_is_named_without_a_traceback(config: Path, option: str, message: str) -> None:
    assert message in message_of("fit", "--config", str(config), option)


@pytest.mark.slow
def test_class_paths_of_version_0_1_still_train(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads(config.read_text())
    settings["model"]["class_path"] = "lightning_xai.tasks.ContrastiveFineTuning"
    settings["trainer"]["callbacks"][0]["class_path"] = "lightning_xai.callbacks.GroundingCallback"
    settings["trainer"]["limit_train_batches"] = 1
    config.write_text(json.dumps(settings))
    main(["fit", "--config", str(config)])
    assert "Grounding per epoch" in capsys.readouterr().out


def test_a_class_path_that_names_nothing_is_reported_with_its_module(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--model.class_path=lightning_xai.tasks.FineTuning"])
    assert "module 'lightning_xai.tasks' has no attribute 'FineTuning'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["export", "weights.pt", "out.pt"],
            "export takes a .ckpt file that fit has written, or a run's folder; got weights.pt",
        ),
        (["export", "broken.ckpt", "out.pt"], "broken.ckpt cannot be read"),
        (["export", "plain.ckpt", "out.pt"], "no checkpoint of this project"),
        (
            ["prepare", "coco", "--images=i", "--captions=c", "--instances=n", "--split=v", "--out=o"],
            "i is not a folder",
        ),
        (["explain", "--model.name=ViT-B-32", "--out=o"], "lightning_xai explain: give an image"),
    ],
)
def test_a_wrong_file_is_named_without_a_traceback(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.ckpt").write_bytes(b"this is no checkpoint")
    torch.save({"weight": torch.zeros(1)}, "plain.ckpt")
    assert message in message_of(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fly"], "there is no command 'fly'."),
        (["fit", "--config", "gone.yaml"], "gone.yaml"),
        (["prepare"], 'expected "subcommand" to be one of {shapes,coco'),
        (["prepare", "shapes"], "required: shapes.out"),
        (["prepare", "shapes", "--out=x", "--train=some"], "shapes: --train: expected int; got some ("),
        (["fit", "--trainer.max_epochs=many"], "lightning_xai fit: --trainer.max_epochs: expected int; got many ("),
        (
            ["fit", "--data=lightning_xai.data.ShapesDataModule", "--data.batch_size=x"],
            "--data.batch_size: expected int; got x (",
        ),
    ],
)
def test_a_mistyped_command_line_gives_one_sentence_on_what_was_expected(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") <= 2


def test_one_of_several_functions_is_found_with_either_sign_and_takes_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, bool]] = []

    def prepare(rows_a_shard: int = 1, overwrite: bool = False) -> None:
        called.append((rows_a_shard, overwrite))

    module = ModuleType("two_words")
    module.__dict__["prepare"] = prepare
    monkeypatch.setitem(sys.modules, "two_words", module)
    # An entry that is broken stops only itself: the other one is not loaded.
    sources: Registry[Any] = Registry(
        "data set", {"two-words": "two_words:prepare", "broken": "no_such_module:prepare"}
    )
    monkeypatch.setattr("lightning_xai.cli.COMMANDS", {"prepare": sources})
    main(["prepare", "two-words", "--rows-a-shard=2", "--overwrite"])
    main(["prepare", "two_words", "--overwrite", "false", "--rows_a_shard", "3"])
    assert called == [(2, True), (3, False)]


def test_a_list_without_a_default_is_given_by_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_xai.cli.COMMANDS", {"join": Join})
    main(["join", "a", "b", "--dry-run"])
    assert capsys.readouterr().out == f"{Join([Path('a'), Path('b')], dry_run=True)}\n"
    with pytest.raises(SystemExit):
        main(["join", "--help"])
    helped = capsys.readouterr().out
    assert "  join a b\n" in helped
    assert re.search(r"part +what to join", helped)


def test_wrong_options_of_lightnings_trainer_are_a_sentence(config: Path) -> None:
    assert "should be an int > 0" in message_of("fit", "--config", str(config), "--trainer.devices", "some")


@pytest.mark.parametrize("error", [ValueError("of another package"), AssertionError("an invariant")])
def test_an_unforeseen_error_keeps_its_traceback(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slip(*args: Any) -> None:
        raise error

    monkeypatch.setattr("lightning_xai.data.shapes.prepare_shapes", slip)
    with pytest.raises(type(error)) as kept:
        main(["prepare", "shapes", "--out", str(tmp_path)])
    assert kept.value is error


# --- export ---


@pytest.mark.usefixtures("names_are_forgotten")
@pytest.mark.slow
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
    printed = capsys.readouterr().out
    assert f"create_model('{name}'" in printed
    assert ("force_quick_gelu=True" in printed) == quick_gelu
    check_exported(tmp_path / "fine-tuned.ckpt", printed)
