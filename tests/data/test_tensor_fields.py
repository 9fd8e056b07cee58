"""Records of tensors that move as one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_xai.data.tensor_fields import TensorFields


@dataclass
class Inner(TensorFields):
    numbers: Tensor
    words: list[str]


@dataclass
class Outer(TensorFields):
    inner: Inner
    weights: Tensor
    absent: Inner | None = None
    name: str = "outer"


def test_tensors_of_all_depths_move_and_the_rest_stays_as_it_is() -> None:
    words = ["a"]
    record = Outer(Inner(torch.arange(3), words), torch.ones(2), None, "other")
    moved = record.to("meta")
    assert isinstance(moved, Outer)
    assert isinstance(moved.inner, Inner)
    assert moved.inner.numbers.device.type == moved.weights.device.type == "meta"
    assert moved.inner.words is words
    assert (moved.absent, moved.name) == (None, "other")
    assert record.weights.device.type == record.inner.numbers.device.type == "cpu"


def test_page_locked_memory_reaches_all_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(len(tensor))
        return tensor + 1

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    record = Outer(Inner(torch.zeros(3), []), torch.zeros(2), Inner(torch.zeros(1), ["x"])).pin_memory()
    assert pinned == [3, 2, 1]
    assert record.absent is not None
    assert [part.sum().item() for part in (record.inner.numbers, record.weights, record.absent.numbers)] == [3, 2, 1]
