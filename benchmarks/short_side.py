"""What `prepare --short_side` does to embeddings, gamma and rho; prints and keeps a table.

    python benchmarks/short_side.py --shards data/coco/val                    # ViT-B-32 with random weights
    python benchmarks/short_side.py --model runs/demo/checkpoints/last.ckpt   # trained; on shapes drawn at 183 pixels

Photos of prepared shards are written once more at several sizes and qualities. The model embeds each version, and
feature-pair attribution at the last blocks measures the same phrases; everything is compared with the plain shards.
Without `--shards`, images are `shapes` of 183 pixels, of which a model of 64 pixels stands to a short side of 82 as one
of 224 to 288.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept_table import keep

DRAWN = 183


@dataclass
class Measured:
    """A version of the data.

    Attributes:
        kilobytes: of a sample in its shard.
        embeddings: [N, K] of the images, of length 1.
        values: metric -> phrase -> value, of the phrases that were measured.
    """

    kilobytes: float
    embeddings: Any
    values: dict[str, dict[str, float]]


def read(folder: Path, count: int) -> Iterator[Any]:
    """The first samples of shards."""
    from lightning_xai.data import Manifest
    from lightning_xai.data.shard_reader import read_samples

    manifest = Manifest.load(folder)
    for _, sample in read_samples(folder, manifest, range(len(manifest.shards)), 0, min(count, manifest.samples)):
        yield sample


def measure(folder: Path, encoder: Any, resizer: str | None = None) -> Measured:
    """Embed and measure a set of shards, with the resizer that the data module takes, or another."""
    import torch

    from lightning_xai.attribution import FeaturePairAttribution
    from lightning_xai.data import ShardDataModule
    from lightning_xai.evaluation.embeddings import Embeddings
    from lightning_xai.evaluation.rows import maps_of, measure_batch
    from lightning_xai.metrics.registry import choose_metrics

    data = ShardDataModule(test=folder, eval_batch_size=16, num_workers=0)
    transform = encoder.image_transform
    data.bind(transform if resizer is None else transform.with_resizer(resizer), encoder.tokenizer)
    data.setup("test")
    maps = maps_of(FeaturePairAttribution(encoder), 64)
    metrics = list(choose_metrics(["grounding"], {}).values())
    parts, values = [], {"gamma": dict[str, float](), "rho": dict[str, float]()}
    for batch in data.test_dataloader():
        with maps.forward_pass():
            embeddings = Embeddings.of(encoder, batch)
        parts.append(encoder.encode_image(batch.images).detach())
        for phrase, metric, value, excluded in measure_batch(batch, maps, metrics, embeddings).values:
            if not excluded:
                values[metric][phrase] = value
    manifest = data.manifest("test")
    unit = torch.nn.functional.normalize(torch.cat(parts).double(), dim=1)
    return Measured(manifest.bytes / manifest.samples / 1e3, unit, values)


def row(title: str, plain: Measured, other: Measured) -> str:
    """A row of the table: a version compared with the plain shards."""
    cosines = (plain.embeddings * other.embeddings).sum(dim=1)
    gamma, rho = plain.values["gamma"], plain.values["rho"]
    both = sorted(gamma.keys() & other.values["gamma"].keys())
    moved = [abs(other.values["gamma"][phrase] - gamma[phrase]) for phrase in both]
    changed = sum(other.values["rho"][phrase] != rho[phrase] for phrase in both)
    own = other.values["gamma"].values()
    cells = [
        title,
        f"{other.kilobytes:.0f}",
        f"{float(cosines.mean()):.5f}; {float(cosines.min()):.5f}",
        f"{sum(moved) / len(moved):.4f}; {max(moved):.3f}",
        f"{changed} of {len(both)}",
        f"{sum(value > 0.5 for value in own) / len(own):.1%}",
        f"{sum(other.values['rho'].values()) / len(own):.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def table(model: str, shards: Path | None, images: int, short_side: int) -> str:
    """All measurements as Markdown."""
    import torch

    from lightning_xai.data import write_shards
    from lightning_xai.data.photo_size import PhotoSize
    from lightning_xai.data.shapes import read_shapes
    from lightning_xai.models import load_dual_encoder

    torch.manual_seed(0)
    encoder = load_dual_encoder(model).eval()
    lines = [
        "| stored | kB a sample | cosine of image embeddings with the plain one's: mean; least | gamma moves by: mean; "
        "most | rho changes | gamma > 0.5 | rho |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def write(title: str, photo_size: PhotoSize | None) -> Path:
            samples = read_shapes("val", images, 0, DRAWN) if shards is None else read(shards, images)
            write_shards(samples, folder / title, name="bench", progress=False, photo_size=photo_size)
            return folder / title

        path = write("plain", None)
        plain = measure(path, encoder)
        lines.append(row("plain", plain, plain))
        lines.append(row("plain, resized by torch", plain, measure(path, encoder, "torch")))
        for quality in (95, 90, 75):
            small = measure(write(f"quality-{quality}", PhotoSize(short_side, quality)), encoder)
            lines.append(row(f"short side {short_side}, quality {quality}", plain, small))
    count = len(plain.embeddings)
    what = f"shapes drawn at {DRAWN} pixels" if shards is None else "photos"
    weights = "trained weights" if Path(model).suffix == ".ckpt" else "random weights"
    return "\n".join([f"{count} {what}, {weights}.", "", *lines])


def main() -> None:
    """Measure, print, and keep the table under benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name, a model config or a checkpoint")
    parser.add_argument("--shards", type=Path, help="folder of plain shards; without it, shapes are drawn")
    parser.add_argument("--images", type=int, default=128, help="images, at most")
    parser.add_argument("--short-side", type=int, help="288, and 82 for drawn shapes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    drawn = options.shards is None
    side = options.short_side or (82 if drawn else 288)
    measured = table(options.model, options.shards, options.images, side)
    keep(f"short-side{'-shapes' if drawn else ''}", "Photos that are stored smaller", "cpu", measured)


if __name__ == "__main__":
    main()
