"""Runs of the real command in processes that are stopped from outside, and what such a run leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from distributed import start_state, take_over
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # has none

# Importing these takes seconds; a server does so once, and every process is a fork of it.
_PRELOADED = ["lightning_xai.cli", "lightning_xai.commands.training", "lightning_xai.training", "pytest"]
_UNREPEATABLE = {"train/samples_per_second"}


class Left(NamedTuple):
    """What two runs have to agree in, to the last bit.

    Attributes:
        step: of the last checkpoint.
        weights: name -> tensor, the optimizer's averages included.
        logged: (name, step) -> value, as TensorBoard shows it.
        tables: file name -> content of the tables of grounding.
    """

    step: int
    weights: dict[str, torch.Tensor]
    logged: dict[tuple[str, int], float]
    tables: dict[str, str]


class Stopped(NamedTuple):
    """The signal that was sent, and the exit status."""

    signum: int
    code: int


def config_of(folder: Path, model: Path, shapes: Path, **trainer: Any) -> Path:
    """A config of `fit` that is over in seconds: a tiny model, shapes, grounding and two kinds of checkpoints."""
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    best = {"filename": "best", "monitor": "val/gamma_mean", "mode": "max", "enable_version_counter": False}
    config = {
        "seed_everything": 3,
        "model": {
            "class_path": "lightning_xai.training.ContrastiveFineTuning",
            "init_args": {"model": str(model), "pretrained": None, "initial_lr": 1e-3, "final_lr": 1e-4},
        },
        "data": {
            "class_path": "lightning_xai.data.ShardDataModule",
            "init_args": {
                "train": str(shapes / "train"), "val": str(shapes / "val"), "test": str(shapes / "val"),
                "batch_size": 16, "num_workers": 0, "shuffle_buffer": 20,
            },
        },
        "trainer": {
            "accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": str(folder / "runs"),
            "callbacks": [
                {"class_path": "lightning_xai.training.GroundingCallback", "init_args": {"examples": 0}},
                {**checkpoint, "init_args": best},
            ],
            **trainer,
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def start(arguments: Sequence[str], log: Path) -> BaseProcess:
    """`python -m lightning_xai ARGUMENTS`, in a process whose output is appended to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_run, args=(list(arguments), str(log), *start_state()))
    process.start()
    return process


def _run(arguments: list[str], log: str, environment: dict[str, str], start_method: str) -> None:
    take_over(environment, start_method)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["lightning_xai"]

    from lightning_xai.cli import main

    main(arguments)


def finish(arguments: Sequence[str], log: Path, timeout: float = 240) -> int:
    """Run to the end; the exit status."""
    return _end_of(start(arguments, log), log, timeout)


def time_of(arguments: Sequence[str], log: Path, run: Path) -> float:
    """Run to the end; the seconds since the run's folder was locked."""
    process = _start_until_locked(arguments, log, run)
    begun = time.monotonic()
    assert _end_of(process, log, 240) == 0, log.read_text()[-3000:]
    return time.monotonic() - begun


def _start_until_locked(arguments: Sequence[str], log: Path, run: Path) -> BaseProcess:
    (run / "lock").unlink(missing_ok=True)
    process = start(arguments, log)
    deadline = time.monotonic() + 120
    while not (run / "lock").exists() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def _end_of(process: BaseProcess, log: Path, timeout: float) -> int:
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"it did not end in {timeout} s: {log.read_text()[-3000:]}")
    return process.exitcode


def stop_at_random(
    arguments: Sequence[str], log: Path, run: Path, rng: random.Random, signals: Sequence[int], seconds: float
) -> Stopped | None:
    """Run, and send one of the signals at a random moment of the first `seconds` after the run's folder was locked.

    Returns:
        The signal and the exit status; None if the run had ended before.
    """
    process = _start_until_locked(arguments, log, run)
    process.join(rng.uniform(0, seconds))
    if process.exitcode is not None:
        return None
    signum = rng.choice(list(signals))
    with suppress(ProcessLookupError, FileNotFoundError):  # it may have ended in this very moment
        # As `scancel` and Ctrl-C do, to the data loader's workers as well; the kernel's own killer takes one process.
        if signum == signal.SIGKILL:
            process.kill()
        else:
            signal_all(process.pid or 0, signum)
    return Stopped(signum, _end_of(process, log, 120))


def signal_all(pid: int, signum: int) -> None:
    """Send a signal to a process and its children, as `scancel` does."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(child), signum)
    os.kill(pid, signum)


def left_by(run: Path) -> Left:
    """What a finished run left in its folder."""
    newest = max((run / "resume").glob("step=*.ckpt"))
    content = torch.load(newest, weights_only=True)
    weights = dict(content["state_dict"])
    for number, state in content["optimizer_states"][0]["state"].items():
        weights |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    tables = {path.name: path.read_text() for path in sorted((run / "grounding").glob("*.csv"))}
    return Left(content["global_step"], weights, _logged(run), tables)


def differences(first: Left, second: Left) -> list[str]:
    """Names of what is not the same to the last bit."""
    names = [f"step {first.step} and {second.step}"] if first.step != second.step else []
    for name in sorted(first.weights.keys() | second.weights.keys()):
        one, other = first.weights.get(name), second.weights.get(name)
        if one is None or other is None or not torch.equal(one, other):
            names.append(name)
    names += [str(key) for key in first.logged | second.logged if first.logged.get(key) != second.logged.get(key)]
    return names + [name for name in first.tables | second.tables if first.tables.get(name) != second.tables.get(name)]


def _logged(run: Path) -> dict[tuple[str, int], float]:
    rows: dict[tuple[str, int], float] = {}
    for file in sorted(run.glob("events.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag in _UNREPEATABLE:
                continue
            for event in events.Scalars(tag):
                # What was done twice has to have been done alike.
                assert rows.setdefault((tag, event.step), event.value) == event.value, (tag, event.step)
    return rows
