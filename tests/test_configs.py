"""Every configuration that lies in the repository can be used as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_xai.callbacks import GroundingCallback
from lightning_xai.cli import build_cli
from lightning_xai.data import ShapesDataModule, ShardDataModule
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.dual_encoder import tag_architecture
from lightning_xai.tasks import ContrastiveFineTuning

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
# Name and activation of the models of the feature-pair paper's Tables 1 and 2; the M2IB paper's is openai_vit_b32.
RELEASES = {
    "openai_rn50": "RN50-quickgelu",
    "openai_vit_b32": "ViT-B-32-quickgelu",
    "openai_vit_b16": "ViT-B-16-quickgelu",
    "laion_vit_b16": "ViT-B-16",
    "commonpool_vit_b16": "ViT-B-16",
    "datacomp_vit_b16": "ViT-B-16",
    "dfn_vit_b16": "ViT-B-16-quickgelu",
    "metaclip_vit_b16": "ViT-B-16-quickgelu",
}
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


def test_every_model_of_the_papers_has_a_config() -> None:
    assert {path.stem for path in (ROOT / "configs" / "models").glob("*.yaml")} == RELEASES.keys()


@pytest.mark.parametrize("name", RELEASES)
def test_a_model_of_the_papers_replaces_the_model_of_a_recipe_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load_dual_encoder(ROOT / "configs" / "models" / "shapes_vit.json")
    asked: list[tuple[str, str]] = []

    def load(model: str, pretrained: str) -> DualEncoder:
        asked.append((model, pretrained))
        return small  # the released weights would be downloaded

    monkeypatch.setattr("lightning_xai.tasks.contrastive.load_dual_encoder", load)
    monkeypatch.chdir(ROOT)
    recipe = ["--config", "configs/coco_vit_b16.yaml", f"--trainer.default_root_dir={tmp_path}"]
    recipe += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32"]
    recipe += [f"--data.init_args.{split}={tmp_path / split}" for split in ("train", "val", "test")]
    plain, overlaid = (
        build_cli([*recipe, *overlay], run=False) for overlay in ([], ["--config", f"configs/models/{name}.yaml"])
    )
    assert isinstance(overlaid.model, ContrastiveFineTuning)
    model, tag = asked[-1]
    assert tag in open_clip.list_pretrained_tags_by_model(model)
    assert tag_architecture(model, tag)["name"] == RELEASES[name]
    settings = [cli.config.clone() for cli in (plain, overlaid)]
    for setting in settings:
        setting.pop("config")
        setting.model.init_args.pop("model")
        setting.model.init_args.pop("pretrained")
    assert settings[0] == settings[1]
