"""Every configuration in the repository can be used as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_xai.attribution import METHODS
from lightning_xai.attribution.method_options import choose_methods
from lightning_xai.cli import build_cli, main
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.objectives import Objectives
from lightning_xai.commands.objectives_run import ObjectivesRun
from lightning_xai.commands.roar import Roar, all_methods
from lightning_xai.data import ShapesDataModule, ShardDataModule
from lightning_xai.evaluation import AttributionEvaluation
from lightning_xai.metrics import METRICS
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.architecture import tag_architecture
from lightning_xai.results.record import method_of
from lightning_xai.training import ContrastiveFineTuning, GroundingCallback

ROOT = Path(__file__).resolve().parents[1]
ROARS = sorted((ROOT / "configs").glob("roar_*.yaml"))  # of `roar`; all others are of Lightning's verbs
EVALUATIONS = sorted((ROOT / "configs").glob("eval_*.yaml"))  # of `test`
OBJECTIVES = sorted((ROOT / "configs").glob("objectives_*.yaml"))  # of `objectives`
CONFIGS = sorted(set((ROOT / "configs").glob("*.yaml")) - set(ROARS) - set(EVALUATIONS) - set(OBJECTIVES))
SHAPES_VIT = ROOT / "configs" / "models" / "shapes_vit.json"
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
SHARDED = "coco_vit_h14_sharded.yaml"
LOGGED = {"val/loss", "val/accuracy"} | {
    f"val/{name}" for name in ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho", "grounding_targets")
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def deep_vit(folder: Path) -> Path:
    """A small model with as many blocks as those have whose layers configs name."""
    deep = json.loads(SHAPES_VIT.read_text())
    for tower in ("vision_cfg", "text_cfg"):
        deep[tower] |= {"layers": 12, "width": 32}
    deep["vision_cfg"]["head_width"], deep["text_cfg"]["heads"] = 8, 4
    (folder / "deep.json").write_text(json.dumps(deep))
    return folder / "deep.json"


@pytest.fixture(scope="module", params=CONFIGS, ids=name_of)
def cli(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trainer, model and data of a config, without pretrained weights and without touching the user's folders."""
    path, folder = request.param, tmp_path_factory.mktemp("config")
    changes = ["--model.init_args.pretrained=null", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    changes.append(f"--trainer.default_root_dir={folder}")
    if path.name == SHARDED:  # its own model would take gigabytes
        changes.append("--model.init_args.model=configs/models/shapes_vit.json")
    splits = ("root",) if "ShapesDataModule" in path.read_text() else ("train", "val", "test")
    changes += [f"--data.init_args.{split}={folder / split}" for split in splits]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the README starts every command
        made: Any = build_cli(["--config", str(path), *changes], run=False)
    made.source = path.name
    return made


def test_a_config_makes_trainer_model_and_data_and_saves_by_names_that_are_logged(cli: Any) -> None:
    assert isinstance(cli.model, ContrastiveFineTuning)
    assert isinstance(cli.datamodule, (ShardDataModule, ShapesDataModule))
    assert not cli.trainer.test_loop.inference_mode
    assert any(isinstance(callback, GroundingCallback) for callback in cli.trainer.callbacks)
    savers = [saver for saver in cli.trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    modes = {saver.monitor: saver.mode for saver in savers}
    assert {"val/loss", "val/gamma_mean"} <= modes.keys() <= LOGGED
    assert (modes["val/loss"], modes["val/gamma_mean"]) == ("min", "max")
    if cli.source in PAPERS:
        check_the_papers_recipe(cli)
    elif cli.source == SHARDED:
        check_memory_of_a_large_model(cli)


def check_the_papers_recipe(cli: Any) -> None:
    model = cli.model
    assert model.encoder.architecture["name"] == "ViT-B-16"
    assert (model.initial_lr, model.final_lr, model.weight_decay) == (1e-7, 1e-5, 1e-4)
    assert (cli.trainer.max_epochs, cli.datamodule.batch_size) == (5, 64)


def check_memory_of_a_large_model(cli: Any) -> None:
    written = yaml.safe_load((ROOT / "configs" / SHARDED).read_text())
    model, trainer = written["model"]["init_args"], written["trainer"]
    assert model["pretrained"] in open_clip.list_pretrained_tags_by_model(model["model"])
    assert isinstance(cli.trainer.strategy, ModelParallelStrategy)
    sizes = trainer["strategy"]["init_args"]
    assert sizes["data_parallel_size"] == trainer["devices"] * trainer["num_nodes"]
    assert (sizes["tensor_parallel_size"], sizes["save_distributed_checkpoint"]) == (1, False)
    assert 0 < cli.model.chunk_size < cli.datamodule.batch_size
    assert cli.model.encoder.model.transformer.grad_checkpointing


def test_the_grounded_demo_differs_from_the_demo_in_objectives_and_its_name_alone() -> None:
    demo, grounded = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("demo", "demo_grounded")
    )
    objectives = grounded["model"]["init_args"].pop("objectives")
    assert [each["class_path"].rsplit(".", 1)[1] for each in objectives] == ["Softmax", "Grounding"]
    assert grounded["trainer"]["logger"]["init_args"].pop("name") == "demo_grounded"
    assert demo["trainer"]["logger"]["init_args"].pop("name") == "demo"
    assert grounded == demo


@pytest.mark.parametrize("path", EVALUATIONS, ids=name_of)
def test_a_config_of_an_evaluation_makes_its_module_methods_and_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = SHAPES_VIT if path.stem.endswith("_demo") else deep_vit(tmp_path)
    monkeypatch.chdir(ROOT)
    changes = [f"--model.init_args.model={architecture}", "--model.init_args.pretrained=null"]
    changes += ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--trainer.default_root_dir={tmp_path}"]
    made: Any = build_cli(["--config", str(path), *changes], run=False)
    assert isinstance(made.model, AttributionEvaluation)
    assert isinstance(made.datamodule, ShardDataModule)
    assert not made.trainer.test_loop.inference_mode
    assert not made.trainer.loggers
    for label, options in made.model.methods.items():
        name, own = method_of(label, options)
        chosen, missing = choose_methods(made.model.encoder, name, own)
        assert [each.name for each in chosen] == [name]
        assert not missing
    assert made.model.out.parts[0] == "runs"


@pytest.mark.parametrize("name", ["eval_judge_demo.yaml", "eval_coco_judge.yaml"])
def test_the_judge_measures_every_method_by_every_metric(name: str) -> None:
    settings = yaml.safe_load((ROOT / "configs" / name).read_text())["model"]["init_args"]
    assert set(settings["metrics"]) == set(METRICS)
    assert {method_of(label, options)[0] for label, options in settings["methods"].items()} == set(METHODS)
    assert settings["referee"] in settings["methods"]


def test_a_saved_config_is_read_back_whatever_the_names_in_it(tmp_path: Path) -> None:
    names = ["1e-5", "1E5", "12e03", "1.e3", "1_0", ".5", "on", "2024-01-01", "a: b", "007"]
    loggers = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": dict.fromkeys(("save_dir", "name"), name)}
        for name in names
    ]
    (tmp_path / "own.yaml").write_text(json.dumps({"trainer": {"logger": loggers, "accelerator": "cpu"}}))
    demo = ["--config", str(ROOT / "configs" / "demo.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    first = build_cli([*demo, f"--config={tmp_path / 'own.yaml'}"], run=False)
    (tmp_path / "saved.yaml").write_text(first.parser.dump(first.config, skip_none=False))
    second = build_cli([f"--config={tmp_path / 'saved.yaml'}"], run=False)
    assert [logger.init_args.name for logger in second.config.trainer.logger] == names
    assert [logger.init_args.save_dir for logger in second.config.trainer.logger] == names
    assert second.config.model == first.config.model


@pytest.mark.parametrize(
    ("name", "cells"), [("roar_demo.yaml", 5 + 6 * 2 * 5), ("roar_grid.yaml", 3 + 27 * 2 * 3), ("roar_paper.yaml", 95)]
)
def test_a_config_of_roar_plans_its_cells(
    name: str, cells: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main(["roar", "--config", f"configs/{name}", "--list-trials"])
    assert len(capsys.readouterr().out.splitlines()) == cells


@pytest.mark.parametrize("path", ROARS, ids=name_of)
def test_the_methods_of_a_config_of_roar_can_be_made(path: Path, tmp_path: Path) -> None:
    encoder = load_dual_encoder(deep_vit(tmp_path))
    settings = yaml.safe_load(path.read_text())
    roar = Roar(ModelChoice("deep.json"), Path(), Path(), settings["methods"], grid=settings.get("grid", {}))
    for method, options in all_methods(roar).values():
        (chosen,), _ = choose_methods(encoder, method, options)
        assert chosen.options.items() >= options.items()


@pytest.mark.parametrize("path", OBJECTIVES, ids=name_of)
def test_a_config_of_objectives_can_be_run_and_knows_what_is_trained_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    settings = Objectives(**yaml.safe_load(path.read_text()) | {"out": tmp_path})
    run = ObjectivesRun(settings)
    assert {name: found for name in settings.variants if (found := run.trained_on(name))} == {
        "hard_negatives": ("val/caption_choice",),
        "gamma": ("feature_pair",),
        "mixture": ("feature_pair", "val/caption_choice"),
    }


@pytest.mark.parametrize("path", MODELS, ids=name_of)
def test_a_model_config_loads_and_embeds(path: Path) -> None:
    encoder = load_dual_encoder(path)
    images = torch.zeros(1, 3, *encoder.image_transform.size)
    width = encoder.architecture["model_cfg"]["embed_dim"]
    assert encoder.encode_image(images).shape == (1, width)
    assert encoder.encode_text(encoder.tokenizer.encode(["a red ring"])).shape == (1, width)


@pytest.mark.parametrize("name", ["openai_rn50", "laion_vit_b16", "dfn_vit_b16"])
def test_a_model_of_the_papers_replaces_the_model_of_a_recipe_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load_dual_encoder(SHAPES_VIT)
    asked: list[tuple[str, str]] = []

    def load(model: str, pretrained: str, **options: Any) -> DualEncoder:
        assert not any(options.values())
        asked.append((model, pretrained))
        return small  # the released weights would be downloaded

    monkeypatch.setattr("lightning_xai.training.contrastive.load_dual_encoder", load)
    monkeypatch.chdir(ROOT)
    recipe = ["--config", "configs/coco_vit_b16.yaml", f"--trainer.default_root_dir={tmp_path}"]
    recipe += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32"]
    recipe += [f"--data.init_args.{split}={tmp_path / split}" for split in ("train", "val", "test")]
    plain, overlaid = (
        build_cli([*recipe, *overlay], run=False) for overlay in ([], ["--config", f"configs/models/{name}.yaml"])
    )
    assert isinstance(overlaid.model, ContrastiveFineTuning)
    assert tag_architecture(*asked[-1])["name"] == RELEASES[name]
    settings = [cli.config.clone() for cli in (plain, overlaid)]
    for setting in settings:
        setting.pop("config")
        setting.model.init_args.pop("model")
        setting.model.init_args.pop("pretrained")
    assert settings[0] == settings[1]


def test_every_model_of_the_papers_has_a_config_with_released_weights() -> None:
    found = {}
    for path in (ROOT / "configs" / "models").glob("*.yaml"):
        model = yaml.safe_load(path.read_text())["model"]["init_args"]
        assert model["pretrained"] in open_clip.list_pretrained_tags_by_model(model["model"])
        found[path.stem] = tag_architecture(model["model"], model["pretrained"])["name"]
    assert found == RELEASES
