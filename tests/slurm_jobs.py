"""Submit the scripts of slurm/ to a real Slurm, inspect their jobs, and wait for them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_RUNNING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "SIGNALING", "STOPPED"}


def why_not() -> str:
    """The reason why no jobs can be submitted here; empty if they can.

    Users who only run the tests must not find jobs in their cluster's queue.
    """
    if os.environ.get("LIGHTNING_XAI_SLURM") != "1":
        return (
            "submits jobs of two nodes that share the temporary folder: set LIGHTNING_XAI_SLURM=1, or use .ci/cluster "
            "with SLURM_ONE_MACHINE"
        )
    if shutil.which("sbatch") is None:
        return "there is no Slurm: no sbatch"
    shown = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True, timeout=60, check=False)
    idle = shown.stdout.split().count("idle")
    return "" if idle >= 2 else f"sinfo shows {idle} idle nodes, two are needed; {shown.stderr.strip()}"


def environment(**more: str) -> dict[str, str]:
    """Environment variables of a shell with this test's Python, outside of any job, with one thread."""
    kept = {name: value for name, value in os.environ.items() if not re.match("(SLURM|SBATCH|SRUN)_", name)}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(ROOT / "tests" / "slurm"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        **more,
    }


@dataclass
class Job:
    """A job that was submitted.

    Attributes:
        id: its number.
        log: what it prints, all allocations one after the other.
    """

    id: str
    log: Path

    def show(self, field: str) -> str:
        """A field of `scontrol show job`; of an array, that of its first task."""
        shown = call("scontrol", "show", "job", "--oneliner", self.id)
        found = re.search(rf"(?:^|\s){field}=(\S+)", shown)
        assert found is not None, f"no {field} in {shown}"
        return found.group(1)

    @property
    def state(self) -> str:
        """As PENDING, RUNNING, COMPLETED, FAILED, CANCELLED."""
        return self.show("JobState")

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.show("Restarts"))

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self, timeout: float = 240) -> str:
        """Until it has ended; returns the state."""
        self.until(lambda: self.state not in _RUNNING, "end", timeout)
        return self.state

    def until(self, happened: Callable[[], bool], what: str, timeout: float = 120) -> None:
        """Wait for something that this job is to do."""
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                message = f"job {self.id} did not {what} in {timeout} s; it is {self.state}:\n{self.text()}"
                call("scancel", self.id)  # else the jobs of the tests behind this one wait for its nodes
                raise TimeoutError(message)
            time.sleep(0.2)

    def start_again(self, *changes: str) -> None:
        """Wait until it is back in the queue, and have it started without the two minutes that Slurm would wait.

        Args:
            changes: more of what `scontrol update` takes.
        """
        self.until(lambda: self.state == "PENDING" and self.restarts > 0, "come back into the queue")
        call("scontrol", "update", f"JobId={self.id}", "StartTime=now", *changes)

    def processes(self, rank: int | None = None) -> list[int]:
        """The numbers of its processes on this machine, or of those of one rank."""
        wanted = {f"SLURM_JOB_ID={self.id}"} | (set() if rank is None else {f"SLURM_PROCID={rank}"})
        return [number for number, variables in _environments() if wanted <= variables]

    def kill(self, rank: int) -> None:
        """`kill -9` of one rank."""
        found = self.processes(rank)
        assert found, f"job {self.id} has no process of rank {rank}"
        for number in found:
            os.kill(number, signal.SIGKILL)


def call(*command: str) -> str:
    """Run a command of Slurm and return its output."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def _environments() -> Iterator[tuple[int, set[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                variables = (folder / "environ").read_bytes()
            except OSError:
                continue  # it has ended meanwhile, or belongs to another user
            yield int(folder.name), {variable.decode(errors="replace") for variable in variables.split(b"\0")}
