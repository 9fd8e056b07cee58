"""Checkpoint files that are complete or absent, and never unpickled."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import join_lightning, run_distributed
from training_runs import batches_of, task_of

from lightning_xai.training import AtomicCheckpointIO
from lightning_xai.training.checkpoint_file import CheckpointWriteError, damage
from lightning_xai.training.run_trainer import RunTrainer

STATE: dict[str, Any] = {"weights": torch.arange(1000.0), "step": 3}


def written(path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    return path


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = written(tmp_path / "new folder" / "a.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert [one.name for one in path.parent.iterdir()] == ["a.ckpt"]
    assert damage(path) == ""


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt")
    before = path.read_bytes()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=write_with_little_room, args=(str(path), results))
    process.start()
    message = results.get(timeout=120)
    process.join()
    assert f"checkpoint {path} could not be written" in message
    assert "earlier checkpoints are untouched" in message
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["a.ckpt"]


def write_with_little_room(path: str, results: multiprocessing.Queue[str]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
    except CheckpointWriteError as error:
        results.put(str(error))
    else:
        results.put("nothing was raised")


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="fix the permissions"):
        written(tmp_path / "file" / "a.ckpt")


def test_damage_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(STATE["weights"][500:510].numpy().tobytes())] ^= 1
    for corrupt in (content[:-50], flipped, b"", b"weights" * 1000):
        path.write_bytes(corrupt)
        assert damage(path) != ""


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state": Hostile(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be read"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::UserWarning:(lightning|torch)", "ignore::FutureWarning:torch")
def test_what_rank_0_could_not_save_ends_every_rank_at_once(
    architecture_file: Callable[[str], Path], shards: Path, tmp_path: Path
) -> None:
    where = (str(architecture_file("vit")), str(shards), str(tmp_path))
    ranks = run_distributed(save_in_vain, *where, collective_timeout=1000, timeout=100)
    for first, second in zip(*ranks, strict=True):
        assert second == f"rank 0 could not save: {first}"
    assert "taken.ckpt could not be written" in ranks[0][0]
    assert "is not finite, so " in ranks[0][1]


def save_in_vain(model: str, shards: str, folder: str) -> list[str]:
    """The messages of a checkpoint in whose place a folder lies, and of one that is not finite."""
    task = task_of(model)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = RunTrainer(
        accelerator="cpu", max_steps=1, plugins=[AtomicCheckpointIO()], enable_checkpointing=False,
        limit_val_batches=0, **options, **join_lightning(),
    )  # fmt: skip
    trainer.fit(task, batches_of(task, Path(shards), 2, 4))
    taken = Path(folder) / "taken.ckpt"
    (taken / "file").mkdir(parents=True, exist_ok=True)
    messages = []
    for path in (taken, Path(folder) / "spoiled.ckpt"):
        with pytest.raises(CheckpointWriteError) as error:
            trainer.save_checkpoint(path)
        messages.append(str(error.value))
        with torch.no_grad():
            next(task.parameters()).fill_(torch.nan)
    dist.barrier()
    return messages
