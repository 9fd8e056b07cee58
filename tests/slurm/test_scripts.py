"""The scripts of slurm/ and .ci/ without a Slurm: that they parse, and what they refuse."""

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
# What Slurm tells a job about itself.
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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_script_parses(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    command = ["shellcheck", "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_script_refuses_to_run_outside_a_job_or_far_from_its_common_part(path: Path, tmp_path: Path) -> None:
    outside = run(path, ["configs/demo.yaml"], variables={})
    assert outside.returncode == 2
    assert re.match(r"This script runs inside a Slurm job; submit it: (sbatch )?slurm/\w+\.\w+ ", outside.stderr)
    elsewhere = run(path, ["configs/demo.yaml"], folder=tmp_path)
    assert elsewhere.returncode == 2
    assert f"Submit from the repository's folder: {tmp_path} has no slurm/common.sh" in elsewhere.stderr


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_that_is_requeued_keeps_what_it_has_printed(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "#SBATCH --requeue" in lines
    assert "#SBATCH --open-mode=append" in lines


@pytest.mark.parametrize(("script", "signal"), [("fit", "SIGUSR1@90"), ("test", "B:SIGUSR1@90")])
def test_who_has_to_act_is_told_before_the_time_runs_out(script: str, signal: str) -> None:
    assert f"#SBATCH --signal={signal}" in (ROOT / "slurm" / f"{script}.sbatch").read_text().splitlines()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "No config: name it after the script"),
        (["--trainer.max_epochs=1"], {}, "No config: name it after the script"),
        (["configs/missing.yaml"], {}, f"The config configs/missing.yaml cannot be read from {ROOT}"),
        ([], {"CONFIG": "missing.yaml"}, f"The config missing.yaml cannot be read from {ROOT}"),
        (["configs/demo.yaml"], {"ACTIVATE": "missing/activate"}, "ACTIVATE=missing/activate failed"),
        (["configs/demo.yaml"], {"PATH": "/nowhere:/usr/bin:/bin"}, "make the README's .venv"),
    ],
)
def test_what_is_missing_is_told_before_the_first_step(
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
    """A folder with an srun that notes how it was called, a line for each word, and fails with 7."""
    script = tmp_path / "srun"
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "cores=$SRUN_CPUS_PER_TASK" >{tmp_path / "called"}\nexit 7\n')
    script.chmod(0o755)
    return tmp_path


def called(srun: Path, script: str, arguments: Sequence[str], **variables: str) -> list[str]:
    """What a script has its tasks run; that they fail is the job's failure."""
    path = f"{srun}{os.pathsep}{environment()['PATH']}"
    done = run(ROOT / "slurm" / script, arguments, JOB | {"PATH": path, "SLURM_CPUS_PER_TASK": "3"} | variables)
    assert done.returncode == 7, done.stderr
    words = (srun / "called").read_text().splitlines()
    # No task may wait for one that has died.
    assert words[:2] == ["--kill-on-bad-exit=1", "--wait=600"]
    assert words[-1] == "cores=3"
    return words[2:-1]


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_training_and_evaluation_take_all_nodes_and_tasks_of_the_job(srun: Path, verb: str) -> None:
    options = ["--trainer.max_epochs=1", "--a", "two words"]
    size = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    expected = ["python", "-m", "lightning_xai", verb, "--config", "configs/demo.yaml", *options]
    expected += ["--trainer.num_nodes=2", "--trainer.devices=4"]
    assert called(srun, f"{verb}.sbatch", ["configs/demo.yaml", *options], **size) == expected
    assert called(srun, f"{verb}.sbatch", options, CONFIG="configs/demo.yaml", **size) == expected


def test_a_fit_goes_on_in_the_folder_that_run_names(srun: Path) -> None:
    assert called(srun, "fit.sbatch", ["configs/demo.yaml"], RUN="my runs/1")[-2:] == ["--run", "my runs/1"]


@pytest.mark.parametrize(
    ("script", "variables", "last"),
    [
        ("roar_prepare.sbatch", {}, ["--prepare"]),
        ("roar_array.sbatch", {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "12"}, ["--cell", "12"]),
        ("roar_gather.sbatch", {}, ["--gather"]),
    ],
)
def test_each_job_of_roar_does_its_part(srun: Path, script: str, variables: dict[str, str], last: list[str]) -> None:
    words = called(srun, script, ["configs/roar_demo.yaml", "--seeds=[0]"], **variables)
    assert words == [
        "python",
        "-m",
        "lightning_xai",
        "roar",
        "--config",
        "configs/roar_demo.yaml",
        "--seeds=[0]",
        *last,
    ]


def test_preparation_gets_its_arguments_as_they_are_and_at_least_one(srun: Path) -> None:
    words = ["coco", "--images", "my images", "--out", "data/coco"]
    assert called(srun, "prepare.sbatch", words) == ["python", "-m", "lightning_xai", "prepare", *words]
    refused = run(ROOT / "slurm" / "prepare.sbatch")
    assert refused.returncode == 2
    assert "Nothing to prepare" in refused.stderr
