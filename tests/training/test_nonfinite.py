"""A step that is not finite is never taken: it ends the run on all ranks, or is left out and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn.utils import get_total_norm
from training_runs import Recorder, batches_of, task_of, trainer_in

from lightning_xai.training import AtomicCheckpointIO, FiniteSteps, Resume
from lightning_xai.training.checkpoint_file import NonFiniteStateError
from lightning_xai.training.nonfinite import NonFiniteLossError, _largest
from lightning_xai.training.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(lightning|torch)", "ignore::FutureWarning:torch")


class Spoil(Callback):
    """Makes one sample of a batch NaN, on one rank."""

    def __init__(self, *numbers: int, rank: int = 0) -> None:
        self.numbers, self.rank = numbers, rank

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.numbers and trainer.global_rank == self.rank:
            batch.images[2] = torch.nan


class States(Callback):
    """The model, batch statistics included, after each batch, and what was logged there."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture
def resnet(architecture_file: Callable[[str], Path]) -> Path:
    return architecture_file("resnet")


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(resnet: Path, shards: Path, tmp_path: Path) -> None:
    task = task_of(resnet)
    best = ModelCheckpoint(tmp_path / "best", every_n_train_steps=1, save_top_k=-1, save_on_exception=True)
    resume = Resume(RunFolder(tmp_path / "run"), minutes=1e-9)
    trainer = trainer_in(
        tmp_path, Spoil(2), FiniteSteps(), best, resume, plugins=[AtomicCheckpointIO()], limit_val_batches=0
    )
    with pytest.raises(NonFiniteLossError) as error:
        trainer.fit(task, batches_of(task, shards, 4, 4))
    # Batch normalisation passes the NaN of one on to all.
    assert "in step 3 (epoch 0) the loss is nan (rank 0, batch 2, samples k8, k9, k10, k11)" in str(error.value)
    assert f"last finite checkpoint is {tmp_path / 'run' / 'resume' / 'step=00000002.ckpt'}" in str(error.value)
    saved = [*(tmp_path / "best").glob("*.ckpt"), *(tmp_path / "run").rglob("*.ckpt")]
    assert len(saved) > 3
    for path in saved:
        weights = torch.load(path, weights_only=True)["state_dict"]
        # Batch statistics too, although the forward pass had put NaN into them.
        assert all(value.isfinite().all() for value in weights.values()), path


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_left_out_changes_nothing_and_is_counted(
    accumulate: int, resnet: Path, shards: Path, tmp_path: Path
) -> None:
    task, states, recorder, finite = task_of(resnet), States(), Recorder(), FiniteSteps("skip")
    trainer = trainer_in(
        tmp_path, Spoil(2), finite, states, recorder, accumulate_grad_batches=accumulate, limit_val_batches=0
    )
    trainer.fit(task, batches_of(task, shards, 6, 4))
    before, after = (1, 2) if accumulate == 1 else (1, 3)
    assert same(states.states[before], states.states[after])
    assert not same(states.states[after], states.states[after + accumulate])
    assert all(value.isfinite().all() for value in states.states[-1].values())
    assert finite.skipped == [3 if accumulate == 1 else 2]
    assert recorder.logged[-1]["train/skipped_steps"] == 1
    assert trainer.global_step == 6 // accumulate


def test_a_gradient_that_is_not_finite_is_no_step_either(resnet: Path, shards: Path, tmp_path: Path) -> None:
    task = task_of(resnet)
    task.encoder.logit_scale.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
    trainer = trainer_in(tmp_path, FiniteSteps(), limit_val_batches=0)
    with pytest.raises(NonFiniteLossError, match=r"step 1 .*gradient is not finite .*training ends"):
        trainer.fit(task, batches_of(task, shards, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, -torch.inf])
def test_the_largest_gradient_is_the_infinity_norm(dtype: torch.dtype, bad: float | None) -> None:
    gradients = [-3 * torch.ones((), dtype=dtype), torch.randn(7, 3).to(dtype).clamp(-2, 2)]
    if bad is not None:
        gradients[1][4, 1] = bad
    expected = get_total_norm(gradients, torch.inf)
    # A rank's part of a sharded parameter may be empty, or all of its parts.
    largest = _largest([torch.zeros(0, 3, dtype=dtype), *gradients])
    torch.testing.assert_close(largest, expected, rtol=0, atol=0, equal_nan=True, check_dtype=False)
    assert _largest([torch.zeros(0, dtype=dtype)]) == 0


def test_left_out_steps_do_not_hide_weights_that_are_not_finite(resnet: Path, shards: Path, tmp_path: Path) -> None:
    task = task_of(resnet)
    with torch.no_grad():
        task.encoder.logit_scale.fill_(torch.nan)
    trainer = trainer_in(tmp_path, FiniteSteps("skip"), limit_val_batches=0)
    with pytest.raises(NonFiniteLossError, match=r"weights are not finite \(encoder.*logit_scale\)"):
        trainer.fit(task, batches_of(task, shards, 2, 4))


def test_steps_that_are_never_finite_end_the_run(resnet: Path, shards: Path, tmp_path: Path) -> None:
    task, finite = task_of(resnet), FiniteSteps("skip")
    trainer = trainer_in(tmp_path, Spoil(*range(6)), finite, limit_val_batches=0, max_epochs=9)
    with pytest.raises(NonFiniteLossError, match=r"in step 20 .*So were the 19 steps before"):
        trainer.fit(task, batches_of(task, shards, 6, 4))


@pytest.mark.distributed
def test_all_ranks_end_at_the_step_of_one_of_them_and_name_it(
    architecture_file: Callable[[str], Path], shards: Path, tmp_path: Path
) -> None:
    messages = run_distributed(spoil_second_rank, str(architecture_file("vit")), str(shards), str(tmp_path))
    assert messages[0] == messages[1]
    assert "in step 2 (epoch 0) the loss is nan (rank 1, batch 1, samples k6)" in messages[0]


def spoil_second_rank(model: str, shards: str, folder: str) -> str:
    task = task_of(model)
    trainer = trainer_in(Path(folder), Spoil(1, rank=1), FiniteSteps(), limit_val_batches=0, **join_lightning())
    with pytest.raises(NonFiniteLossError) as error:
        trainer.fit(task, batches_of(task, Path(shards), 3, 4))
    return str(error.value)


def test_a_state_that_is_not_finite_replaces_no_file(tmp_path: Path) -> None:
    path, mask = tmp_path / "a.ckpt", torch.full((2,), -torch.inf)
    good = {"state_dict": {"weight": torch.ones(2), "mask": mask}, "optimizer_states": [{"state": {}}]}
    AtomicCheckpointIO().save_checkpoint(good, path)
    for bad in (torch.nan, torch.inf):
        averages = {"state": {0: {"exp_avg": torch.tensor([0.0, bad])}}}
        for spoiled in ({"state_dict": {"weight": torch.tensor([bad])}}, {"optimizer_states": [averages]}):
            with pytest.raises(NonFiniteStateError, match=r"not finite, so .*a\.ckpt is not written"):
                AtomicCheckpointIO().save_checkpoint(good | spoiled, path)
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["weight"], torch.ones(2))
