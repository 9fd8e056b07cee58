"""Shards like COCO's for benchmarks: JPEGs of 640 x 480 pixels, and one caption each of COCO's length."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_xai.data import Manifest, Sample, write_shards

SIZE = (640, 480)
CAPTION_TOKENS = {
    9: 4, 10: 25, 11: 105, 12: 161, 13: 135, 14: 140, 15: 87, 16: 57, 17: 27,
    18: 15, 19: 12, 20: 7, 21: 2, 22: 6, 23: 2, 24: 6, 28: 2, 29: 1, 46: 1,
}  # fmt: skip
"""Tokens, start and end included -> how many of the captions of 159 images of COCO 2017 have so many in CLIP's BPE."""
_WORDS = ("a", "man", "dog", "red", "mat", "next", "to", "small", "cat", "on", "the", "street", "with", "bus", "two")
_GRAIN = 32.0  # files of about 160 kB, as COCO has in the mean, that take as long to decode
_VARIANTS = 16


def write_photo_shards(folder: Path, images: int, seed: int = 0) -> Manifest:
    """Write `images` samples; the same number and seed give the same bytes.

    The images are smooth structures under the grain of a camera, so that decoding them costs what a photograph costs.
    """
    samples = draw_photos(images, seed)
    return write_shards(samples, folder, name="photos", excluded=Counter(), progress=False)


def draw_photos(images: int, seed: int) -> Iterator[Sample]:
    """Draw the samples of `write_photo_shards`."""
    chance = random.Random(seed)
    files = [_jpeg(np.random.default_rng((seed, variant))) for variant in range(min(images, _VARIANTS))]
    lengths = list(CAPTION_TOKENS)
    cumulated = list(accumulate(CAPTION_TOKENS.values()))
    for number in range(images):
        (length,) = chance.choices(lengths, cum_weights=cumulated)
        caption = " ".join(chance.choices(_WORDS, k=length - 2))
        yield Sample(f"{number:06d}", files[number % len(files)], SIZE, (caption,))


def _jpeg(rng: np.random.Generator) -> bytes:
    width, height = SIZE
    structure = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    pixels = np.asarray(structure.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = pixels + rng.normal(0.0, _GRAIN, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()
