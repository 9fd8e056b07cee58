from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_xai.training.run_folder import CHECKPOINT_KEY, RunFolder, RunFolderError, RunRecord

SETTINGS = {"model": {"init_args": {"initial_lr": 1e-3}}, "trainer": {"max_epochs": 2}}
HOLDS = """
import sys, time
from pathlib import Path
from lightning_xai.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
time.sleep(600)
"""


def checkpoint(folder: RunFolder, step: int, owner: str) -> Path:
    path = folder.place(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({CHECKPOINT_KEY: {"id": owner}, "weights": torch.zeros(100)}, path)
    return path


def test_a_new_run_is_written_down_and_found_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.read() is None
    folder.lock()
    record = folder.begin(SETTINGS)
    assert RunFolder(tmp_path / "run").read() == record
    RunFolder(tmp_path / "run").check(record, SETTINGS)
    folder.finish(record)
    assert RunFolder(tmp_path / "run").read() == RunRecord(record.id, SETTINGS, finished=True)


def test_other_settings_are_named_one_by_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = folder.begin(SETTINGS)
    other = {"model": {"init_args": {"initial_lr": 1e-4}}, "trainer": {"max_epochs": 2, "precision": "bf16-mixed"}}
    with pytest.raises(RunFolderError) as error:
        folder.check(record, other)
    assert "model.init_args.initial_lr was 0.001, is 0.0001" in str(error.value)
    assert "trainer.precision was None, is bf16-mixed" in str(error.value)
    assert "max_epochs" not in str(error.value)


def test_the_highest_step_counts_whatever_clocks_say(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = folder.begin(SETTINGS)
    for step, age in ((9, 3000), (100_000_000, 2000), (20, 10)):
        path = checkpoint(folder, step, record.id)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert folder.newest(record) == folder.place(100_000_000)


def test_damaged_checkpoints_and_those_of_others_are_passed_over_and_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = folder.begin(SETTINGS)
    for step in (1, 2):
        checkpoint(folder, step, record.id)
    checkpoint(folder, 3, "another")
    cut = checkpoint(folder, 4, record.id)
    cut.write_bytes(cut.read_bytes()[:300])
    torch.save({"weights": torch.zeros(3)}, folder.place(5))
    checkpoint(folder, 6, record.id).rename(folder.pending(6))
    assert folder.newest(record) == folder.place(2)
    assert list(folder.passed_over) == ["step=00000005.ckpt", "step=00000004.ckpt", "step=00000003.ckpt"]
    assert folder.passed_over["step=00000003.ckpt"] == "it belongs to another run"


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = folder.begin(SETTINGS)
    assert folder.newest(record) is None
    folder.place(1).parent.mkdir(exist_ok=True)
    folder.place(1).write_bytes(b"")
    assert folder.newest(record) is None


def test_a_checkpoint_gets_its_name_when_it_is_complete_and_old_ones_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.lock()
    for step in (1, 2, 3):
        checkpoint(folder, step, "run").rename(folder.pending(step))
        assert folder.place(step) not in folder.files()
        folder.commit(step, keep=2)
    assert folder.files() == [folder.place(3), folder.place(2)]


def test_what_lies_beyond_a_runs_step_is_never_taken_for_its_newest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.lock()
    old = folder.begin(SETTINGS)
    for step in (400, 500):
        checkpoint(folder, step, old.id)
    record = folder.begin(SETTINGS)
    for step in (10, 20, 30):
        checkpoint(folder, step, record.id).rename(folder.pending(step))
        folder.commit(step, keep=2)
    assert folder.newest(record) == folder.place(30)
    assert folder.files() == [folder.place(step) for step in (500, 400, 30, 20)]


def test_what_a_killed_run_left_half_written_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 1, "run")
    half = folder.checkpoints / f".{folder.pending(2).name}.partial-0a1b2c3d"
    mine = [folder.checkpoints / name for name in (".step=mine.ckpt.notes", "notes.txt", ".hidden")]
    for path in (folder.pending(2), folder.checkpoints / ".step=00000003.ckpt.partial-0a1b2c3d", half, *mine):
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
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RunFolderError, match=rf"in use by job 77, process {holder.pid} on "):
        RunFolder(tmp_path).lock()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunFolder(tmp_path).lock()


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_to_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written to"):
        RunFolder(tmp_path / where).lock()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"version": 1}', json.dumps({"version": 2, "id": "a", "settings": {}, "finished": False})],
)
def test_a_broken_record_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        RunFolder(tmp_path).read()
