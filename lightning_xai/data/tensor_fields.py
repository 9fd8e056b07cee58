"""Records whose fields are tensors, and records of such: they go to a device as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["TensorFields"]

_T = TypeVar("_T", bound="TensorFields")


@dataclass
class TensorFields:
    """A dataclass that moves with all its tensors; fields of other types stay as they are."""

    def to(self: _T, device: torch.device | str, non_blocking: bool = False) -> _T:
        """A copy with all tensors on `device`."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self: _T) -> _T:
        """A copy with all tensors in page-locked memory (`DataLoader(pin_memory=True)` calls this)."""
        return self._map(lambda part: part.pin_memory())

    def _map(self: _T, change: Callable[[Any], Any]) -> _T:
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return type(self)(
            **{name: change(value) if isinstance(value, Tensor | TensorFields) else value for name, value in values}
        )
