"""Images of single shapes of the embedded world in a folder for each class, for zero-shot classification."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_xai.atomic_file import replaced_at_once, write_json
from lightning_xai.data.shapes import COLORS, GRID, SHAPE_SIZES, SHAPES, draw_shape, phrase

__all__ = ["prepare_shape_classes"]

_SETTINGS = "settings.json"
_SIZE = 64  # pixels of an image's side, as in the world's images
_NOISE, _GREY = 5.0, (90.0, 140.0)


def prepare_shape_classes(out: Path, images: int = 8, seed: int = 0) -> None:
    """Write a folder for each of the 32 pairs of a colour and a shape, such as `red_ring`, with images of one object.

    Size and place of the object differ between the images of a class; the ground is grey with noise. Folders
    that are there with the same numbers stay as they are.

    Args:
        out: the folder.
        images: in each class, at least 1.
        seed: from 0; the same seed gives the same images.

    Raises:
        ValueError: a number out of its range, or `out` holds something else.
    """
    if images < 1 or seed < 0:
        raise ValueError(f"expected at least 1 image for each class and a seed from 0; got {images} and {seed}")
    settings = {"classes": "shapes (version 2)", "images": images, "seed": seed}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        record = out / _SETTINGS
        if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{out} holds something else than {settings}: choose another folder, or delete this one")
        return
    for color, shape in product(range(len(COLORS)), range(len(SHAPES))):
        folder = out / phrase((color, shape)).replace(" ", "_")
        folder.mkdir(parents=True)
        for number in range(images):
            rng = np.random.default_rng((seed, color, shape, number))
            with replaced_at_once(folder / f"{number:03d}.png") as part:
                Image.fromarray(_paint(rng, color, shape)).save(part, "PNG")
    write_json(out / _SETTINGS, settings)  # last: a folder without it is not whole


def _paint(rng: np.random.Generator, color: int, shape: int) -> npt.NDArray[np.uint8]:
    """[h, w, 3] of one object on a grey ground."""
    mask = draw_shape(SHAPES[shape], int(rng.choice(SHAPE_SIZES)))
    image = np.full((_SIZE, _SIZE, 3), rng.uniform(*_GREY))
    y, x = (GRID * int(rng.integers((_SIZE - side) // GRID, endpoint=True)) for side in mask.shape)
    patch = image[y : y + mask.shape[0], x : x + mask.shape[1]]
    patch += mask[:, :, None] * (np.array(list(COLORS.values())[color]) - patch)
    image += _NOISE * rng.standard_normal((_SIZE, _SIZE, 1))
    painted: npt.NDArray[np.uint8] = np.clip(image, 0, 255).astype(np.uint8)
    return painted
