"""Stopping at every single batch, in every kind of schedule, on one process and on two."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from quiet_trainer import quiet_trainer
from stopped_runs import Left, differences, left_by
from training_runs import task_of

from lightning_xai.data import ShardDataModule
from lightning_xai.data.shapes import prepare_shapes
from lightning_xai.results.runs import load_runs
from lightning_xai.training import AtomicCheckpointIO, GroundingCallback, Resume
from lightning_xai.training.resume import RunStoppedError
from lightning_xai.training.run_folder import RunFolder, RunFolderError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")


class StopAt(Callback):
    """Sends this process a signal at the end of the n-th training batch, or in the n-th validation batch."""

    def __init__(self, number: int | None, signum: int, *, validation: bool = False, rank: int = 0) -> None:
        self.number, self.signum, self.validation, self.rank = number, signum, validation, rank
        self.seen = {"train": 0, "validation": 0}

    def count(self, what: str, trainer: L.Trainer) -> None:
        self.seen[what] += 1
        wanted = "validation" if self.validation else "train"
        if what == wanted and self.seen[what] - 1 == self.number and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.count("train", trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.count("validation", trainer)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images to train on, 9 to validate on."""
    root = tmp_path_factory.mktemp("resume") / "shapes"
    prepare_shapes(root, 24, 9, progress=False)
    return root


@pytest.fixture(scope="module")
def model(architecture_file: Callable[[str], Path]) -> Path:
    return architecture_file("vit")


def fit(
    run: Path,
    model: Path,
    world: Path,
    *callbacks: Callback,
    batch_size: int = 4,
    workers: int = 0,
    warmup_steps: int = 0,
    **options: Any,
) -> bool:
    """Train, or go on with the training in `run`, until it is finished (True) or stopped."""
    folder, record = RunFolder(run), RunFolder(run).read()
    newest = None if record is None else folder.newest(record)
    module = task_of(model, final_lr=1e-4, warmup_steps=warmup_steps)
    data = ShardDataModule(
        train=world / "train",
        val=world / "val",
        batch_size=batch_size,
        num_workers=workers,
        shuffle_buffer=6,
        max_fault_fraction=1.0,
    )
    best = ModelCheckpoint(filename="best", monitor="val/loss", enable_version_counter=False)
    chosen = None if newest is None else newest.name
    resume = Resume(folder, chosen=chosen, measure_last=options.pop("measure_last", True))
    defaults: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1, "inference_mode": False}
    defaults |= {"plugins": [AtomicCheckpointIO()], "logger": TensorBoardLogger(run, name="", version="")}
    trainer = quiet_trainer(run, GroundingCallback(examples=0), best, *callbacks, resume, **(defaults | options))
    try:
        trainer.fit(module, data, ckpt_path=newest)
    except RunStoppedError:
        return False
    return True


@pytest.fixture(scope="module")
def whole(model: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """What the usual schedule leaves without interruption."""
    run = tmp_path_factory.mktemp("whole")
    assert fit(run, model, world)
    return left_by(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"val_check_interval": 2},
        {"val_check_interval": 4, "check_val_every_n_epoch": None},
        {"accumulate_grad_batches": 2},
        # The validation falls into a step: within each epoch, and in the second one, counted over both.
        {"accumulate_grad_batches": 2, "val_check_interval": 3},
        {"accumulate_grad_batches": 4, "val_check_interval": 7, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"max_steps": 9, "max_epochs": -1},
    ],
    ids=str,
)
def test_stopped_at_any_batch_a_run_ends_as_an_uninterrupted_one(
    schedule: dict[str, Any], model: Path, world: Path, tmp_path: Path
) -> None:
    assert fit(tmp_path / "whole", model, world, **schedule)
    expected = left_by(tmp_path / "whole")
    # Every batch of the usual schedule; of the others one within an epoch, the last of it, and one of the second epoch.
    for number in range(12) if not schedule else (1, 5, 8):
        run = tmp_path / f"stopped{number}"
        signum = (signal.SIGTERM, signal.SIGUSR1)[number % 2]
        lives = 1
        while not fit(run, model, world, StopAt(number if lives == 1 else None, signum), **schedule):
            lives += 1
        assert lives == 2, number  # after the last of max_steps the validation is left to stop
        assert differences(left_by(run), expected) == [], number


@pytest.mark.slow
def test_a_stop_inside_a_validation_costs_no_more_than_the_batch_before_it(
    model: Path, world: Path, tmp_path: Path, whole: Left
) -> None:
    run = tmp_path / "stopped"
    # Three batches of the validation before training, then those of the first epoch's.
    assert not fit(run, model, world, StopAt(4, signal.SIGTERM, validation=True))
    assert [path.name for path in RunFolder(run).files()] == ["step=00000005.ckpt"]
    assert fit(run, model, world)
    assert differences(left_by(run), whole) == []


def test_where_gradients_are_summed_up_a_stop_at_an_epochs_end_costs_no_more_than_a_step(
    model: Path, world: Path, tmp_path: Path
) -> None:
    # 6 batches, of which 4 make a step and the last 2 another one.
    assert not fit(tmp_path, model, world, StopAt(5, signal.SIGTERM), accumulate_grad_batches=4)
    assert [path.name for path in RunFolder(tmp_path).files()] == ["step=00000001.ckpt"]


@pytest.mark.slow
def test_a_run_that_max_time_ends_is_not_finished_and_goes_on_inside_its_epoch(
    model: Path, world: Path, tmp_path: Path, whole: Left
) -> None:
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="max_time is over"):
        assert fit(run, model, world, Slow(1.0), max_time={"seconds": 1})
    record = RunFolder(run).read()
    assert record is not None
    assert not record.finished
    assert fit(run, model, world, max_time={"hours": 1})
    gone_on = left_by(run)
    # What was measured where the time was over has been logged in addition.
    logged = {key: value for key, value in gone_on.logged.items() if key in whole.logged}
    assert differences(gone_on._replace(logged=logged), whole) == []


@pytest.mark.slow
def test_where_gradients_are_summed_up_max_time_ends_a_run_behind_a_step(
    model: Path, world: Path, tmp_path: Path
) -> None:
    assert fit(tmp_path / "whole", model, world, accumulate_grad_batches=2)
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="max_time is over"):
        assert fit(run, model, world, Slow(1.0), max_time={"seconds": 1}, accumulate_grad_batches=2)
    assert [path.name for path in RunFolder(run).files()] == ["step=00000002.ckpt"]
    assert fit(run, model, world, max_time={"hours": 1}, accumulate_grad_batches=2)
    whole, gone_on = left_by(tmp_path / "whole"), left_by(run)
    assert differences(gone_on._replace(logged=whole.logged), whole) == []


class Slow(Callback):
    """Takes its time in the third batch."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds if batch_idx == 2 else 0)


@pytest.mark.slow
def test_a_measurement_that_max_time_makes_chooses_no_best_model(model: Path, world: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="max_time is over"):
        assert fit(tmp_path, model, world, Slow(1.0), max_time={"seconds": 1}, max_epochs=1)
    # The run was measured where it stopped, but the file of its best model, of which there is none yet, was not made.
    assert list((tmp_path / "grounding").glob("step=0000000*"))
    assert not list(tmp_path.rglob("best.ckpt"))
    assert fit(tmp_path, model, world, max_time={"hours": 1}, max_epochs=1)
    [best] = tmp_path.rglob("best.ckpt")
    assert torch.load(best, weights_only=True)["global_step"] == 6


def test_the_last_step_is_measured_and_may_be_the_best(model: Path, world: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, model, world, max_steps=4, max_epochs=-1)
    assert (tmp_path / "grounding" / "step=00000004" / "result.json").is_file()
    lines = (tmp_path / "grounding" / "summary.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [["epoch", "step"], ["0", "0"], ["0", "4"]]
    [best] = tmp_path.rglob("best.ckpt")
    assert torch.load(best, weights_only=True)["global_step"] == 4


def test_a_run_that_is_told_so_is_not_measured_behind_its_last_step(model: Path, world: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, model, world, measure_last=False, max_steps=4, max_epochs=-1)
    assert [path.name for path in (tmp_path / "grounding").glob("*=*")] == ["epoch=000"]


def test_measurements_within_an_epoch_have_rows_and_files_of_their_own(
    model: Path, world: Path, tmp_path: Path
) -> None:
    assert fit(tmp_path, model, world, max_epochs=1, val_check_interval=2)
    folders = sorted(path.name for path in (tmp_path / "grounding").glob("*=*"))
    assert folders == ["epoch=000", "epoch=001", "step=00000002", "step=00000004"]
    [run] = load_runs([tmp_path])
    assert [each.state for each in run.measurements] == ["before", "step 2", "step 4", "epoch 1"]
    assert [each.record.state["step"] for each in run.measurements] == [0, 2, 4, 6]


@pytest.mark.slow
def test_accumulation_that_changes_from_epoch_to_epoch_is_resumed_within_one(
    model: Path, world: Path, tmp_path: Path
) -> None:
    def run(folder: Path, stop: int | None) -> bool:
        changes = GradientAccumulationScheduler({0: 4, 1: 2})
        return fit(folder, model, world, changes, StopAt(stop, signal.SIGTERM))

    assert run(tmp_path / "whole", None)
    # Two steps of the first epoch, three of the second; the last rate is the last of all.
    expected = left_by(tmp_path / "whole")
    assert expected.step == 5
    assert expected.logged["train/learning_rate", 4] == pytest.approx(1e-4)
    for number in (3, 7):
        assert not run(tmp_path / str(number), number)
        assert run(tmp_path / str(number), None)
        assert differences(left_by(tmp_path / str(number)), expected) == [], number


@pytest.mark.slow
def test_stopped_before_the_first_checkpoint_a_run_starts_over(
    model: Path, world: Path, tmp_path: Path, whole: Left
) -> None:
    run = tmp_path / "stopped"
    assert not fit(run, model, world, StopAt(1, signal.SIGTERM, validation=True))
    assert RunFolder(run).files() == []
    assert fit(run, model, world)
    assert differences(left_by(run), whole) == []


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_stop_at_the_same_batch_and_resume_exactly(model: Path, world: Path, tmp_path: Path) -> None:
    assert run_distributed(fit_together, str(tmp_path / "whole"), str(model), str(world), None) == [True, True]
    run = str(tmp_path / "stopped")
    assert run_distributed(fit_together, run, str(model), str(world), 1) == [False, False]
    assert [path.name for path in RunFolder(Path(run)).files()] == ["step=00000002.ckpt"]
    # Now one of them is killed, in the second epoch.
    with pytest.raises(RuntimeError):
        run_distributed(fit_together, run, str(model), str(world), 2, int(signal.SIGKILL))
    assert run_distributed(fit_together, run, str(model), str(world), None) == [True, True]
    assert differences(left_by(Path(run)), left_by(tmp_path / "whole")) == []


def fit_together(run: str, model: str, world: str, stop_at: int | None, signum: int = signal.SIGTERM) -> bool:
    stop = StopAt(stop_at, signum, rank=1)
    return fit(Path(run), Path(model), Path(world), stop, **join_lightning())


@pytest.mark.distributed
def test_ranks_that_would_start_from_different_checkpoints_say_so(tmp_path: Path) -> None:
    [first, second] = run_distributed(choose_differently, str(tmp_path))
    assert first == ""
    assert "rank 1 would start from step=00000007.ckpt, rank 0 from the beginning" in second


def choose_differently(run: str) -> str:
    rank = torch.distributed.get_rank()
    resume = Resume(RunFolder(Path(run)), chosen="step=00000007.ckpt" if rank else None)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **join_lightning())
    trainer.strategy.setup_environment()
    try:
        resume.setup(trainer, L.LightningModule(), "fit")
    except RunFolderError as error:
        return str(error)
    finally:
        resume.teardown(trainer, L.LightningModule(), "fit")
    return ""


class Seen(Callback):
    """Writes the samples of each training batch down, a file for each epoch and process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{trainer.current_epoch}-{os.getpid()}").open("a") as file:
            file.writelines(f"{key}\n" for key in batch.keys)


def seen(folder: Path) -> dict[int, list[str]]:
    """The samples of each epoch."""
    keys: dict[int, list[str]] = {}
    for path in sorted(folder.iterdir()):
        keys.setdefault(int(path.name[0]), []).extend(path.read_text().split())
    return keys


def fit_somewhere(
    run: str, model: str, world: str, stop_at: int | None, options: dict[str, Any], signum: int = signal.SIGTERM
) -> bool:
    join = {} if torch.distributed.get_world_size() == 1 else join_lightning()
    callbacks: list[Callback] = [Seen(Path(run, "seen")), StopAt(stop_at, signum)]
    if accumulated := options.get("accumulated"):
        callbacks.append(GradientAccumulationScheduler(accumulated))
    options = {name: value for name, value in options.items() if name != "accumulated"}
    return fit(Path(run), Path(model), Path(world), *callbacks, **options, **join)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "samples", "steps"),
    [
        # Processes, batch size and number of the last batch of each part; 24 samples are 6 batches of 4.
        ([(2, 4, 1), (1, 4, None)], [24, 24], 2 + 2 + 6),
        ([(1, 4, 2), (2, 4, None)], [20, 24], 3 + 1 + 3),
        ([(2, 4, 0), (1, 8, None)], [24, 24], 6),  # the same steps
        ([(1, 4, 1), (2, 4, 0), (1, 4, None)], [24, 24], 2 + 1 + 2 + 6),
        ([(1, 4, 4), (2, 4, None)], [20, 24], 5 + 3),  # 4 samples are left, which fill no batch
    ],
    ids=str,
)
def test_a_run_goes_on_with_another_number_of_processes_and_sees_no_sample_of_an_epoch_twice(
    parts: list[tuple[int, int, int | None]], samples: list[int], steps: int, model: Path, world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for processes, batch_size, stop_at in parts:
        ended = run_distributed(
            fit_somewhere, str(run), str(model), str(world), stop_at, {"batch_size": batch_size}, world_size=processes
        )
        assert ended == [stop_at is None] * processes
    keys = seen(run / "seen")
    assert [len(keys[epoch]) for epoch in range(2)] == samples
    assert [len(set(keys[epoch])) for epoch in range(2)] == samples
    assert left_by(run).step == steps
    record = RunFolder(run).read()
    assert record is not None
    assert record.finished
    assert len(record.changes) == len(parts) - 1
    for change, (before, after) in zip(record.changes, itertools.pairwise(parts), strict=True):
        assert re.search(rf"Going on with {after[0]} process.* in place of {before[0]} process", change)
    # The schedule has come to its end.
    assert left_by(run).logged["train/learning_rate", steps - 1] == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_another_number_of_processes_goes_on_at_an_epochs_end(model: Path, world: Path, tmp_path: Path) -> None:
    where = (str(tmp_path), str(model), str(world))
    with pytest.raises(RuntimeError):  # killed in the first batch of the second epoch
        run_distributed(fit_somewhere, *where, 3, {}, int(signal.SIGKILL))
    assert RunFolder(tmp_path).files()[0].name == "step=00000003.ckpt"
    shutil.rmtree(tmp_path / "seen")
    assert run_distributed(fit_somewhere, *where, None, {"accumulate_grad_batches": 2}, world_size=1) == [True]
    assert {epoch: len(set(keys)) for epoch, keys in seen(tmp_path / "seen").items()} == {1: 24}
    assert RunFolder(tmp_path).files()[0].name == "step=00000006.ckpt"
    record = RunFolder(tmp_path).read()
    assert record is not None
    assert "from epoch 2 on" in record.changes[0]


@pytest.mark.distributed
@pytest.mark.slow
def test_accumulated_steps_stay_whole_where_another_number_of_processes_goes_on(
    model: Path, world: Path, tmp_path: Path
) -> None:
    where = (str(tmp_path), str(model), str(world))
    options = {"batch_size": 2, "accumulate_grad_batches": 2, "max_steps": 9, "max_epochs": -1, "workers": 1}
    # 2 steps of 12 batches; of 40 - 8 samples, 4 batches of 2 ranks and 2 are left, of 6.
    assert run_distributed(fit_somewhere, *where, 3, options, world_size=1) == [False]
    assert run_distributed(fit_somewhere, *where, None, options) == [True, True]
    keys = seen(tmp_path / "seen")
    assert [len(keys[epoch]) for epoch in range(2)] == [8 + 16, 24]
    assert [len(set(keys[epoch])) for epoch in range(2)] == [24, 24]
    assert left_by(tmp_path).step == 9


@pytest.mark.distributed
@pytest.mark.slow
def test_accumulation_by_epoch_goes_on_with_another_number_of_processes(
    model: Path, world: Path, tmp_path: Path
) -> None:
    where = (str(tmp_path), str(model), str(world))
    options = {"batch_size": 2, "accumulated": {0: 4, 1: 2}}
    # One step of 4 batches; of 24 - 8 samples, 4 batches of 2 ranks would be left, of which 2 end the epoch.
    assert run_distributed(fit_somewhere, *where, 3, options, world_size=1) == [False]
    assert run_distributed(fit_somewhere, *where, None, options) == [True, True]
    keys = seen(tmp_path / "seen")
    assert [len(keys[epoch]) for epoch in range(2)] == [8 + 8, 24]
    left = left_by(tmp_path)
    assert left.step == 1 + 1 + 3
    rates = [left.logged["train/learning_rate", step] for step in range(5)]
    assert rates == pytest.approx([1e-3 * 0.1 ** (step / 4) for step in range(5)], rel=1e-6)
    assert "an epoch has 2 steps in place of 3" in RunFolder(tmp_path).read().changes[0]  # type: ignore[union-attr]


@pytest.mark.distributed
@pytest.mark.slow
def test_warm_up_keeps_its_share_of_an_epoch_on_another_number_of_processes(
    model: Path, world: Path, tmp_path: Path
) -> None:
    where = (str(tmp_path), str(model), str(world))
    assert run_distributed(fit_somewhere, *where, 3, {"warmup_steps": 6}, world_size=1) == [False]
    # 4 of 12 steps, 6 of them warm-up; then 2 of 6 steps, 3 of them warm-up.
    assert run_distributed(fit_somewhere, *where, None, {"warmup_steps": 6}) == [True, True]
    left = left_by(tmp_path)
    rates = [left.logged["train/learning_rate", step] for step in range(left.step)]
    expected = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 3 / 3, 1, 0.1**0.5, 0.1]
    assert rates == pytest.approx([1e-3 * factor for factor in expected], rel=1e-6)


def test_signals_belong_to_others_again_when_training_is_over(model: Path, world: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)]
    assert not fit(tmp_path / "run", model, world, StopAt(1, signal.SIGTERM))
    assert [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)] == before
    assert fit(tmp_path / "run", model, world)
    assert [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)] == before


def test_the_random_numbers_of_a_batch_depend_on_nothing_but_its_place(
    model: Path, world: Path, tmp_path: Path
) -> None:
    class Draws(Callback):
        def __init__(self, waste: int) -> None:
            self.waste = waste
            self.drawn: list[tuple[float, float, float]] = []

        def on_before_backward(self, *args: Any) -> None:
            self.drawn.append((torch.rand(1).item(), random.random(), float(np.random.rand())))
            torch.rand(self.waste)

    few, many = Draws(1), Draws(5)
    fit(tmp_path / "few", model, world, few, max_epochs=1)
    fit(tmp_path / "many", model, world, many, max_epochs=1)
    assert few.drawn == many.drawn
    assert len(set(few.drawn)) == 6


def test_no_time_between_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match="minutes has to be positive; got 0"):
        Resume(minutes=0)
