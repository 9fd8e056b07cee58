"""A process that fails alone: the others end with an error, too, and none waits for ever."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback
from quiet_trainer import quiet_trainer
from training_runs import task_of

from lightning_xai.data import ShardDataModule, write_shards
from lightning_xai.data.shapes import read_shapes
from lightning_xai.training import GroundingCallback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:torch"),
]

PATIENCE = 5  # seconds that a process waits for another one
FAILING = 1


class KilledWorker(Callback):
    """One process loses its data workers, as to a machine that is short of memory."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_rank == FAILING:
            for worker in multiprocessing.active_children():
                worker.kill()


def fail_on_one_process(config: str, shards: str, out: str, verb: str, cause: str, stays: bool) -> str:
    """The error that this process ends with, by itself. One that stays keeps its connections until the others ended."""
    callbacks: list[Callback] = [GroundingCallback(examples=0, before_training=False)]
    options: dict[str, Any] = {"num_workers": 0}
    if cause == "killed worker":
        callbacks, options = [*callbacks, KilledWorker()], {"num_workers": 1, "max_fault_fraction": 1.0}
    trainer = quiet_trainer(Path(out), *callbacks, inference_mode=False, num_sanity_val_steps=0, **join_lightning())
    data = ShardDataModule(train=Path(shards), val=Path(shards), batch_size=1, **options)
    with pytest.raises(Exception) as error:  # noqa: PT011 - which one is what the test asks
        getattr(trainer, verb)(task_of(config), data)
    Path(out, f"ended-{dist.get_rank()}").touch()
    while stays and len(list(Path(out).glob("ended-*"))) < dist.get_world_size():
        time.sleep(0.1)
    return repr(error.value)


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of which the second half, the part of the second of two processes in an evaluation, is broken."""
    folder = tmp_path_factory.mktemp("torn") / "shards"
    samples = [
        replace(sample, image=sample.image[:-60]) if number in range(8, 14) else sample
        for number, sample in enumerate(read_shapes("val", 16))
    ]
    write_shards(samples, folder, name="torn", progress=False)
    return folder


@pytest.mark.parametrize(
    ("verb", "cause", "expected"),
    [
        ("validate", "broken records", "TooManyBrokenRecordsError"),
        ("fit", "killed worker", "RuntimeError.*DataLoader worker"),
    ],
)
def test_a_process_that_fails_and_does_not_end_is_given_up_after_the_timeout(
    architecture_file: Callable[[str], Path], torn: Path, tmp_path: Path, verb: str, cause: str, expected: str
) -> None:
    where = (str(architecture_file("vit")), str(torn), str(tmp_path))
    errors = run_distributed(
        fail_on_one_process, *where, verb, cause, True, collective_timeout=PATIENCE, timeout=20 * PATIENCE
    )
    assert [bool(re.match(expected, error)) for error in errors] == [rank == FAILING for rank in range(2)]
    # Where two operations wait, gloo names the timeout in one of them only; the other's connection is closed by it.
    assert re.search(f"Timed out waiting {1000 * PATIENCE}ms|Application timeout caused pair closure", errors[0])


def test_a_process_that_fails_and_ends_is_noticed_without_waiting(
    architecture_file: Callable[[str], Path], torn: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(torn), str(tmp_path))
    first, second = run_distributed(
        fail_on_one_process, *where, "validate", "broken records", False, collective_timeout=1000, timeout=100
    )
    assert second.startswith("TooManyBrokenRecordsError")
    assert "Connection" in first
