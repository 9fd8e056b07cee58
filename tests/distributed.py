"""Run a test's function on several real processes joined by gloo."""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn


def run_distributed(function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on each of `world_size` fresh processes and return what they return, by rank.

    Inside, torch.distributed is initialised: `dist.get_rank()` tells the processes apart. `function` stands at the top
    level of its file; that file is loaded by its path, since pytest's importlib mode gives test files names that
    another process cannot import. Arguments go through pickle; results have to load with `weights_only=True`
    (tensors, numbers, strings, and lists, tuples and dicts of these).

    Raises:
        RuntimeError: a process raised or died; the message holds the tracebacks, the first to happen first.
        TimeoutError: the processes did not end in `timeout` seconds (a deadlock, usually); they are killed.
    """
    if "." in function.__qualname__:
        raise ValueError(f"{function.__qualname__} has to stand at the top level of its file")
    with tempfile.TemporaryDirectory() as folder:
        job = (world_size, inspect.getfile(function), function.__name__, args, folder, timeout)
        start: Any = spawn  # torch leaves it untyped
        context = start(_work, job, nprocs=world_size, join=False)
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


def _work(rank: int, world_size: int, file: str, name: str, args: tuple[Any, ...], folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=timeout)
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
