"""What each objective owes: the same gradients however memory is saved and work is spread, on data of every form."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from captioned_shards import grey_sample
from distributed import join_lightning, run_distributed
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from training_runs import Recorder, loader_of, records_of, task_of, trainer_in

from lightning_xai import cli
from lightning_xai.data import Batch, Manifest, RecordError, Region, ShardDataModule, write_shards
from lightning_xai.data.batch import TrainingCollate
from lightning_xai.training import ContrastiveFineTuning, objectives
from lightning_xai.training.objectives import (
    Grounding,
    HardNegativeText,
    Objective,
    PhrasePatch,
    PhraseRegion,
    Sigmoid,
    Softmax,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

EVERY = sorted(
    name
    for name, part in vars(objectives).items()
    if isinstance(part, type) and issubclass(part, Objective) and part is not Objective
)
# Where the defaults do not suit data without hard negatives of their own.
OPTIONS: dict[str, dict[str, Any]] = {"HardNegativeText": {"swap_objects": True, "per_image": 2}}


def objective_of(name: str) -> Objective:
    made: Objective = getattr(objectives, name)(**OPTIONS.get(name, {}))
    return made


def task_with(config: str | Path, name: str, **options: Any) -> ContrastiveFineTuning:
    return task_of(config, objectives=[objective_of(name)], **options)


def batches_for(task: ContrastiveFineTuning, folder: str | Path, rank: int = 0, world: int = 1) -> list[Batch]:
    """A rank's part of two batches of eight, with a broken record, in the precision of the weights."""
    encoder, labels = task.encoder, Manifest.load(folder).labels
    collate = TrainingCollate(encoder.image_transform, encoder.tokenizer, label_names=labels, needs=task.batch_needs)
    records, share = records_of(Path(folder), 16), 8 // world
    records[1] = (1, RecordError("broken"))
    parts = [collate(records[start + rank * share : start + (rank + 1) * share]) for start in (0, 8)]
    return [replace(part, images=part.images.to(encoder.logit_scale.dtype)) for part in parts]


def two_steps(name: str, config: str, folder: str, out: str, options: dict[str, Any], spread: bool) -> dict[str, Any]:
    """The gradients and the numbers of two steps in float64, of this rank's part where work is spread."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    task, recorder = task_with(config, name, **options).double(), Recorder()
    trainer = trainer_in(Path(out), recorder, precision="64-true", **(join_lightning() if spread else {}))
    trainer.fit(task, loader_of(batches_for(task, folder, rank, world)))
    speed = "train/samples_per_second"
    return {
        "logged": [{key: value for key, value in row.items() if key != speed} for row in recorder.logged],
        "gradients": recorder.gradients,
    }


def assert_same_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for row, other in zip(found["logged"], expected["logged"], strict=True):
        assert row == pytest.approx(other, rel=1e-6, nan_ok=True)  # logged in float32
    # Of the first step: Adam's own divides by the size of gradients.
    found_by_name, by_name = found["gradients"][0], expected["gradients"][0]
    assert found_by_name.keys() >= by_name.keys()
    for name, gradient in found_by_name.items():
        other = by_name.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 3}, {"gradient_checkpointing": True}, {"chunk_size": 3, "gradient_checkpointing": True}],
    ids=str,
)
@pytest.mark.parametrize("name", EVERY)
def test_saving_memory_changes_no_gradient(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    where = name, str(architecture_file("vit")), str(shapes / "train"), str(tmp_path)
    assert_same_steps(two_steps(*where, options, False), two_steps(*where, {}, False))


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_gives_the_loss_of_float32_within_its_rounding(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path, name: str
) -> None:
    losses = []
    for number, precision in enumerate(("32-true", "bf16-mixed")):
        task, recorder = task_with(architecture_file("vit"), name), Recorder()
        trainer = trainer_in(tmp_path / str(number), recorder, precision=precision)
        trainer.fit(task, loader_of(batches_for(task, shapes / "train")))
        losses.append([row["train/loss"] for row in recorder.logged])
        assert all(gradient.isfinite().all() for step in recorder.gradients for gradient in step.values())
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
    assert losses[1] != losses[0]


def two_steps_of_every_objective(config: str, folder: str, out: str) -> list[dict[str, Any]]:
    return [two_steps(name, config, folder, f"{out}/{name}", {"chunk_size": 3}, True) for name in EVERY]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_gradients_of_one(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path, world: int
) -> None:
    where = str(architecture_file("vit")), str(shapes / "train"), str(tmp_path)
    ranks = run_distributed(two_steps_of_every_objective, *where, world_size=world, timeout=300)
    for number, name in enumerate(EVERY):
        for rank in ranks:
            assert_same_steps(rank[number], two_steps(name, *where[:2], str(tmp_path / "alone"), {}, False))


def two_objectives(number: int) -> list[Objective]:
    """The logit bias is read by two; `PhrasePatch` and `PhraseRegion` listen to the last block."""
    return [[Sigmoid(), PhrasePatch()], [HardNegativeText(swap_objects=True), PhraseRegion()]][number]


def gradients_of_both_strategies(config: str, folder: str, out: str) -> list[list[dict[str, Tensor]]]:
    """Gradients of a step under DDP and FSDP2, of all objectives but `Grounding`."""
    found: list[list[dict[str, Tensor]]] = []
    for number in (0, 1):
        sharded = {"strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False), "devices": 2}
        found.append([])
        for name, options in {"ddp": join_lightning(), "fsdp": sharded}.items():
            task, recorder = task_of(config, objectives=two_objectives(number)).double(), Recorder()
            trainer = trainer_in(Path(out, f"{name}{number}"), recorder, **options)
            trainer.fit(task, loader_of(batches_for(task, folder, dist.get_rank(), 2)))
            parts = recorder.gradients[0].items()
            found[-1].append({name.removeprefix("module."): part for name, part in parts})
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(FSDPModule, "set_reshard_after_forward"), reason="this torch cannot shard an encoder")
def test_a_sharded_model_has_the_gradients_of_one_that_is_not(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    where = str(architecture_file("vit")), str(shapes / "train"), str(tmp_path)
    for of_all_lists in run_distributed(gradients_of_both_strategies, *where, timeout=300):
        for plain, sharded in of_all_lists:
            assert plain.keys() == sharded.keys()
            for name, gradient in plain.items():
                torch.testing.assert_close(sharded[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


# --- data ---


def fit_on(task: ContrastiveFineTuning, folder: Path, out: Path, **options: Any) -> list[dict[str, float]]:
    """What one epoch of the data module logs at each step."""
    recorder, data = Recorder(), ShardDataModule(train=folder, num_workers=0, **({"batch_size": 8} | options))
    trainer_in(out, recorder).fit(task, data)
    return recorder.logged


def test_batches_hold_what_objectives_ask_for_and_nothing_else(
    architecture_file: Callable[[str], Path], shapes: Path
) -> None:
    held: dict[str, tuple[bool, Any]] = {}
    for chosen in (
        [Softmax()],
        [Grounding()],
        [HardNegativeText(swap_objects=True)],
        [HardNegativeText(), Grounding()],
    ):
        task = task_of(architecture_file("vit"), objectives=chosen)
        batch = batches_for(task, shapes / "train")[0]
        negatives = None if batch.negatives is None else len(batch.negatives)
        held["+".join(each.name for each in chosen)] = (len(batch.phrases) > 0, negatives)
    assert held["softmax"] == (False, None)
    assert held["grounding"] == (True, None)
    assert held["hard_negative_text"][0] is False
    assert 0 < held["hard_negative_text"][1] <= 7  # one of each image that is not broken
    assert held["hard_negative_text+grounding"] == (True, 0), "swaps are not asked for"


def test_wrong_captions_change_with_the_epoch_and_depend_on_seed_and_key_alone(
    architecture_file: Callable[[str], Path], shapes: Path
) -> None:
    encoder = task_of(architecture_file("vit")).encoder
    labels, records = Manifest.load(shapes / "train").labels, records_of(shapes / "train", 16)

    def wrong(epoch: int, places: range, most: int = 1) -> dict[str, int]:
        needs = HardNegativeText(per_image=most, swap_objects=True).needs
        collate = TrainingCollate(encoder.image_transform, encoder.tokenizer, label_names=labels, needs=needs)
        batch = collate([records[place] for place in places], epoch)
        assert batch.negatives is not None
        assert batch.negatives.image_row.bincount().max() <= most
        return dict(zip(batch.negatives.captions, batch.negatives.image_row.tolist(), strict=True))

    assert wrong(0, range(16)).keys() == wrong(0, range(15, -1, -1)).keys()
    assert wrong(0, range(16)).keys() == wrong(0, range(8)).keys() | wrong(0, range(8, 16)).keys()
    assert wrong(0, range(16)).keys() != wrong(1, range(16)).keys()
    assert wrong(0, range(16)).keys() < wrong(0, range(16), most=3).keys()


def test_data_that_lack_what_an_objective_needs_are_refused_before_training(
    architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    bare = [grey_sample(f"bare{i}") for i in range(8)]
    region = Region("dog", None, {0: ((2, 7),)})
    unboxed = [grey_sample(f"unboxed{i}", regions=(region,)) for i in range(8)]
    for name, samples in (("bare", bare), ("unboxed", unboxed)):
        write_shards(samples, tmp_path / name, name=name, progress=False)
    for objective, folder, message in (
        (Grounding(), "bare", r"grounding needs phrases .*, and none of the 8 samples of .*bare has one: prepare the"),
        (Grounding(), "unboxed", r"grounding needs boxes of the objects .*none of the 8 samples"),
        (HardNegativeText(), "bare", r"hard_negative_text needs hard negatives, .*set its option swap_objects to true"),
        (
            HardNegativeText(swap_objects=True),
            "unboxed",
            r"hard negatives, .*an object with a box that is the only one",
        ),
    ):
        task = task_of(architecture_file("vit"), objectives=[Softmax(), objective])
        with pytest.raises(ValueError, match=message):
            fit_on(task, tmp_path / folder, tmp_path / "run")
    fit_on(task_of(architecture_file("vit")), tmp_path / "bare", tmp_path / "run")


def test_batches_without_a_place_for_hard_negatives_are_refused(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    task = task_of(architecture_file("vit"), objectives=[HardNegativeText()])
    batches = batches_for(task_of(architecture_file("vit")), shapes / "train")
    with pytest.raises(ValueError, match=r"training batches have no place for them: take ShardDataModule"):
        trainer_in(tmp_path).fit(task, loader_of(batches))


def test_options_of_hard_negatives_out_of_range_are_refused() -> None:
    for options, message in (
        ({"margin": -0.1}, "margin is one of cosines, from 0 to 2; got -0.1"),
        ({"margin": float("nan")}, "margin is one of cosines"),
        ({"per_image": 0}, "per_image has to be at least 1; got 0"),
        ({"weight": -1.0}, "weight of the objective hard_negative_text has to be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            HardNegativeText(**options)


def test_an_unknown_objective_is_refused_in_one_sentence(
    architecture_file: Callable[[str], Path], shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model=ContrastiveFineTuning", f"--model.model={architecture_file('vit')}", "--model.pretrained=null"]
    data = ["--data=ShardDataModule", f"--data.train={shapes / 'train'}"]
    for name, message in (
        ("lightning_xai.training.objectives.HardNegative", "module 'lightning_xai.training.objectives' has no attrib"),
        ("Groundng", "there is no class Groundng (did you mean Grounding?): give the name of one"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["fit", *model, *data, f"--model.objectives+={name}"])
        assert f"--model.objectives: {message}" in capsys.readouterr().err


def test_a_run_whose_images_are_mostly_without_hard_negatives_stays_finite(
    architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """One image in eight has a wrong caption: batches of two have one now and then."""
    dog = Region("dog", (20.0, 10.0, 20.0, 16.0), {0: ((2, 5),)})
    samples = [grey_sample(f"k{i}", (f"a dog {i}",), regions=(dog,) if i % 8 == 0 else ()) for i in range(16)]
    samples += [grey_sample("cat", ("a cat",), regions=(Region("cat", (20.0, 10.0, 20.0, 16.0)),))]
    write_shards(samples, tmp_path / "data", name="few", progress=False)
    task = task_of(architecture_file("vit"), objectives=[HardNegativeText(swap_objects=True)])
    logged = fit_on(task, tmp_path / "data", tmp_path / "run", batch_size=2)
    counts = [row["train/hard_negative_text_negatives"] for row in logged]
    assert min(counts) == 0
    assert sum(counts) in (1, 2)  # one sample sits out
    assert all(torch.tensor(row["train/loss"]).isfinite() for row in logged)


def train_siglip(config: str, shards: str, out: str) -> list[list[float]]:
    losses = []
    for number, chosen in enumerate(([Softmax()], [Sigmoid()], [Softmax(), Sigmoid()])):
        task, recorder = task_of(config, objectives=chosen), Recorder()
        data = ShardDataModule(train=shards, batch_size=8, num_workers=0)
        trainer_in(Path(out) / str(number), recorder, limit_train_batches=4, **join_lightning()).fit(task, data)
        losses.append([row["train/loss"] for row in recorder.logged])
    return losses


@pytest.mark.distributed
@pytest.mark.slow
def test_a_model_with_a_bias_trains_on_two_processes_by_either_loss(shapes: Path, tmp_path: Path) -> None:
    architecture = json.loads(Path("configs/models/shapes_vit.json").read_text())
    architecture |= {"init_logit_bias": -10.0, "custom_text": True}
    config = tmp_path / "siglip.json"
    config.write_text(json.dumps(architecture))
    first, second = run_distributed(train_siglip, str(config), str(shapes / "train"), str(tmp_path), timeout=300)
    assert first == second
    assert [len(losses) for losses in first] == [4, 4, 4]
    assert torch.tensor(first).isfinite().all()


# --- real images ---


class FiniteGradients(Recorder):
    """Check gradients in place of keeping them: those of a ViT-B-32 are 0.6 GB a step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def fit_every_objective_on_coco(folder: str, out: str, spread: bool) -> dict[str, list[float]]:
    """The losses of two steps of a random ViT-B-32, by objective."""
    losses = {}
    for name in EVERY:
        task, recorder = task_with("ViT-B-32", name), FiniteGradients()
        data = ShardDataModule(train=folder, batch_size=4, num_workers=0)
        processes = join_lightning() if spread else {}
        trainer_in(Path(out) / name, recorder, limit_train_batches=2, **processes).fit(task, data)
        losses[name] = [row["train/loss"] for row in recorder.logged]
        # The trainer and the model refer to each other: else several models with AdamW's averages are in memory.
        del task, recorder, data
        gc.collect()
    return losses


@pytest.fixture
def coco_shards(coco_mini: Path, tmp_path: Path) -> Path:
    options = {"images": coco_mini / "train2017", "split": "train2017", "out": tmp_path / "train"}
    options |= {kind: coco_mini / f"annotations/{kind}_train2017.json" for kind in ("captions", "instances")}
    cli.main(["prepare", "coco", *(f"--{name}={value}" for name, value in options.items())])
    return tmp_path / "train"


def assert_every_objective_was_finite(losses: dict[str, list[float]]) -> None:
    assert losses.keys() == set(EVERY)
    for name, values in losses.items():
        assert len(values) == 2, name
        assert torch.tensor(values).isfinite().all(), name


@pytest.mark.slow
def test_each_objective_fine_tunes_a_random_vit_b_32_on_coco(coco_shards: Path, tmp_path: Path) -> None:
    assert_every_objective_was_finite(fit_every_objective_on_coco(str(coco_shards), str(tmp_path), False))


@pytest.mark.distributed
@pytest.mark.slow
def test_each_objective_fine_tunes_a_random_vit_b_32_on_coco_on_two_processes(
    coco_shards: Path, tmp_path: Path
) -> None:
    arguments = str(coco_shards), str(tmp_path), True
    ranks = run_distributed(fit_every_objective_on_coco, *arguments, timeout=600)
    assert ranks[0] == ranks[1]
    assert_every_objective_was_finite(ranks[0])
