"""The folder of a run: its record, its lock, and the checkpoints that it takes or skips."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_xai.training.run_folder import CHECKPOINT_KEY, RunFolder, RunFolderError

SETTINGS = {"model": {"init_args": {"initial_lr": 1e-3}}, "trainer": {"max_epochs": 2}}
HOLDS = """
import os, sys, time
from pathlib import Path
from lightning_xai.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
if child := os.fork():
    print(child, flush=True)
time.sleep(600)
"""


def checkpoint(folder: RunFolder, step: int, owner: str) -> Path:
    path = folder.place(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({CHECKPOINT_KEY: {"id": owner}, "weights": torch.zeros(100)}, path)
    return path


def test_a_run_is_recorded_and_resumed_only_with_its_settings(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.read() is None
    folder.lock()
    record = folder.begin(SETTINGS)
    assert RunFolder(tmp_path / "run").read() == record
    folder.check(record, SETTINGS)
    other = {"model": {"init_args": {"initial_lr": 1e-4}}, "trainer": {"max_epochs": 2, "precision": "bf16-mixed"}}
    with pytest.raises(RunFolderError) as error:
        folder.check(record, other)
    assert "model.init_args.initial_lr was 0.001 and is 0.0001" in str(error.value)
    assert "trainer.precision was None and is 'bf16-mixed'" in str(error.value)
    assert "max_epochs" not in str(error.value)
    folder.finish(record)
    finished = RunFolder(tmp_path / "run").read()
    assert finished is not None
    assert (finished.id, finished.settings, finished.finished) == (record.id, SETTINGS, True)


def test_the_highest_step_counts_whatever_clocks_say(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = folder.begin(SETTINGS)
    for step, age in ((9, 3000), (100_000_000, 2000), (20, 10)):
        path = checkpoint(folder, step, record.id)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert folder.newest(record) == folder.place(100_000_000)


def test_corrupt_and_foreign_checkpoints_are_skipped_and_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = folder.begin(SETTINGS)
    assert folder.newest(record) is None
    for step in (1, 2):
        checkpoint(folder, step, record.id)
    checkpoint(folder, 3, "another")
    cut = checkpoint(folder, 4, record.id)
    cut.write_bytes(cut.read_bytes()[:300])
    torch.save({"weights": torch.zeros(3)}, folder.place(5))
    checkpoint(folder, 6, record.id).rename(folder.pending(6))
    folder.place(7).write_bytes(b"")
    assert folder.newest(record) == folder.place(2)
    assert list(folder.skipped) == [f"step=0000000{step}.ckpt" for step in (7, 5, 4, 3)]
    assert folder.skipped["step=00000003.ckpt"] == "it belongs to another run"


def test_old_checkpoints_are_removed_and_those_of_later_steps_never_taken(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.lock()
    old = folder.begin(SETTINGS)
    for step in (400, 500):
        checkpoint(folder, step, old.id)
    record = folder.begin(SETTINGS)
    for step in (10, 20, 30):
        checkpoint(folder, step, record.id).rename(folder.pending(step))
        assert folder.place(step) not in folder.files()
        folder.commit(step, keep=2)
    assert folder.newest(record) == folder.place(30)
    assert folder.files() == [folder.place(step) for step in (500, 400, 30, 20)]


def test_unfinished_files_of_a_killed_run_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 1, "run")
    half = folder.checkpoints / f".{folder.pending(2).stem}.123.pending"
    mine = [folder.checkpoints / name for name in (".step=mine.ckpt.notes", "notes.txt", ".hidden")]
    for path in (folder.pending(2), half, *mine):
        path.write_text("")
    folder.lock()
    left = {path.name for path in folder.checkpoints.iterdir()}
    assert left == {"step=00000001.ckpt", *(path.name for path in mine)}


def test_a_folder_in_use_is_refused_until_its_user_is_dead_even_if_killed(tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_JOB_ID": "77"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    with pytest.raises(RunFolderError, match=rf"in use by job 77, process {holder.pid} on "):
        RunFolder(tmp_path).lock()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    try:
        RunFolder(tmp_path).lock()  # although a data worker, forked from the killed process, still lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("lightning_xai.training.run_folder.FileLock.acquire", refuse)
    with pytest.warns(UserWarning, match="make sure that no second job uses it"):
        RunFolder(tmp_path).lock()


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_to_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written to"):
        RunFolder(tmp_path / where).lock()


@pytest.mark.parametrize("content", ["{", '{"version": 1}', '{"version": 2, "id": "a", "settings": {}, "finished": 0}'])
def test_a_broken_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        RunFolder(tmp_path).read()
