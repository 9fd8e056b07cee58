"""The scripts of slurm/ and .ci/ without a Slurm: that they parse, and what they refuse."""

from __future__ import annotations

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
