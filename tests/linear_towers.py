"""The least model that losses over a global batch can be tried on, and eight pairs for it, all in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class LinearTowers(nn.Module):
    """Two towers, a scale and a bias. Every parameter has a gradient, or DDP would average none of its bucket."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([-2.0], dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, text = self.project(images, texts)
        return normalize(image, dim=-1), normalize(text, dim=-1), self.log_scale.exp(), self.bias

    def project(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return images @ self.image, texts @ self.text + 0 * self.bias


def eight_pairs() -> tuple[Tensor, Tensor]:
    """Images [8, 6] and texts [8, 5]."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return images, torch.randn(8, 5, generator=generator, dtype=torch.float64)
