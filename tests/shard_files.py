"""Shards for tests, written by the package or by hand."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_xai.data.sample import RecordError, Region, Sample, encode_sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest, ShardEntry, write_shards


def make_sample(number: int, image_format: str = "JPEG", key: str | None = None) -> Sample:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, image_format)
    caption = f"dog {number} ünder a cat"
    return Sample(
        key=key or f"sample_{number:04d}",
        image=file.getvalue(),
        size=(8, 6),
        captions=(caption, "nothing to see"),
        regions=(
            Region("dog", (0.5, 1.0, 3.25, 2.0), {0: ((0, 3),)}),
            Region("cat", (4.0, 0.0, 4.0, 6.0), {0: ((len(caption) - 3, len(caption)),)}, crowd=number % 2 == 0),
        ),
        source=f"made/{number}",
    )


def make_samples(count: int) -> list[Sample]:
    return [make_sample(number, ("JPEG", "PNG", "WEBP")[number % 3]) for number in range(count)]


def write(out: Path, samples: Sequence[Sample], samples_per_shard: int = 4) -> Manifest:
    return write_shards(samples, out, name="made", samples_per_shard=samples_per_shard, progress=False)


def read(folder: Path, manifest: Manifest) -> list[Sample | RecordError]:
    return [item for _, item in read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)]


def write_by_hand(folder: Path, members: Sequence[tuple[str, bytes]], samples: int) -> Manifest:
    """A shard with any members at all, and a manifest that claims `samples` records."""
    folder.mkdir()
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Manifest("made", (ShardEntry(path.name, samples, path.stat().st_size, "0" * 64),), (), {}, samples)


def members_of(sample: Sample) -> list[tuple[str, bytes]]:
    return [(f"{sample.key}.{extension}", data) for extension, data in sorted(encode_sample(sample).items())]
