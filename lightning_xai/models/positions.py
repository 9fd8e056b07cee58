"""Position embeddings of another image size or caption length: interpolated from the grid that they were trained on.

An own function, since open_clip takes every grid for a square one, and leaves positions alone where only their number
agrees: 12 x 12 patches would silently stand for 9 x 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["ImagePositions", "interpolate_image", "interpolate_text", "text_positions"]

_RESNET_STRIDE = 32


@dataclass(frozen=True)
class ImagePositions:
    """The image tower's learned positions.

    Attributes:
        key: their name in the model's state dict.
        prefix: how many of them belong to no patch (CLS).
        grid: rows and columns of patches.
        patch: height and width of a patch in pixels.
    """

    key: str
    prefix: int
    grid: tuple[int, int]
    patch: tuple[int, int]

    @classmethod
    def of(cls, model: Any) -> ImagePositions | None:
        """Those of an open_clip model; None without a grid of learned ones, as in convolutional towers."""
        visual: Any = model.visual
        if isinstance(visual, TimmModel):
            positions, embed = getattr(visual.trunk, "pos_embed", None), getattr(visual.trunk, "patch_embed", None)
            grid = getattr(embed, "grid_size", None)
            if not isinstance(positions, Tensor) or positions.ndim != 3 or embed is None or grid is None:
                return None
            rows, columns = grid
            prefix = positions.shape[1] - rows * columns
            return cls("visual.trunk.pos_embed", prefix, (rows, columns), tuple(embed.patch_size))
        if isinstance(visual, ModifiedResNet):
            rows, columns = (side // _RESNET_STRIDE for side in _pair(visual.image_size))
            return cls("visual.attnpool.positional_embedding", 1, (rows, columns), (_RESNET_STRIDE, _RESNET_STRIDE))
        if "visual.positional_embedding" not in model.state_dict():
            return None
        return cls("visual.positional_embedding", 1, _pair(visual.grid_size), _pair(visual.patch_size))

    def trained_size(self, positions: Tensor) -> tuple[int, int] | None:
        """Height and width in pixels of the square images that another number of positions belongs to.

        None where they belong to no square: then nothing says what their grid is.
        """
        side = math.isqrt(max(self.count(positions), 0))
        if side == 0 or side**2 != self.count(positions):
            return None
        return side * self.patch[0], side * self.patch[1]

    def count(self, positions: Tensor) -> int:
        """The number of patches that positions, [T, D] or [1, T, D], belong to."""
        return positions.shape[-2] - self.prefix


def interpolate_image(positions: Tensor, prefix: int, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Positions [prefix + H * W, D] of a grid for another one, bicubic with antialiasing as open_clip and timm do.

    Args:
        positions: those of the prefix tokens, then row by row of the grid.
        prefix: positions that are kept.
        grid: (H, W).
        size: rows and columns wanted.

    Returns:
        [prefix + rows * columns, D].
    """
    kept, patches = positions[:prefix], positions[prefix:]
    planes = patches.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    planes = interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([kept, planes.permute(0, 2, 3, 1).reshape(-1, positions.shape[1]).to(positions)])


def interpolate_text(positions: Tensor, length: int, suffix: int) -> Tensor:
    """Positions [T + suffix, D] of captions for captions of `length` tokens, linear as open_clip does.

    The last `suffix` of them, a class token's, are kept.
    """
    own, kept = positions[: len(positions) - suffix], positions[len(positions) - suffix :]
    line = interpolate(own.float().mT[None], size=length, mode="linear", align_corners=False)
    return torch.cat([line[0].mT.to(positions), kept])


def text_positions(model: Any) -> tuple[str, int] | None:
    """Name of the text tower's learned positions in the state dict, and how many at their end belong to a class token.

    None for Hugging Face's text towers, whose positions do not depend on the length of captions.
    """
    name = "positional_embedding" if isinstance(getattr(model, "positional_embedding", None), Tensor) else "text."
    if name == "text.":
        name += "positional_embedding"
    if name not in model.state_dict():
        return None
    return name, int(getattr(getattr(model, "text", None), "cls_emb", None) is not None)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)
