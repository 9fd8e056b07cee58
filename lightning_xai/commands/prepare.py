"""`prepare`: convert a data set to shards, which training and evaluation read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare_shapes_shards(out: Path, train: int | None = None, val: int | None = None, seed: int = 0) -> None:
    """Make the embedded world of coloured shapes: images, captions, boxes and phrases.

    Args:
        out: folder to make; train/ and val/ come below it.
        train: number of training images (default: as the demo uses).
        val: number of validation images.
        seed: the same seed gives the same bytes.
    """
    from lightning_xai.data.shapes import TRAIN_SAMPLES, VAL_SAMPLES, prepare_shapes
    from lightning_xai.data.shards import Manifest, describe

    prepare_shapes(out, TRAIN_SAMPLES if train is None else train, VAL_SAMPLES if val is None else val, seed)
    for split in ("train", "val"):
        print(describe(Manifest.load(out / split)))  # noqa: T201 - the summary is the command's output


def prepare_coco_shards(
    images: Path,
    captions: Path,
    instances: Path,
    split: str,
    out: Path,
    karpathy: Path | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> None:
    """Convert COCO 2014 or 2017: five captions an image, all boxes, and where captions name their classes.

    Args:
        images: folder of the image files.
        captions: annotations/captions_*.json.
        instances: annotations/instances_*.json.
        split: name of the split; with `karpathy` the split to take: train, restval, val, test, or several
            joined by "+" (COCO 2014 keeps restval among the images and annotations of val2014).
        out: folder to make.
        karpathy: dataset_coco.json of the Karpathy splits.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.coco import prepare_coco

    manifest = prepare_coco(
        images=images,
        captions=captions,
        instances=instances,
        out=out,
        split=split,
        karpathy=karpathy,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


def prepare_flickr30k_shards(
    images: Path,
    entities: Path,
    split: str,
    out: Path,
    karpathy: Path | None = None,
    leave_out_unrelated: bool = False,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> None:
    """Convert Flickr30k with the boxes of Flickr30k Entities: five captions an image, phrases marked by hand.

    Args:
        images: folder of the image files (flickr30k-images).
        entities: folder of Flickr30k Entities: Sentences/ and Annotations/ (unpack annotations.zip there) beside
            train.txt, val.txt and test.txt.
        split: train, val, test, or several joined by "+".
        out: folder to make.
        karpathy: dataset_flickr30k.json of the Karpathy splits, instead of the lists; captions are those of Entities.
        leave_out_unrelated: leave out the captions that UNRELATED_CAPTIONS lists.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.flickr30k import prepare_flickr30k

    manifest = prepare_flickr30k(
        images=images,
        entities=entities,
        out=out,
        split=split,
        karpathy=karpathy,
        leave_out_unrelated=leave_out_unrelated,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


SOURCES: dict[str, Callable[..., Any]] = {
    "shapes": prepare_shapes_shards,
    "coco": prepare_coco_shards,
    "flickr30k": prepare_flickr30k_shards,
}
"""`prepare NAME` calls the function; its parameters are the options, its docstring the help."""
