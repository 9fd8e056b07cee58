"""Shards of small captioned images for tests of what streams them, some of which do not decode."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_xai.data.batch import Batch
from lightning_xai.data.sample import Region, Sample
from lightning_xai.data.shards import write_shards
from lightning_xai.models.image_transform import ImageTransform

TRANSFORM = ImageTransform(size=(8, 8))


def jpeg(seed: int, mode: str = "RGB") -> bytes:
    shape = (12, 12, 3) if mode == "RGB" else (12, 12)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def grey_sample(key: str = "a", captions: tuple[str, ...] = ("a photo",), **changes: Any) -> Sample:
    """A sample of 64 x 48 grey pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), "grey").save(stream, "PNG")
    return Sample(key, stream.getvalue(), (64, 48), captions, source=f"test/{key}.png", **changes)


def make_samples(count: int, broken: Iterable[int] = ()) -> Iterator[Sample]:
    """Sample i has key k{i}; broken ones have an image that ends in the middle; every seventh is greyscale."""
    for i in range(count):
        image = jpeg(i, "L" if i % 7 == 3 else "RGB")
        if i in set(broken):
            image = image[:-20]
        captions = (f"a dog number {i}", f"the cat {i}", f"nothing {i}")
        regions = (
            Region("dog", (2, 2, 6, 6), {0: ((2, 5),)}),
            Region("cat", (4, 4, 6, 6), {1: ((4, 7),)}),
        )
        yield Sample(f"k{i}", image, (12, 12), captions, regions, source=f"test/{i}.jpg")


def make_shards(folder: Path, count: int, per_shard: int = 10, broken: Iterable[int] = ()) -> Path:
    write_shards(make_samples(count, broken), folder, name="test", samples_per_shard=per_shard, progress=False)
    return folder


def keys(batches: Iterable[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]
