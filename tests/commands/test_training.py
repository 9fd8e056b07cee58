"""`fit`, stopped and started again: the same weights, numbers and tables as if nothing had happened."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import config_of, differences, finish, left_by, start, stop_at_random, time_of

from lightning_xai.training.preflight import check_allocation
from lightning_xai.training.run_folder import RunFolder

ALL = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, architecture_file: Callable[[str], Path], shapes: Path) -> Path:
    return config_of(tmp_path_factory.mktemp("training"), architecture_file("vit"), shapes)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(["fit", f"--config={config}", f"--run={folder / 'run'}"], folder / "log") == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_runs_stopped_at_20_random_moments_end_as_one_that_never_was(
    workers: int, config: Path, tmp_path: Path
) -> None:
    options = [f"--config={config}", f"--data.init_args.num_workers={workers}", "--save_every_minutes=0.001"]
    whole = tmp_path / "whole"
    # On any machine, most moments of a run are as likely as others: those after four fifths of its time are rarer.
    seconds = 0.8 * time_of(["fit", *options, f"--run={whole}"], tmp_path / "whole.log", whole)
    expected, rng, stops, runs = left_by(whole), random.Random(workers), 0, 0
    while stops < 20:
        assert runs < 60, "most runs end before they can be stopped"
        run, log = tmp_path / f"run{runs}", tmp_path / f"log{runs}"
        runs += 1
        arguments = ["fit", *options, f"--run={run}"]
        while stops < 20 and (stopped := stop_at_random(arguments, log, run, rng, ALL, seconds)):
            stops += 1
            # A signal that comes before training has begun to listen ends the process in the usual way; one that comes
            # when nothing is left to do changes nothing.
            record = RunFolder(run).read()
            if stopped.code == 0 and record is not None and record.finished:
                break
            usual = 1 if stopped.signum == signal.SIGINT else -stopped.signum
            assert stopped.code in (usual, 128 + stopped.signum), (stopped, log.read_text()[-3000:])
        assert finish(arguments, log) == 0, log.read_text()[-3000:]
        assert differences(left_by(run), expected) == []


def refusal(log: Path, *arguments: str) -> str:
    """What a command that has to fail says, in one piece."""
    log.unlink(missing_ok=True)
    assert finish(arguments, log) == 1, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text
    return " ".join(text.split())


@pytest.fixture(scope="module")
def stopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first epoch's checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    run, log = folder / "run", folder / "log"
    process = start(["fit", f"--config={config}", f"--run={run}", "--save_every_minutes=0.0001"], log)
    while not (run / "resume").is_dir() or not list((run / "resume").glob("step=*")):
        assert process.exitcode is None, log.read_text()[-3000:]
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "start the same command again to go on" in log.read_text()
    return run


def test_a_finished_run_says_so_and_changes_nothing(config: Path, whole: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != "lock"}
    assert finish(["fit", f"--config={config}", f"--run={whole}"], tmp_path / "log") == 0
    assert "is finished" in (tmp_path / "log").read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_other_verbs_with_a_runs_config_leave_the_run_as_it_is(whole: Path, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", f"--run={tmp_path / 'run'}"
    shutil.copytree(whole, run)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for verb in ("test", "validate", "test"):
        arguments = [verb, f"--config={run / 'config.yaml'}", moved]
        assert finish(arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()[-3000:]
    after = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    written = {path.parts[:2] for path in after.keys() - before.keys()}
    assert written == {("test", "version_0"), ("test", "version_1"), ("validate", "version_0")}
    assert (run / "test/version_1/config.yaml").is_file()


def test_a_run_goes_on_only_with_the_settings_it_was_started_with(config: Path, stopped: Path, tmp_path: Path) -> None:
    told = refusal(
        tmp_path / "log", "fit", f"--config={config}", f"--run={stopped}", "--model.init_args.initial_lr=0.5",
        "--trainer.max_epochs=7", "--trainer.log_every_n_steps=3",
    )  # fmt: skip
    assert "model.init_args.initial_lr was 0.001, is 0.5" in told
    assert "trainer.max_epochs was 2, is 7" in told
    assert "log_every_n_steps" not in told  # changes what is shown, no number


def test_a_run_goes_on_only_with_the_number_of_processes_it_was_started_with(
    config: Path, stopped: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    newest = RunFolder(copy).files()[0]
    content = torch.load(newest, weights_only=True)
    content["ShardDataModule"]["plan"]["world"] = 4
    torch.save(content, newest)
    told = refusal(tmp_path / "log", "fit", f"--config={config}", f"--run={copy}")
    assert "world was 4" in told
    assert "--model.init_args.model=" in told


def test_a_folder_that_another_job_uses_is_refused(config: Path, stopped: Path, tmp_path: Path) -> None:
    holder = RunFolder(stopped)
    holder.lock()
    told = refusal(tmp_path / "log", "fit", f"--config={config}", f"--run={stopped}")
    holder.release()
    assert f"{stopped} is in use by process {os.getpid()} on " in told


def test_a_folder_that_cannot_be_written_to_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = refusal(tmp_path / "log", "fit", f"--config={config}", f"--run={tmp_path / 'file' / 'run'}")
    assert "cannot be written to" in told


def test_checkpoints_of_another_run_are_passed_over_and_named(
    config: Path, stopped: Path, whole: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(stopped, run)
    newest = RunFolder(run).files()[0]
    stranger = shutil.copy(RunFolder(whole).files()[0], RunFolder(run).place(99))
    broken = RunFolder(run).place(50)
    broken.write_bytes(newest.read_bytes()[:1000])
    assert finish(["fit", f"--config={config}", f"--run={run}"], log) == 0
    told = log.read_text()
    assert f"Passing over {Path(stranger).name}" in told
    assert "it belongs to another run" in told
    assert f"Passing over {broken.name}" in told
    assert f"from {newest}" in told
    assert differences(left_by(run)._replace(step=0), left_by(whole)._replace(step=0)) == []


def test_a_run_whose_checkpoints_cannot_be_read_does_not_begin_anew(
    config: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    files = RunFolder(run).files()
    for path in files:
        path.write_bytes(path.read_bytes()[:1000])
    before = (run / "run.json").read_bytes()
    told = refusal(tmp_path / "log", "fit", f"--config={config}", f"--run={run}")
    assert f"none of the run's checkpoints in {run / 'resume'} can be read ({files[0].name}" in told
    assert (run / "run.json").read_bytes() == before
    for path in files:
        shutil.copy(stopped / "resume" / path.name, path)  # what the refused start has left can go on
    assert finish(["fit", f"--config={config}", f"--run={run}"], tmp_path / "log") == 0


def test_a_stale_checkpoint_that_lightning_would_take_inside_a_job_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, tasks=1, nodes=1)
    root = tmp_path / "runs"
    root.mkdir()
    (root / "hpc_ckpt_3.ckpt").write_text("")
    for verb, option in (("fit", f"--run={root}"), ("test", f"--trainer.default_root_dir={root}")):
        options = (f"--config={config}", option)
        assert "hpc_ckpt_3.ckpt is a checkpoint of an earlier job" in refusal(tmp_path / "log", verb, *options)


@pytest.mark.parametrize(
    ("job", "options", "expected"),
    [
        ({"tasks": 4, "nodes": 2}, [], "trainer.devices=1, but Slurm has started 2 task(s) on each node"),
        ({"tasks": 2, "nodes": 2}, [], "trainer.num_nodes=1, but the job has 2 node(s)"),
        ({"tasks": 3, "nodes": 2, "each": 2}, [], "3 tasks on 2 nodes with 2 a node"),
        ({"tasks": 1, "nodes": 1, "address": "no-such-host.invalid"}, [], "MASTER_ADDR=no-such-host.invalid cannot be"),
        (
            {"tasks": 1, "nodes": 1, "gpus": 4},
            ["--trainer.accelerator=gpu"],
            "4 GPU(s) and started 1 task(s) on it, and every task takes one: submit with --ntasks-per-node=4",
        ),
    ],
)
def test_devices_that_do_not_match_the_allocation_are_refused_before_anything_is_loaded(
    job: dict[str, Any],
    options: list[str],
    expected: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_job(monkeypatch, **job)
    told = refusal(tmp_path / "log", "fit", f"--config={config}", "--trainer.devices=1", *options)
    assert expected in told


@pytest.mark.parametrize(("gpus", "accelerator"), [(None, "gpu"), (0, "gpu"), (2, "gpu"), (4, "cpu")])
def test_devices_that_match_the_allocation_are_accepted(
    gpus: int | None, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, tasks=4, nodes=2, gpus=gpus)
    for devices in (2, "2", "auto", [0, 1]):
        check_allocation(devices, 2, accelerator)
    with pytest.raises(ValueError, match=r"trainer\.devices=3, but Slurm has started 2"):  # so they were looked at
        check_allocation(3, 2, accelerator)


def in_job(
    monkeypatch: pytest.MonkeyPatch,
    *,
    tasks: int,
    nodes: int,
    each: int | None = None,
    address: str = "",
    gpus: int | None = None,
) -> None:
    """Make the environment that of one of Slurm's tasks."""
    variables = {
        "JOB_ID": 7, "JOB_NAME": "test", "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NTASKS": tasks, "NNODES": nodes,
        "NTASKS_PER_NODE": each or tasks // nodes,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    if gpus is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(gpus))
    if address:
        monkeypatch.setenv("MASTER_ADDR", address)


def test_inside_a_job_the_job_is_the_run(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch, tasks=1, nodes=1)
    root = tmp_path / "runs"
    assert (
        finish(
            ["fit", f"--config={config}", f"--trainer.default_root_dir={root}", "--trainer.max_epochs=1"],
            tmp_path / "log",
        )
        == 0
    )
    assert [path.name for path in root.iterdir()] == ["slurm-7"]
    saved = root / "slurm-7/config.yaml"
    before = saved.read_bytes()
    assert finish(["validate", f"--config={saved}"], tmp_path / "log") == 0
    assert (saved.read_bytes(), (root / "slurm-7/validate/version_0").is_dir()) == (before, True)
    assert {"run.json", "resume", "grounding", "config.yaml", "checkpoints"} <= {
        path.name for path in (root / "slurm-7").iterdir()
    }


def test_what_a_run_will_do_is_said_before_it_begins(config: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ["--trainer.max_epochs=1", "--trainer.accumulate_grad_batches=4"]
    assert finish(["fit", f"--config={config}", f"--run={tmp_path / 'run'}", *options], log) == 0
    told = log.read_text()
    assert "batch: 16 on each device, 16 in all" in told
    assert "4 batches (64 samples) make a step" in told
    assert "steps: 2 an epoch, 1 epochs, 2 in all" in told


def test_too_few_samples_for_a_batch_are_refused_before_the_first_validation(config: Path, tmp_path: Path) -> None:
    told = refusal(
        tmp_path / "log", "fit", f"--config={config}", f"--run={tmp_path / 'run'}", "--data.init_args.batch_size=97"
    )
    assert "96 samples do not fill one batch of 97" in told
    assert "val:" not in told


def test_a_dry_run_leaves_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    options = [f"--config={config}", f"--trainer.default_root_dir={root}", "--trainer.fast_dev_run=true"]
    log = tmp_path / "log"
    assert finish(["fit", *options], log) == 0, log.read_text()[-3000:]
    assert not list(root.glob("**/*.ckpt"))
    assert not list(root.glob("**/run.json"))


def test_a_run_without_a_checkpoint_begins_anew_with_any_settings(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    RunFolder(run).lock()
    RunFolder(run).begin({"model": "one that did not fit into memory"})
    assert finish(["fit", f"--config={config}", f"--run={run}", "--trainer.max_epochs=1"], log) == 0
    assert "was stopped before its first checkpoint; it begins anew" in log.read_text()


def test_a_table_of_csv_keeps_the_rows_from_before_a_stop(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ["fit", f"--config={config}", f"--run={run}", "--save_every_minutes=0.0001"]
    arguments.append("--trainer.logger=lightning.pytorch.loggers.CSVLogger")
    arguments.append("--trainer.logger.save_dir=.")
    process = start(arguments, log)
    while not (run / "resume").is_dir() or not list((run / "resume").glob("step=*")):
        assert process.exitcode is None, log.read_text()[-3000:]
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert finish(arguments, log) == 0
    steps = [set(), set()]  # type: list[set[str]]
    for rows, name in zip(steps, ("metrics-1.csv", "metrics.csv"), strict=True):
        with (run / name).open(newline="") as file:
            rows |= {row["step"] for row in csv.DictReader(file) if row["train/loss"]}
    assert steps[0]
    assert steps[0] | steps[1] == {str(step) for step in range(12)}
