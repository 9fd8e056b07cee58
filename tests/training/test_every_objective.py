"""What each objective owes: the same gradients however memory is saved and work is spread, on data of every form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import join_lightning, run_distributed
from training_runs import Recorder, loader_of, records_of, task_of, trainer_in

from lightning_xai.data import Batch, Manifest, RecordError
from lightning_xai.data.batch import TrainingCollate
from lightning_xai.training import ContrastiveFineTuning, objectives
from lightning_xai.training.objectives import Objective

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
