"""What streaming from shards costs beside decoding, and how fast a resumed run passes over samples; keeps a table.

    python benchmarks/streaming.py                          # about two minutes on a free core
    python benchmarks/streaming.py --photos coco/train2017  # on these JPEGs

One process and one thread, as in a worker. Streaming is `TrainingDataset`: read the shard, group its members, parse the
record, decode, transform, tokenise, make batches; of the same photos as they are, and as `prepare --short_side` stores
them. The comparison is a loop that decodes the JPEGs, which lie in memory, transforms them as open_clip does, and
does nothing else. All take turns, an epoch each, and ratios are medians over rounds. Without `--photos`, JPEGs are
drawn, as large as COCO's and as costly to decode.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kept_table import keep

ROUNDS = 5
SHARDS = 100
SHORT_SIDE = 288
CAPTION = "a man riding a wave on top of a surfboard"
IN_MEMORY, STREAMED, RESIZED = (
    "JPEGs in memory, decoded and transformed as open_clip does",
    "streamed: read, parsed, decoded, transformed, tokenised, batched",
    f"streamed from shards prepared with `--short_side {SHORT_SIDE}`",
)


def write_samples(folder: Path, images: int, photos: Path | None, short_side: int | None = None) -> Any:
    """Shards of `images` samples: drawn ones, or the JPEGs of a folder, in turn where they are fewer."""
    from photo_shards import draw_photos

    from lightning_xai.data import write_shards
    from lightning_xai.data.photo_size import PhotoSize

    samples = draw_photos(images, 0) if photos is None else _samples(photos, images)
    photo_size = None if short_side is None else PhotoSize(short_side)
    return write_shards(samples, folder, name="photos", samples_per_shard=images, progress=False, photo_size=photo_size)


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


def measure_streaming(folders: Mapping[str, tuple[Path, Any]]) -> dict[str, list[float]]:
    """Samples per second in each round, in turn: of JPEGs in memory, and streamed from each set of shards.

    Args:
        folders: title -> folder of shards and its manifest; the first one has the files that lie in memory.
    """
    import open_clip

    from lightning_xai.data import CaptionTokenizer, ImageTransform
    from lightning_xai.data.batch import TrainingCollate
    from lightning_xai.data.dataset import TrainingDataset
    from lightning_xai.data.shard_reader import read_samples

    transform, tokenizer = ImageTransform(size=(224, 224)), CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))
    datasets = {}
    for title, (folder, manifest) in folders.items():
        # As the data module does.
        resizing = transform if manifest.photos is None else transform.with_resizer("torch")
        datasets[title] = TrainingDataset(folder, manifest, TrainingCollate(resizing, tokenizer), batch_size=32)
    folder, manifest = next(iter(folders.values()))
    samples: dict[int, Any] = dict(read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples))
    jpegs = [sample.image for sample in samples.values()]
    rates: dict[str, list[float]] = {IN_MEMORY: [], **{title: [] for title in folders}}
    for epoch in range(ROUNDS + 1):
        rates[IN_MEMORY].append(len(jpegs) / _seconds(partial(decode, jpegs), 1))
        for title, dataset in datasets.items():
            dataset.seek(epoch)
            rates[title].append(manifest.samples / _seconds(partial(_pass_over, dataset), 1))
    return {title: column[1:] for title, column in rates.items()}  # the first warms up


def decode(jpegs: Sequence[bytes]) -> None:
    """Decode and transform, written plainly, with open_clip's transform."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    transform = image_transform_v2(PreprocessCfg(size=224), is_train=False)
    for data in jpegs:
        with Image.open(io.BytesIO(data)) as image:
            transform(image.convert("RGB"))


def _pass_over(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


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


def _seconds(action: Callable[[], Any], rounds: int | None = None) -> float:
    seconds = []
    for _ in range(ROUNDS if rounds is None else rounds):
        begin = time.process_time()
        action()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def table(images: int, photos: Path | None) -> str:
    """All measurements as Markdown."""
    import torch

    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name) / "shards", Path(name) / "small"
        manifest = write_samples(folder, images, photos)
        resized = write_samples(small, images, photos, SHORT_SIDE)
        rates = measure_streaming({STREAMED: (folder, manifest), RESIZED: (small, resized)})
        skipped = measure_skipping(folder, manifest.shards[0])
    size, smaller = (each.bytes / each.samples / 1e3 for each in (manifest, resized))
    skipped_samples = SHARDS * manifest.shards[0].samples
    lines = [
        f"{manifest.samples:,} samples of {size:.0f} kB ({'drawn' if photos is None else photos.name}), and of "
        f"{smaller:.0f} kB with `--short_side {SHORT_SIDE}`; one process, one thread, medians of {ROUNDS} rounds.",
        "",
        "| | samples/s | of those in memory | of those streamed as they are |",
        "|---|---|---|---|",
        *(f"| {title} | {_rates(rates, title)} |" for title in rates),
        "",
        f"| passed over, in an epoch of {skipped_samples:,} samples | samples/s |",
        "|---|---|",
        *(f"| {title} | {rate:,.0f} |" for title, rate in skipped),
    ]
    return "\n".join(lines)


def _rates(rates: Mapping[str, Sequence[float]], title: str) -> str:
    """The median of a row, and its ratios to two others with their spread over the rounds."""
    cells = [f"{statistics.median(rates[title]):.1f}"]
    for other in (IN_MEMORY, STREAMED):
        ratios = [one / base for one, base in zip(rates[title], rates[other], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return " | ".join(cells)


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs, searched through; default: drawn ones")
    parser.add_argument("--images", type=int, default=512, help="samples of an epoch, at most 1000")
    options = parser.parse_args()
    keep("streaming", "Streaming and skipping", "cpu", table(options.images, options.photos))


if __name__ == "__main__":
    main()
