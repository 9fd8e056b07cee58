"""The inputs of the scaling tables that are measured: what a pair costs to store and to read, and what a shard does."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from scaling_formulas import DataMeasures

BATCH = 32
SAMPLES = 2048
SHARDS = 50_000
_SHA256 = "0123456789abcdef" * 4


def measure(folder: Path, model: str) -> DataMeasures:
    """Measure a folder of shards, as the model reads it, and a manifest of many shards."""
    from lightning_xai.data import Manifest

    manifest = Manifest.load(folder)
    with tempfile.TemporaryDirectory() as name:
        size, seconds, memory = measure_manifest(Path(name), SHARDS)
    return DataMeasures(
        bytes_per_sample=manifest.bytes / manifest.samples,
        reader_rate=measure_reader(folder, manifest, model, SAMPLES),
        manifest_bytes=size,
        manifest_seconds=seconds,
        manifest_memory=memory,
    )


def measure_reader(folder: Path, manifest: Any, model: str, samples: int) -> float:
    """Samples per second of a core that reads, decodes, transforms and collates; at least `samples` are read.

    Its seconds are those in which the core worked: what a worker waits for the storage is another row of the tables.
    """
    import torch

    from lightning_xai.data.batch import TrainingCollate
    from lightning_xai.data.dataset import TrainingDataset
    from lightning_xai.models import load_dual_encoder

    torch.set_num_threads(1)  # as in a worker
    encoder = load_dual_encoder(model)
    collate = TrainingCollate(encoder.image_transform, encoder.tokenizer)
    dataset = TrainingDataset(folder, manifest, collate, batch_size=min(BATCH, manifest.samples), shuffle_buffer=0)

    def batches() -> Iterator[Any]:
        for epoch in cycle(range(1 << 20)):
            dataset.seek(epoch)
            yield from dataset

    stream = batches()
    next(stream)
    begin = time.process_time()
    read = sum(len(batch.images) for batch in islice(stream, -(-samples // dataset.batch_size)))
    return read / (time.process_time() - begin)


def measure_manifest(folder: Path, shards: int) -> tuple[float, float, float]:
    """For each shard of a manifest that lists `shards`: bytes of its file, seconds to open it, bytes of memory.

    The shards' files are there, and empty but in size.
    """
    from lightning_xai.data import Manifest
    from lightning_xai.data.shards import MANIFEST_NAME, ShardEntry

    entries = tuple(ShardEntry(f"shard-{number:06d}.tar", 1000, 162_000_000, _SHA256) for number in range(shards))
    for entry in entries:
        with (folder / entry.name).open("wb") as file:
            file.truncate(entry.bytes)
    Manifest("synthetic", entries, (), {}, 5000 * shards).save(folder)
    begin = time.process_time()
    Manifest.load(folder)
    seconds = time.process_time() - begin
    tracemalloc.start()
    kept = Manifest.load(folder)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(kept.shards) == shards
    return (folder / MANIFEST_NAME).stat().st_size / shards, seconds / shards, memory / shards
