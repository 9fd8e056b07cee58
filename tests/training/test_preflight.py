"""Devices and processes are compared with a Slurm allocation before a run starts, and its steps are stated as made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from captioned_shards import grey_sample, make_samples
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from training_runs import Recorder, task_of, trainer_in

from lightning_xai.data import ShardDataModule
from lightning_xai.data.shards import write_shards
from lightning_xai.training import Preflight
from lightning_xai.training.preflight import check_allocation, slurm_job, started_by_srun


def in_job(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    """Make the environment that of one of Slurm's tasks: four on two nodes, unless `variables` say otherwise."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")  # restored afterwards: the check sets it
    job = {"JOB_ID": 7, "JOB_NAME": "test", "STEP_ID": 0, "NTASKS": 4, "NNODES": 2, "NTASKS_PER_NODE": 2}
    for name, value in (job | variables).items():
        monkeypatch.setenv(name if name == "MASTER_ADDR" else f"SLURM_{name}", str(value))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({}, "trainer.devices=1, but Slurm has started 2 task(s) on each node"),
        ({"NTASKS": 2, "NTASKS_PER_NODE": 1}, "trainer.num_nodes=1, but the job has 2 node(s)"),
        ({"NTASKS": 3}, "3 tasks on 2 nodes with 2 a node"),
        ({"NTASKS": 3, "STEP_TASKS_PER_NODE": "2,1"}, "3 tasks on 2 nodes with 2,1 a node"),
        (
            {"NTASKS": 1, "NNODES": 1, "NTASKS_PER_NODE": 1, "MASTER_ADDR": "no-such-host.invalid"},
            "MASTER_ADDR=no-such-host.invalid cannot be",
        ),
        (
            {"NTASKS": 1, "NNODES": 1, "NTASKS_PER_NODE": 1, "GPUS_ON_NODE": 4},
            "4 GPU(s) and started 1 task(s) on it, and every task takes one: submit with --ntasks-per-node=4",
        ),
    ],
)
def test_devices_that_do_not_match_the_allocation_are_refused(
    job: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, **job)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below, without a pattern
        check_allocation(1, 1, "gpu")
    assert message in str(error.value)


@pytest.mark.parametrize(("gpus", "accelerator"), [("", "gpu"), (2, "gpu"), (4, "cpu")])
def test_devices_that_match_the_allocation_are_accepted(
    gpus: object, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, GPUS_ON_NODE=gpus)
    for devices in (2, "2", "auto", [0, 1]):
        check_allocation(devices, 2, accelerator)
    with pytest.raises(ValueError, match=r"trainer\.devices=3, but Slurm has started 2"):  # so they were compared
        check_allocation(3, 2, accelerator)


@pytest.mark.parametrize(
    ("job", "num_nodes"),
    [
        ({}, 2),
        ({"NNODES": 1, "NTASKS": 2}, 1),
        ({"JOB_NAME": "interactive"}, 2),
        ({"JOB_NAME": "interactive", "STEP_ID": 0xFFFFFFFA, "NTASKS": 1}, 2),  # the shell of newer versions of salloc
    ],
)
def test_a_job_of_several_tasks_that_was_started_without_srun_is_refused(
    job: dict[str, object], num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, **({"STEP_ID": "", "PROCID": 0} | job))
    with pytest.raises(ValueError, match=r"started without srun.*Put srun in front, `srun python -m lightning_xai"):
        check_allocation(2, num_nodes, "cpu")


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
        {"SLURM_JOB_NAME": "interactive", "SLURM_NNODES": "1"},  # Lightning starts the processes of this node itself
        {"TORCHELASTIC_RUN_ID": "1"},
    ],
)
def test_whoever_needs_no_srun_is_not_asked_for_it(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, STEP_ID="")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_allocation(2, 1, "cpu")


def test_a_step_of_an_interactive_allocation_counts_as_one_and_its_own_tasks_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_job(monkeypatch, JOB_NAME="interactive", NTASKS=2, NNODES=2, NTASKS_PER_NODE=4, STEP_TASKS_PER_NODE="1(x2)")
    assert started_by_srun()
    assert slurm_job() is None  # nothing can requeue it
    check_allocation(1, 2, "cpu")
    assert os.environ["SLURM_NTASKS_PER_NODE"] == "1"
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=1, but the job has 2 node"):
        check_allocation(1, 1, "cpu")


@pytest.mark.parametrize(
    ("options", "callbacks", "told"),
    [
        # 12 batches of 4 an epoch
        (
            {},
            [],
            ["batch: 4 on each device, 4 in all, which are each other's negatives", "steps: 12 an epoch, 2 epochs, 24"],
        ),
        (
            {"accumulate_grad_batches": 16},
            [],
            ["; 12 batches (48 samples) make a step", "steps: 1 an epoch, 2 epochs, 2 in"],
        ),
        (
            {"accumulate_grad_batches": 5, "max_epochs": 1},
            [],
            [
                "; 5 batches (20 samples) make a step, 2 (8 samples) the last one of an epoch",
                "3 an epoch, 1 epoch, 3 in all",
            ],
        ),
        (
            {},
            [GradientAccumulationScheduler({0: 2, 1: 1})],
            ["; 2, then 1 batches (8, then 4 samples) make a step", "steps: 6, then 12 an epoch, 2 epochs, 18 in all"],
        ),
        (
            {"accumulate_grad_batches": 16, "max_epochs": -1, "max_steps": 3},
            [],
            ["12 batches (48 samples)", ": 1 an epoch, 3 in"],
        ),
    ],
)
def test_the_steps_that_are_told_before_training_are_those_that_are_made(
    options: dict[str, Any],
    callbacks: list[Callback],
    told: list[str],
    architecture_file: Callable[[str], Path],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = task_of(architecture_file("vit"), final_lr=1e-2)
    data = ShardDataModule(train=shards, val=shards, batch_size=4, num_workers=0)
    recorder = Recorder()
    own = {"limit_train_batches": 12, "limit_val_batches": 0, "max_epochs": 2}
    trainer = trainer_in(tmp_path, Preflight(), recorder, *callbacks, **(own | options))
    trainer.fit(task, data)
    text = capsys.readouterr().out
    for line in told:
        assert line in text
    assert f"{trainer.global_step} in all" in text
    # The schedule of rates ends with the last step.
    assert recorder.rates[-1] == pytest.approx(1e-2)


def test_photos_that_the_crop_hides_in_part_are_counted_before_training(
    architecture_file: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [*make_samples(3), *(grey_sample(f"wide{i}") for i in range(2))]  # squares, and two of 64 x 48 pixels
    write_shards(samples, tmp_path / "shards", name="test", samples_per_shard=4, progress=False)
    said = "photos: the model's crop hides more than a fifth of 2 of the first 5 of train; --model.fit letterbox"
    for fit in ("crop", "letterbox"):
        data = ShardDataModule(train=tmp_path / "shards", batch_size=2, num_workers=0)
        trainer = trainer_in(tmp_path / fit, Preflight(), max_steps=1, limit_val_batches=0)
        trainer.fit(task_of(architecture_file("vit"), fit=fit), data)
        assert (said in capsys.readouterr().out) is (fit == "crop")
