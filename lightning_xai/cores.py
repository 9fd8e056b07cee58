"""The processor's cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["usable_cores"]

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Number of cores that this process may run on, at least 1.

    A job of a cluster has some of its machine's cores, by its affinity; a container has their time, by a quota of its
    control group (version 2), such as 150 ms of each 100 ms, which counts as two cores.
    """
    # There is no affinity on macOS and Windows.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(_QUOTA))))


def _quota(path: Path) -> float:
    """Cores' time by a file `cpu.max`, which holds `150000 100000`, or `max 100000` where there is no limit."""
    try:
        limit, period = path.read_text(encoding="ascii").split()
        return int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
