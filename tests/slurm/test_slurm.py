"""The scripts of slurm/ on a real Slurm of two nodes: requeued, cancelled and killed jobs, and their results."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # has none
from slurm_jobs import ROOT, Job, call, environment, why_not
from stopped_runs import differences, left_by

from lightning_xai.data.shapes import prepare_shapes
from lightning_xai.data.shards import Manifest
from lightning_xai.results.table import read_result, score_table

WHY_NOT = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

TRAIN, VAL, EPOCHS, BATCH = 256, 48, 2, 8
STEPS = EPOCHS * TRAIN // (2 * BATCH)
SAVE_SOON = "--save_every_minutes=0.05"
TWO_NODES = ("--nodes=2", "--time=10")

Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def submit(place: Path) -> Iterator[Submit]:
    """Submits a script of slurm/ for nodes of one core and no GPU."""
    jobs: list[Job] = []

    def submitted(
        script: str, *arguments: str, options: tuple[str, ...] = (), run: Path | None = None, folder: Path = ROOT
    ) -> Job:
        small = ("--gpus-per-node=0", "--cpus-per-task=1", f"--output={place}/%x-%A.out")
        done = subprocess.run(
            ["sbatch", "--parsable", *small, *options, f"slurm/{script}.sbatch", *arguments],
            cwd=folder,
            env=environment(**({} if run is None else {"RUN": str(run)})),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        jobs.append(Job(number, place / f"lightning_xai_{script}-{number}.out"))
        return jobs[-1]

    yield submitted
    if jobs:
        call("scancel", *(job.id for job in jobs))  # those of a failed test


@pytest.fixture(scope="module")
def world(submit: Submit, place: Path) -> Path:
    """Shards that a job has prepared."""
    out = place / "shapes"
    job = submit("prepare", "shapes", f"--out={out}", f"--train={TRAIN}", f"--val={VAL}")
    assert job.wait() == "COMPLETED", job.text()
    return out


@pytest.fixture(scope="module")
def config(world: Path, place: Path) -> Path:
    """The demo with few samples, all read by the ranks themselves, and a minute of training."""
    demo: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    demo["model"]["init_args"]["warmup_steps"] = 0  # some of these trainings are one step long
    demo["data"]["init_args"] |= {
        "root": str(world), "train_samples": TRAIN, "val_samples": VAL, "batch_size": BATCH, "eval_batch_size": 24,
        "num_workers": 1,
    }  # fmt: skip
    demo["trainer"] |= {
        "max_epochs": EPOCHS, "default_root_dir": str(place / "runs"), "enable_progress_bar": False,
        "log_every_n_steps": 1,
    }  # fmt: skip
    # Too long for the time limit below.
    demo["trainer"]["callbacks"].append({"class_path": "slow_steps.SlowSteps", "init_args": {"seconds": 1.9}})
    path = place / "config.yaml"
    path.write_text(json.dumps(demo))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def whole(submit: Submit, config: Path, place: Path) -> tuple[Job, Path]:
    """A run over two nodes that nothing has disturbed, and its folder."""
    job = submit("fit", str(config), options=TWO_NODES)
    assert job.wait() == "COMPLETED", job.text()
    return job, place / "runs" / f"slurm-{job.id}"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in one process, outside of any job."""
    command = [sys.executable, "-m", "lightning_xai", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def is_training(job: Job, run: Path) -> None:
    """Wait until a run has saved its first checkpoint; with `SAVE_SOON` that is after a few of its first batches."""
    job.until(lambda: any(run.glob("resume/step=*.ckpt")), "save a checkpoint")


def ended_completely(job: Job) -> None:
    job.until(lambda: not job.processes(), "leave no process behind", timeout=40)


# --- training ---


def test_a_job_prepares_the_same_shards_as_any_other_process(world: Path, tmp_path: Path) -> None:
    prepare_shapes(tmp_path / "shapes", TRAIN, VAL)
    for split in ("train", "val"):
        assert Manifest.load(world / split).fingerprint == Manifest.load(tmp_path / "shapes" / split).fingerprint


def test_two_nodes_take_the_steps_of_one_process_with_the_joint_batch_and_measure_the_same_pairs(
    whole: tuple[Job, Path], config: Path, tmp_path: Path
) -> None:
    job, run = whole
    assert job.show("ExitCode") == "0:0"
    assert "2 node(s) with 1 task(s) each" in job.text()
    assert "Grounding per epoch" in job.text()
    assert left_by(run).step == STEPS
    # What shards a rank reads differs, and so do the weights after the first step. Before it, nothing may.
    python(
        "fit", f"--config={config}", f"--run={tmp_path / 'run'}", "--trainer.max_epochs=1",
        f"--data.init_args.batch_size={2 * BATCH}", "--trainer.limit_train_batches=1",
    )  # fmt: skip
    ours, alone = (
        next(csv.DictReader((folder / "grounding" / "summary.csv").open())) for folder in (run, tmp_path / "run")
    )
    assert ours["targets"] == alone["targets"] != "0"
    for name in ("gamma_mean", "rho"):
        # Batches of another size go through other matrix products, which round otherwise: float32 has 7 digits.
        assert float(ours[name]) == pytest.approx(float(alone[name]), rel=1e-4)


def test_a_job_whose_time_runs_out_is_requeued_and_ends_with_the_weights_of_one_that_was_never_stopped(
    whole: tuple[Job, Path], submit: Submit, config: Path, place: Path
) -> None:
    # Slurm looks at the clock every 30 seconds and rounds down: the signal comes 50 to 80 seconds before the end.
    job = submit("fit", str(config), options=("--nodes=2", "--time=2", "--signal=SIGUSR1@50"))
    job.start_again("TimeLimit=10")
    assert job.wait() == "COMPLETED", job.text()
    assert job.restarts == 1
    assert re.search(r"stopped by SIGUSR1 after step \d+; the job is back in the queue", job.text())
    assert f"(restart 1) on {job.show('NodeList')}" in job.text()
    run = place / "runs" / f"slurm-{job.id}"
    assert re.search(rf"Resuming the run in {run} from {run}/resume/step=\d+\.ckpt", job.text())
    assert differences(left_by(run), left_by(whole[1])) == []


def test_a_cancelled_job_ends_with_a_message_and_another_one_finishes_its_run(
    submit: Submit, config: Path, place: Path
) -> None:
    short = (str(config), "--trainer.max_epochs=1")
    job = submit("fit", *short, SAVE_SOON, options=TWO_NODES)
    run = place / "runs" / f"slurm-{job.id}"
    is_training(job, run)
    call("scancel", job.id)
    assert job.wait(timeout=60) == "CANCELLED"
    ended_completely(job)
    stop = re.search(r"stopped by SIGTERM after step (\d+)", job.text())
    assert stop is not None, job.text()
    other = submit("fit", *short, options=TWO_NODES, run=run)
    assert other.wait() == "COMPLETED", other.text()
    assert f"from {run}/resume/step={int(stop.group(1)):08d}.ckpt" in other.text()
    assert left_by(run).step == STEPS // EPOCHS
    assert "epoch 1" in other.text()


def test_a_killed_rank_takes_the_whole_job_down_at_once(submit: Submit, config: Path, place: Path) -> None:
    job = submit("fit", str(config), SAVE_SOON, options=TWO_NODES)
    is_training(job, place / "runs" / f"slurm-{job.id}")
    job.kill(rank=1)
    assert job.wait(timeout=60) == "FAILED"
    assert job.show("ExitCode") != "0:0"
    assert re.search(r"srun: error: n\d: task 1: Killed", job.text()), job.text()
    ended_completely(job)


# --- other ways to start ---


def short(config: Path, place: Path, name: str) -> list[str]:
    """Options of a training of two nodes that is over after two steps."""
    return [
        f"--config={config}", f"--run={place / name}", "--trainer.num_nodes=2", "--trainer.devices=1",
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
    ]  # fmt: skip


def test_srun_in_an_interactive_allocation_trains_together_and_python_alone_says_what_is_missing(
    config: Path, place: Path
) -> None:
    command = [sys.executable, "-m", "lightning_xai", "fit", *short(config, place, "interactive")]
    allocation = ("salloc", "--nodes=2", "--time=10")  # under the name `interactive`
    together = call(*allocation, "srun", *command, "--collective_timeout=60")
    assert re.search(r"parameters in \S+ on 2 x CPU \(2 nodes\)", together), together
    assert together.count("Grounding per epoch, inputs") == 1  # one rank prints it
    assert left_by(place / "interactive").step == 2
    alone = subprocess.run(
        [*allocation, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert alone.returncode != 0
    assert "Slurm has allocated 2 tasks on 2 node(s), but this process was started without srun" in alone.stderr


def test_a_job_that_exports_nothing_trains_in_the_environment_that_its_script_activates(
    submit: Submit, config: Path, place: Path
) -> None:
    folder = place / "repository"
    folder.mkdir()
    for name in ("slurm", "configs", "lightning_xai", "tests/slurm/slow_steps.py"):
        (folder / Path(name).name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    _, *options = short(config, place, "exports-nothing")
    job = submit("fit", str(config), *options, options=(*TWO_NODES, "--export=NONE"), folder=folder)
    assert job.wait() == "COMPLETED", job.text()
    assert left_by(place / "exports-nothing").step == 2


# --- evaluation ---


def test_an_evaluation_that_was_requeued_has_the_results_of_one_process(
    whole: tuple[Job, Path], world: Path, submit: Submit, place: Path
) -> None:
    evaluation: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "eval_demo.yaml").read_text())
    evaluation["model"]["init_args"] |= {
        "model": str(whole[1] / "checkpoints" / "last.ckpt"), "seeds": 1,
        "examples": 0, "examples_per_class": 0, "failures": 0,
        "methods": {"grad_cam": {}, "rise": {"image_masks": 32, "text_masks": 16}},
    }  # fmt: skip
    evaluation["data"]["init_args"] |= {
        "root": str(world), "train_samples": TRAIN, "val_samples": VAL, "eval_batch_size": 2,
    }  # fmt: skip
    evaluation["trainer"] |= {"limit_test_batches": 1.0, "default_root_dir": str(place), "enable_progress_bar": False}
    path = place / "evaluation.yaml"
    path.write_text(json.dumps(evaluation))
    here, there = place / "evaluated" / "here", place / "evaluated" / "there"
    job = submit("test", str(path), f"--model.init_args.out={there}", options=TWO_NODES)
    job.until(lambda: any(path.stat().st_size for path in there.rglob("*.jsonl")), "evaluate anything")
    call("scancel", "--batch", "--signal=USR1", job.id)
    job.start_again()
    python("test", f"--config={path}", f"--model.init_args.out={here}")
    assert job.wait() == "COMPLETED", job.text()
    assert "SIGUSR1: the time is up; requeueing job" in job.text()
    assert re.search(r"[1-9]\d* items are there already", job.text())
    (record, ours), (_, alone) = read_result(there), read_result(here)
    assert record.methods.keys() == {"grad_cam", "rise"}
    assert ours.values.drop(columns="value").equals(alone.values.drop(columns="value"))
    found, expected = (score_table(table.values, record.scores.values())["value"].tolist() for table in (ours, alone))
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


# --- ROAR+ ---


def test_an_array_of_trials_has_the_result_of_one_command(whole: tuple[Job, Path], world: Path, place: Path) -> None:
    options = [
        f"--model.name={whole[1] / 'checkpoints' / 'last.ckpt'}",
        f"--data={world / 'val'}",
        '--methods={"grad_cam": {}}',
        "--baselines=false",
        "--seeds=[0]",
        *("--training.epochs=1", "--training.batch_size=8", "--training.val_group_size=8"),
    ]
    here, there = place / "roar" / "here", place / "roar" / "there"
    submitted = call(
        *("slurm/roar.sh", "--gpus-per-node=0", "--cpus-per-task=1", "--time=5", f"--output={place}/%x-%A.out"),
        *("configs/roar_demo.yaml", *options, f"--out={there}"),
    )
    jobs = re.fullmatch(
        r"3 trials, to do: 0,1,2\nexplain: job (\d+)\nretrain: job array (\d+)\ngather: job (\d+)\n", submitted
    )
    assert jobs is not None, submitted
    gather = Job(jobs.group(3), place / f"lightning_xai_roar_gather-{jobs.group(3)}.out")
    try:
        python("roar", "--config=configs/roar_demo.yaml", *options, f"--out={here}")
        assert gather.wait() == "COMPLETED", gather.text()
    finally:
        call("scancel", *jobs.groups())
    for name in ("result.json", "values.csv", "targets.csv"):
        assert (there / name).read_text() == (here / name).read_text()
