"""Results of all processes, joined on the first one alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["from_first", "gather_to_first"]

_T = TypeVar("_T")


def gather_to_first(part: _T) -> list[_T]:
    """Return what every process gives, by rank, on the first; elsewhere nothing. Every process has to call this."""
    if not _several():
        return [part]
    first = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(part, gathered, dst=0)
    return gathered or []


def from_first(compute: Callable[[], _T]) -> _T:
    """Compute something small on the first process alone, for all. Every process has to call this.

    Raises:
        RuntimeError: (elsewhere) the first process failed; there, its own error.
    """
    if not _several():
        return compute()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = compute()
        except Exception as error:
            # The others would otherwise wait until the process group times out.
            dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0)
            raise
    dist.broadcast_object_list(answer, src=0)
    value, failure = answer
    if failure is not None:
        raise RuntimeError(f"the first process failed with {failure}")
    result: _T = value
    return result


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
