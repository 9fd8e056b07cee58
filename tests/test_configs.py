"""Every configuration that lies in the repository can be used as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_xai.callbacks import GroundingCallback
from lightning_xai.cli import build_cli
from lightning_xai.data import ShapesDataModule, ShardDataModule
from lightning_xai.models import load_dual_encoder
from lightning_xai.tasks import ContrastiveFineTuning

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
LOGGED = {"val/loss", "val/accuracy"} | {
    f"val/{name}" for name in ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho", "grounding_pairs")
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def built_from(path: Path, folder: Path) -> Any:
    """Trainer, model and data of a config, without pretrained weights and without touching the user's folders."""
    data = ["--data.init_args.root", str(folder)] if "ShapesDataModule" in path.read_text() else []
    for split in ("train", "val", "test") if not data else ():
        data += [f"--data.init_args.{split}", str(folder / split)]
    nothing = ["--model.init_args.pretrained=null", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    return build_cli(
        ["--config", str(path), *nothing, *data, "--trainer.default_root_dir", str(folder)],
        run=False,
    )


def test_there_are_configs_to_test() -> None:
    assert {"demo.yaml"} <= {path.name for path in CONFIGS}
    assert MODELS


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_makes_trainer_model_and_data(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where the README starts every command
    cli = built_from(path, tmp_path)
    assert isinstance(cli.model, ContrastiveFineTuning)
    assert isinstance(cli.datamodule, (ShardDataModule, ShapesDataModule))
    assert not cli.trainer.test_loop.inference_mode
    assert any(isinstance(callback, GroundingCallback) for callback in cli.trainer.callbacks)
    monitors = {saver.monitor for saver in cli.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)}
    assert {"val/loss", "val/gamma_mean"} <= monitors <= LOGGED


@pytest.mark.parametrize("name", ["coco_vit_b16.yaml", "flickr30k_vit_b16.yaml"])
def test_the_papers_recipe_is_in_the_configs_of_its_data_sets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    cli = built_from(ROOT / "configs" / name, tmp_path)
    model = cli.model
    assert model.encoder.architecture["name"] == "ViT-B-16"
    assert (model.initial_lr, model.final_lr, model.weight_decay) == (1e-7, 1e-5, 1e-4)
    assert (cli.trainer.max_epochs, cli.datamodule.batch_size) == (5, 64)


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_a_model_config_loads_and_embeds(path: Path) -> None:
    encoder = load_dual_encoder(path)
    images = torch.zeros(1, 3, *encoder.image_transform.size)
    width = encoder.architecture["model_cfg"]["embed_dim"]
    assert encoder.encode_image(images).shape == (1, width)
    assert encoder.encode_text(encoder.tokenizer.encode(["a red ring"])).shape == (1, width)
