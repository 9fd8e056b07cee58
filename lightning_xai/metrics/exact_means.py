"""Means that are the same to the last bit on one process and on many, in any order and any batches.

Shape suffix: N items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["FRACTION_BITS", "ExactMeans", "to_fixed"]

FRACTION_BITS = 40


def to_fixed(values: Tensor) -> Tensor:
    """Numbers as whole multiples of 2^-40 in int64: sums of integers do not depend on their order.

    The error is below 1e-12; 2^23 (8 million) ones fill an int64.

    >>> to_fixed(torch.tensor([0.5, -1.0])).tolist() == [2**39, -(2**40)]
    True
    """
    # Apple's GPUs have no float64.
    wide = values if values.device.type == "mps" else values.double()
    fixed: Tensor = (wide * 2**FRACTION_BITS).round().long()
    return fixed


class ExactMeans(Metric):
    """Accumulates the means of some named numbers; NaN stands for a number that an item does not have.

    Metrics that average something over items derive from it: they give the names, and turn what they are given into
    one number for each item.

    Args:
        names: of the numbers.

    Example:
        >>> means = ExactMeans(["height"])
        >>> means.update({"height": torch.tensor([1.0, 2.0, float("nan")])})
        >>> means.compute()
        {'height': 1.5}
    """

    full_state_update = False
    is_differentiable = False
    totals: Tensor
    items: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        for state in ("totals", "items"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.int64), dist_reduce_fx="sum")

    def set_dtype(self, dst_type: str | torch.dtype) -> ExactMeans:
        """Does nothing: the states are integers at any precision."""
        return self

    def update(self, values: dict[str, Tensor]) -> None:
        """Add items.

        Args:
            values: for each name a number for each item, [N]; NaN where the item has none, below 2^20 elsewhere.

        Raises:
            ValueError: other names than those given, shapes that differ, or numbers that are infinite or too large.
        """
        shapes = {name: list(value.shape) for name, value in values.items()}
        ranks = {len(shape) for shape in shapes.values()}
        if shapes.keys() != set(self.names) or ranks != {1} or len({shape[0] for shape in shapes.values()}) != 1:
            raise ValueError(f"expected {', '.join(self.names)}, each [N]; got {shapes}")
        # On the CPU, for Apple's GPUs have no float64.
        stacked = torch.stack([values[name].detach().cpu().double() for name in self.names])
        there = ~stacked.isnan()
        numbers = stacked.masked_fill(~there, 0)
        if (numbers.abs() >= 2**20).any():
            raise ValueError(f"numbers have to be finite and below 2^20; got up to {numbers.abs().max()}")
        # Out of place: a state made under inference_mode could not be changed outside of it.
        self.totals = self.totals + to_fixed(numbers).sum(dim=1).to(self.totals.device)
        self.items = self.items + there.sum(dim=1).to(self.items.device)

    def compute(self) -> dict[str, float]:
        """The mean of each number over everything added since the last reset, on all ranks; NaN without an item."""
        sums = zip(self.names, self.totals.tolist(), self.items.tolist(), strict=True)
        return {name: total / (count << FRACTION_BITS) if count else math.nan for name, total, count in sums}
