"""Shards like COCO's for benchmarks: JPEGs of 640 x 480 pixels, with captions of COCO's length.

They have one caption each, or five with boxes of what they name, as often as in COCO.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_xai.data import Manifest, Region, Sample, write_shards

SIZE = (640, 480)
CAPTION_TOKENS = {
    9: 4, 10: 25, 11: 105, 12: 161, 13: 135, 14: 140, 15: 87, 16: 57, 17: 27,
    18: 15, 19: 12, 20: 7, 21: 2, 22: 6, 23: 2, 24: 6, 28: 2, 29: 1, 46: 1,
}  # fmt: skip
"""Tokens, start and end included -> how many of the captions of 159 images of COCO 2017 have so many in CLIP's BPE."""
PHRASES = {0: 47, 1: 7, 2: 3, 3: 7, 4: 13, 5: 34, 6: 6, 7: 10, 8: 11, 9: 7, 10: 12, 12: 1, 14: 1}
"""Phrases with a measurable box in its five captions -> how many of the same images have so many."""
CAPTIONS = 5
_NAMED = ("dog", "cat", "bus")
_WORDS = ("a", "man", "dog", "red", "mat", "next", "to", "small", "cat", "on", "the", "street", "with", "bus", "two")
_GRAIN = 32.0  # files of about 160 kB, as COCO has in the mean, that take as long to decode
_VARIANTS = 16


def write_photo_shards(folder: Path, images: int, seed: int = 0) -> Manifest:
    """Write `images` samples; the same number and seed give the same bytes.

    The images are smooth structures under the grain of a camera, so that decoding them costs what a photograph costs.
    """
    samples = draw_photos(images, seed)
    return write_shards(samples, folder, name="photos", excluded=Counter(), progress=False)


def write_captioned_photo_shards(folder: Path, images: int, seed: int = 0) -> Manifest:
    """Write `images` samples with five captions and the boxes that their phrases name, likewise."""
    samples = _captioned_photos(images, seed)
    return write_shards(samples, folder, name="captioned photos", excluded=Counter(), progress=False)


def _captioned_photos(images: int, seed: int) -> Iterator[Sample]:
    chance = random.Random(seed)
    for sample in draw_photos(images, seed):
        (phrases,) = chance.choices(list(PHRASES), cum_weights=list(accumulate(PHRASES.values())))
        captions, regions = [], []
        for number in range(CAPTIONS):
            # The first object is named by as many captions as there are, the next ones by the rest.
            named = _NAMED[: len(range(number, phrases, CAPTIONS))]
            captions.append(" ".join((*named, *chance.choices(_WORDS, k=_words(chance) - len(named)))))
        for place, label in enumerate(_NAMED[: -(-phrases // CAPTIONS)]):
            start = len(" ".join((*_NAMED[:place], "")))
            span = (start, start + len(label))
            naming = range(min(CAPTIONS, phrases - place * CAPTIONS))
            left, top, width, height = (chance.uniform(*ends) for ends in ((90, 250), (20, 180), (90, 300), (90, 290)))
            regions.append(Region(label, (left, top, width, height), dict.fromkeys(naming, (span,))))
        yield Sample(sample.key, sample.image, SIZE, tuple(captions), tuple(regions))


def _words(chance: random.Random) -> int:
    (tokens,) = chance.choices(list(CAPTION_TOKENS), cum_weights=list(accumulate(CAPTION_TOKENS.values())))
    return tokens - 2


def draw_photos(images: int, seed: int) -> Iterator[Sample]:
    """Draw the samples of `write_photo_shards`."""
    chance = random.Random(seed)
    files = [_jpeg(np.random.default_rng((seed, variant))) for variant in range(min(images, _VARIANTS))]
    for number in range(images):
        caption = " ".join(chance.choices(_WORDS, k=_words(chance)))
        yield Sample(f"{number:06d}", files[number % len(files)], SIZE, (caption,))


def _jpeg(rng: np.random.Generator) -> bytes:
    width, height = SIZE
    structure = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    pixels = np.asarray(structure.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = pixels + rng.normal(0.0, _GRAIN, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()
