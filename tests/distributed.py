"""Run a test's function on several real processes joined by gloo."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

# Importing these takes a process seconds; a server does so once, and every process is a fork of it.
_PRELOADED = ["lightning_xai.training", "lightning_xai.evaluation", "pytest"]


def run_distributed(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    timeout: float = 120,
    collective_timeout: float | None = None,
) -> list[Any]:
    """Call `function(*args)` on each of `world_size` fresh processes and return what they return, by rank.

    Inside, torch.distributed is initialised: `dist.get_rank()` tells the processes apart. `function` stands at the top
    level of its file; that file is loaded by its path, since pytest's importlib mode gives test files names that
    another process cannot import. Arguments go through pickle; results have to load with `weights_only=True`
    (tensors, numbers, strings, and lists, tuples and dicts of these).

    `collective_timeout` is how many seconds a process waits for the others in a collective before it fails; by default
    as long as the processes may run at all.

    Raises:
        RuntimeError: a process raised or died; the message holds the tracebacks, the first to happen first.
        TimeoutError: the processes did not end in `timeout` seconds (a deadlock, usually); they are killed.
    """
    if "." in function.__qualname__:
        raise ValueError(f"{function.__qualname__} has to stand at the top level of its file")
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        waits = timeout if collective_timeout is None else collective_timeout
        job = (world_size, inspect.getfile(function), function.__name__, args, folder, waits, start_state())
        start: Any = start_processes  # torch leaves it untyped
        context = start(_work, job, nprocs=world_size, join=False, start_method="forkserver")
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=0.5):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} on {world_size} processes did not end in {timeout} s")
        except ProcessException as error:
            # The process that is reported first is often not the one to blame, only the one that lost its peer.
            failed = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError("\n".join(path.read_text() for path in failed) or str(error)) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(_result(folder, rank), weights_only=True) for rank in range(world_size)]


def join_lightning() -> dict[str, Any]:
    """The Trainer's options with which it takes the processes that are there already."""
    rank, world = dist.get_rank(), dist.get_world_size()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    os.environ |= {name: str(value) for name, value in zip(names, (rank, rank, world, world, 0), strict=True)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {"devices": world, "strategy": "ddp"}


def start_state() -> tuple[dict[str, str], str]:
    """What processes would take over from the one that starts them, were there no server in between."""
    return dict(os.environ), multiprocessing.get_start_method()


def take_over(environment: dict[str, str], start_method: str) -> None:
    """Go on in a server's process with the state of the one that asked for it."""
    os.environ.clear()  # the server's, of when it was started
    os.environ.update(environment)
    multiprocessing.set_start_method(start_method, force=True)  # of data workers, not the server's
    torch.set_num_threads(1)


def _work(
    rank: int,
    world_size: int,
    file: str,
    name: str,
    args: tuple[Any, ...],
    folder: str,
    collective_timeout: float,
    state: tuple[dict[str, str], str],
) -> None:
    take_over(*state)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # data classes look there
    spec.loader.exec_module(module)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=collective_timeout)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        torch.save(getattr(module, name)(*args), _result(folder, rank))
    except Exception:
        Path(folder, f"error-{rank}").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"
