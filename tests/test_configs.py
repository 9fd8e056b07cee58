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
PAPERS = ("coco_vit_b16.yaml", "flickr30k_vit_b16.yaml")
LOGGED = {"val/loss", "val/accuracy"} | {
    f"val/{name}" for name in ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho", "grounding_pairs")
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.fixture(scope="module", params=CONFIGS, ids=name_of)
def cli(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trainer, model and data of a config, without pretrained weights and without touching the user's folders."""
    path, folder = request.param, tmp_path_factory.mktemp("config")
    changes = ["--model.init_args.pretrained=null", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    changes.append(f"--trainer.default_root_dir={folder}")
    splits = ("root",) if "ShapesDataModule" in path.read_text() else ("train", "val", "test")
    changes += [f"--data.init_args.{split}={folder / split}" for split in splits]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the README starts every command
        made: Any = build_cli(["--config", str(path), *changes], run=False)
    made.source = path.name
    return made


def test_there_are_configs_to_test() -> None:
    assert {"demo.yaml", *PAPERS} <= {path.name for path in CONFIGS}
    assert MODELS


def test_a_config_makes_trainer_model_and_data(cli: Any) -> None:
    assert isinstance(cli.model, ContrastiveFineTuning)
    assert isinstance(cli.datamodule, (ShardDataModule, ShapesDataModule))
    assert not cli.trainer.test_loop.inference_mode
    assert any(isinstance(callback, GroundingCallback) for callback in cli.trainer.callbacks)


def test_its_checkpoints_follow_grounding_and_loss_by_names_that_are_logged(cli: Any) -> None:
    savers = [saver for saver in cli.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    modes = {saver.monitor: saver.mode for saver in savers}
    assert {"val/loss", "val/gamma_mean"} <= modes.keys() <= LOGGED
    assert (modes["val/loss"], modes["val/gamma_mean"]) == ("min", "max")


def test_the_configs_of_the_papers_data_sets_hold_its_recipe(cli: Any) -> None:
    if cli.source not in PAPERS:
        pytest.skip("a recipe of its own")
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
