"""Pixels and the patches they belong to, for methods that work on pixels and report by patches.

Shape suffixes: H x W the patch grid, h x w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class PatchGrid:
    """A grid of equal patches laid over an image: every pixel belongs to the one patch that its centre lies in.

    So sums over patches add up to the sum over pixels also where the image's sides are no multiples of the grid's. Some
    towers see less than the image there: a ViT with patches of 14 pixels drops the last 6 of 384, so that its own
    patches lie up to so many pixels above and left of these.

    Attributes:
        grid: rows and columns of patches.

    Example:
        >>> PatchGrid((1, 2)).sums(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist()
        [[3.0, 7.0]]
        >>> PatchGrid((1, 2)).spread(torch.tensor([[5.0, 6.0]]), (1, 3)).tolist()
        [[5.0, 6.0, 6.0]]
    """

    grid: tuple[int, int]

    def sums(self, pixels: Tensor) -> Tensor:
        """Pixels [..., h, w] summed over each patch: [..., H, W]."""
        rows, columns = self._membership(pixels)
        return rows @ pixels @ columns.mT

    def means(self, pixels: Tensor) -> Tensor:
        """Pixels [..., h, w] averaged over each patch: [..., H, W]."""
        return self.sums(pixels) / self.sums(pixels.new_ones(pixels.shape[-2:]))

    def spread(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """Each pixel's patch: [..., H, W] -> [..., h, w]."""
        rows, columns = (
            _owners(count, length).to(patches.device) for count, length in zip(self.grid, size, strict=True)
        )
        return patches.index_select(-2, rows).index_select(-1, columns)

    def _membership(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[H, h] and [W, w]: one where a row (column) of pixels belongs to a row (column) of patches."""
        rows, columns = (
            one_hot(_owners(count, length), count).mT.to(pixels)
            for count, length in zip(self.grid, pixels.shape[-2:], strict=True)
        )
        return rows, columns


def _owners(count: int, length: int) -> Tensor:
    # The patch of pixel y is floor((y + 1/2) * count / length), in integers.
    return (2 * torch.arange(length) + 1) * count // (2 * length)
