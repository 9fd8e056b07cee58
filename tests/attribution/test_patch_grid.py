from __future__ import annotations

import pytest
import torch

from lightning_xai.attribution.patch_grid import PatchGrid


@pytest.mark.parametrize(("grid", "size"), [((2, 3), (8, 12)), ((3, 2), (10, 7)), ((1, 1), (5, 4)), ((4, 4), (4, 4))])
def test_every_pixel_belongs_to_the_patch_that_its_centre_lies_in(grid: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = torch.randn(2, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums, counts = torch.zeros(2, *grid, dtype=torch.float64), torch.zeros(grid, dtype=torch.float64)
    spread = torch.zeros(size, dtype=torch.int64)
    numbers = torch.arange(grid[0] * grid[1]).reshape(grid)
    for y in range(size[0]):
        for x in range(size[1]):
            row, column = int((y + 0.5) / (size[0] / grid[0])), int((x + 0.5) / (size[1] / grid[1]))
            sums[:, row, column] += pixels[:, y, x]
            counts[row, column] += 1
            spread[y, x] = numbers[row, column]
    patches = PatchGrid(grid)
    torch.testing.assert_close(patches.sums(pixels), sums)
    torch.testing.assert_close(patches.means(pixels), sums / counts)
    assert torch.equal(patches.spread(numbers, size), spread)
    torch.testing.assert_close(patches.sums(pixels).sum(dim=(1, 2)), pixels.sum(dim=(1, 2)))
