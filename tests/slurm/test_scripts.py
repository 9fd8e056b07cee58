"""The scripts of slurm/ and .ci/ without a Slurm: they parse, call the right command, and refuse wrong use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from slurm_jobs import ROOT, environment

SCRIPTS = [*sorted((ROOT / "slurm").iterdir()), ROOT / ".ci" / "cluster"]
JOBS = [path for path in SCRIPTS if path.suffix == ".sbatch"]
# The environment of a job.
JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}


def run(
    script: Path, arguments: Sequence[str] = (), variables: Mapping[str, str] = JOB, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_each_script_parses() -> None:
    for path in SCRIPTS:
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    command = ["shellcheck", "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_script_runs_only_inside_a_job_and_in_the_repositorys_folder(path: Path, tmp_path: Path) -> None:
    outside = run(path, ["configs/demo.yaml"], variables={})
    assert outside.returncode == 2
    assert re.match(r"This script runs inside a Slurm job; submit it: (sbatch )?slurm/\w+\.\w+ ", outside.stderr)
    elsewhere = run(path, ["configs/demo.yaml"], folder=tmp_path)
    assert elsewhere.returncode == 2
    assert f"Submit from the repository's folder: {tmp_path} has no slurm/common.sh" in elsewhere.stderr


def test_jobs_are_requeued_append_to_their_logs_and_get_a_signal_before_their_time_is_up() -> None:
    lines = {path.stem: path.read_text().splitlines() for path in JOBS}
    for own in lines.values():
        assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(own)
    assert "#SBATCH --signal=SIGUSR1@90" in lines["fit"]
    assert "#SBATCH --signal=B:SIGUSR1@90" in lines["test"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "No config: name it after the script"),
        ([], {"CONFIG": "missing.yaml"}, f"The config missing.yaml cannot be read from {ROOT}"),
        (["configs/demo.yaml"], {"ACTIVATE": "missing/activate"}, "ACTIVATE=missing/activate failed"),
        (["configs/demo.yaml"], {"PATH": "/nowhere:/usr/bin:/bin"}, "make the README's .venv"),
    ],
)
def test_a_missing_file_is_an_error_before_the_first_step(
    arguments: list[str], variables: dict[str, str], message: str
) -> None:
    refused = run(ROOT / "slurm" / "fit.sbatch", arguments, JOB | variables)
    assert refused.returncode == 2, refused.stderr
    assert message in refused.stderr


def test_an_array_script_without_an_array_says_how_to_submit_it() -> None:
    refused = run(ROOT / "slurm" / "roar_array.sbatch", ["configs/roar_demo.yaml"])
    assert refused.returncode == 2
    assert "sbatch --array=0-64 slurm/roar_array.sbatch configs/roar_demo.yaml" in refused.stderr


def test_the_environment_is_the_file_named_even_if_another_one_is_active(tmp_path: Path) -> None:
    activate = tmp_path / "my cluster.sh"
    activate.write_text('echo "loaded $UNSET_BY_ALL"\n')  # as `conda activate` does
    refused = run(ROOT / "slurm" / "fit.sbatch", ["missing.yaml"], JOB | {"ACTIVATE": str(activate)})
    assert refused.stdout.startswith("loaded \n")
    assert "The config missing.yaml" in refused.stderr


@pytest.fixture
def srun(tmp_path: Path) -> Path:
    """A folder with an srun that records its arguments, a line for each, and fails with 7."""
    script = tmp_path / "srun"
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "cores=$SRUN_CPUS_PER_TASK" >{tmp_path / "called"}\nexit 7\n')
    script.chmod(0o755)
    return tmp_path


def called(srun: Path, script: str, arguments: Sequence[str], **variables: str) -> list[str]:
    """The command that a script runs in its tasks; if they fail, the job fails."""
    path = f"{srun}{os.pathsep}{environment()['PATH']}"
    done = run(ROOT / "slurm" / script, arguments, JOB | {"PATH": path, "SLURM_CPUS_PER_TASK": "3"} | variables)
    assert done.returncode == 7, done.stderr
    words = (srun / "called").read_text().splitlines()
    # Each task has the script's environment, even under `sbatch --export=NONE`; none may wait for one that has died.
    assert words[:3] == ["--export=ALL", "--kill-on-bad-exit=1", "--wait=600"]
    assert words[-1] == "cores=3"
    return words[3:-1]


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_training_and_evaluation_use_all_nodes_and_tasks_of_the_job(srun: Path, verb: str) -> None:
    options = ["--trainer.max_epochs=1", "--a", "two words"]
    size = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    expected = ["python", "-m", "lightning_xai", verb, "--config", "configs/demo.yaml", *options]
    expected += ["--trainer.num_nodes=2", "--trainer.devices=4"]
    assert called(srun, f"{verb}.sbatch", ["configs/demo.yaml", *options], **size) == expected
    assert called(srun, f"{verb}.sbatch", options, CONFIG="configs/demo.yaml", **size) == expected


def test_a_fit_resumes_in_the_folder_that_run_names(srun: Path) -> None:
    assert called(srun, "fit.sbatch", ["configs/demo.yaml"], RUN="my runs/1")[-2:] == ["--run", "my runs/1"]


def test_each_job_of_roar_does_its_part(srun: Path) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "12"}
    parts = {"roar_prepare": ["--prepare"], "roar_array": ["--trial", "12"], "roar_gather": ["--gather"]}
    for script, last in parts.items():
        words = called(srun, f"{script}.sbatch", ["configs/roar_demo.yaml", "--seeds=[0]"], **task)
        assert words[3:] == ["roar", "--config", "configs/roar_demo.yaml", "--seeds=[0]", *last]


def test_preparation_gets_its_arguments_as_they_are_and_at_least_one(srun: Path) -> None:
    words = ["coco", "--images", "my images", "--out", "data/coco"]
    assert called(srun, "prepare.sbatch", words) == ["python", "-m", "lightning_xai", "prepare", *words]
    refused = run(ROOT / "slurm" / "prepare.sbatch")
    assert refused.returncode == 2
    assert "Nothing to prepare" in refused.stderr
