"""Reading and preparing small data sets in tests of what reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_xai.cli import main
from lightning_xai.data import Manifest, Sample
from lightning_xai.data.sample import encode_sample
from lightning_xai.data.shard_reader import read_samples


def read_all(read: Callable[..., Iterator[Sample]], **options: Any) -> tuple[list[Sample], dict[str, int]]:
    """All samples of a source, and how many of what could not be used."""
    excluded: Counter[str] = Counter()
    samples = list(read(**options, excluded=excluded))
    for sample in samples:
        encode_sample(sample)  # every sample keeps the contract
    return samples, dict(+excluded)


def prepare(name: str, out: Path, **options: Any) -> tuple[Manifest, list[Sample]]:
    """The manifest and the samples of a data set that the command line has prepared."""
    given = {name: value for name, value in options.items() if value is not None}
    main(["prepare", name, f"--out={out}", *(f"--{option}={value}" for option, value in given.items())])
    manifest = Manifest.load(out)
    records = read_samples(out, manifest, range(len(manifest.shards)), 0, manifest.samples)
    return manifest, [sample for _, sample in records if isinstance(sample, Sample)]
