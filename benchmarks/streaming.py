"""What streaming from shards costs beside decoding, and how fast a resumed run passes over samples; keeps a table.

    python benchmarks/streaming.py                          # about two minutes on a free core
    python benchmarks/streaming.py --photos coco/train2017  # on these JPEGs

One process and one thread, as in a worker. Streaming is `TrainingDataset`: read the shard, group its members, parse the
record, decode, transform, tokenise, make batches. Beside it stands a loop that decodes and transforms the same JPEGs,
which lie in memory, and does nothing else. The two take turns, an epoch each, and the ratio is the median over the
rounds. Without `--photos` the JPEGs are drawn, as large as COCO's and as costly to decode.

Seconds are those in which the process worked: on a free core all that pass, since the files lie in the page cache.
What a worker waits for its storage comes on top. Samples are passed over in an epoch of a hundred shards, all of them
the same file.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kept_table import keep

ROUNDS = 5
SHARDS = 100
CAPTION = "a man riding a wave on top of a surfboard"


def write_samples(folder: Path, images: int, photos: Path | None) -> Any:
    """Shards of `images` samples: drawn ones, or the JPEGs of a folder, in turn where they are fewer."""
    from photo_shards import write_photo_shards

    from lightning_xai.data import write_shards

    if photos is None:
        return write_photo_shards(folder, images)
    return write_shards(_samples(photos, images), folder, name="photos", samples_per_shard=images, progress=False)


def _samples(photos: Path, images: int) -> Iterator[Any]:
    from PIL import Image

    from lightning_xai.data import Sample

    files = sorted(photos.rglob("*.jpg"))
    if not files:
        raise SystemExit(f"{photos}: no .jpg files there")
    for number in range(images):
        path = files[number % len(files)]
        with Image.open(path) as image:
            yield Sample(f"{number:06d}", path.read_bytes(), image.size, (CAPTION,))


def measure_streaming(folder: Path, manifest: Any) -> tuple[float, float, list[float]]:
    """Samples per second, medians: streamed, and decoded from memory; and the ratio of each round."""
    import open_clip

    from lightning_xai.data import CaptionTokenizer, ImageTransform
    from lightning_xai.data.batch import TrainingCollate
    from lightning_xai.data.dataset import TrainingDataset
    from lightning_xai.data.shard_reader import read_samples

    transform = ImageTransform(size=(224, 224))
    collate = TrainingCollate(transform, CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32")))
    dataset = TrainingDataset(folder, manifest, collate, batch_size=32)
    samples: dict[int, Any] = dict(read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples))
    rates = []
    for epoch in range(ROUNDS + 1):
        dataset.seek(epoch)
        begin = time.process_time()
        rows = [row for batch in dataset for row in batch.index.tolist()]
        middle = time.process_time()
        decode([samples[row].image for row in rows], transform)
        rates.append((len(rows) / (middle - begin), len(rows) / (time.process_time() - middle)))
    rates = rates[1:]  # the first warms up
    streamed, decoded = (statistics.median(column) for column in zip(*rates, strict=True))
    return streamed, decoded, [one / other for one, other in rates]


def decode(jpegs: Sequence[bytes], transform: Any) -> None:
    """Decode and transform, written plainly."""
    from PIL import Image

    for data in jpegs:
        with Image.open(io.BytesIO(data)) as image:
            transform(image.convert("RGB"))


@dataclass(frozen=True)
class Undecoded:
    """Stands in for the collate: the batch is its records, so that only reading is timed."""

    seed: int = 0

    def __call__(self, records: Sequence[Any], epoch: int = 0) -> Any:
        """The records."""
        return records


def measure_skipping(folder: Path, shard: Any) -> list[tuple[str, float]]:
    """Samples that are passed over per second, until the first one that is read is there.

    Args:
        folder: takes links to the file.
        shard: its entry in a manifest.
    """
    from lightning_xai.data import Manifest
    from lightning_xai.data.dataset import TrainingDataset
    from lightning_xai.data.shard_reader import read_samples

    entries = [replace(shard, name=f"link-{number:06d}.tar") for number in range(SHARDS)]
    for entry in entries:
        (folder / entry.name).symlink_to(shard.name)
    manifest = Manifest("links", tuple(entries), (), {}, SHARDS * shard.samples)
    last = shard.samples - 1
    seconds = _seconds(lambda: _first(read_samples(folder, manifest, [0], last, last + 1)))
    rates = [("by headers, inside one shard", last / seconds)]
    collate: Any = Undecoded()
    for buffer in (0, 1000):
        dataset = TrainingDataset(folder, manifest, collate, batch_size=1, shuffle_buffer=buffer)
        skipped = manifest.samples // 2
        dataset.seek(0, skipped)
        seconds = _seconds(partial(_first, dataset))
        rates.append((f"resuming in the middle of an epoch, shuffle buffer {buffer}", skipped / seconds))
    return rates


def _first(records: Iterable[Any]) -> None:
    next(iter(records))


def _seconds(action: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        action()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def table(images: int, photos: Path | None) -> str:
    """All measurements as Markdown."""
    import torch

    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        manifest = write_samples(folder, images, photos)
        streamed, decoded, ratios = measure_streaming(folder, manifest)
        skipped = measure_skipping(folder, manifest.shards[0])
    size = manifest.bytes / manifest.samples / 1e3
    skipped_samples = SHARDS * manifest.shards[0].samples
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    lines = [
        f"{manifest.samples:,} samples of {size:.0f} kB ({'drawn' if photos is None else photos.name}), one process, "
        f"one thread, medians of {ROUNDS} rounds.",
        "",
        "| | samples/s | of decoding |",
        "|---|---|---|",
        f"| JPEGs in memory, decoded and transformed | {decoded:.1f} | 1.00 |",
        f"| streamed: read, parsed, decoded, transformed, tokenised, batched | {streamed:.1f} | "
        f"{statistics.median(ratios):.2f} ({spread}) |",
        "",
        f"| passed over, in an epoch of {skipped_samples:,} samples | samples/s |",
        "|---|---|",
        *(f"| {title} | {rate:,.0f} |" for title, rate in skipped),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs, searched through; default: drawn ones")
    parser.add_argument("--images", type=int, default=512, help="samples of an epoch, at most 1000")
    options = parser.parse_args()
    keep("streaming", "Streaming and skipping", "cpu", table(options.images, options.photos))


if __name__ == "__main__":
    main()
