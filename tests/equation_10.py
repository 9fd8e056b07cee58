"""Eq. 10 of the feature-pair paper as it is written: both Jacobians in full, by hooks on the whole encoders.

Slow, and without any of the package's code: what its attributions are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Side:
    """One encoder with an input [1, ...] and its reference [1, ...], attributed to the input of `block`.

    Attributes:
        width_axis: the axis of the block's input that is no place: -1 for tokens and channels last, 1 for channels
            first.
        batch_axis: the axis of the batch in the block's input.
    """

    block: nn.Module
    encode: Callable[[Tensor], Tensor]
    inputs: Tensor
    reference: Tensor
    width_axis: int = -1
    batch_axis: int = 0

    def jacobian(self, steps: int) -> Tensor:
        """[K, places]: the integrated Jacobian of Eq. 9 times input minus reference, summed over the width."""
        start = block_input(self.block, lambda: self.encode(self.reference))
        delta = block_input(self.block, lambda: self.encode(self.inputs)) - start

        def embed(hidden: Tensor) -> Tensor:
            return replacing(self.block, hidden, lambda: self.encode(self.inputs))[0]

        jacobian: Any = torch.autograd.functional.jacobian
        mean: Tensor = sum(jacobian(embed, start + n / steps * delta) for n in range(1, steps + 1)) / steps
        # [K, ...]; the batch of one is left out, so that the width's axis is as in the input.
        product = (mean * delta).select(1 + self.batch_axis, 0)
        summed = product.sum(dim=self.width_axis).flatten(1)
        norm: Tensor = self.encode(self.inputs).norm()
        return summed / norm


def equation_10(text: Side, image: Side, steps: int) -> Tensor:
    """Attributions [text places, image places] by the right Riemann sum of so many steps."""
    return torch.einsum("ks,kp->sp", text.jacobian(steps), image.jacobian(steps))


def sharing_padding(rows: Tensor, end: Tensor) -> Tensor:
    """Rows [tokens, ...] of one caption, with the mean in place of padding that counts, which follows `end`."""
    after = torch.arange(len(rows)) > end
    padding = (after & rows.ne(0).any(dim=1)).nonzero()[:, 0]
    shared = rows.clone()
    shared[padding] = rows[padding].mean(dim=0)
    return shared


def block_input(block: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives a block, without graph."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kept.append((arguments[0] if arguments else keywords["hidden_states"]).detach())

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    (hidden,) = kept
    return hidden


def replacing(block: nn.Module, hidden: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """What `run` returns when a block gets `hidden`, whatever comes before."""

    def replace(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": hidden}

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        return run()
    finally:
        handle.remove()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
