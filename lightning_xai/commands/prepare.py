"""`prepare`: convert COCO, Flickr30k, HNC and others to shards; `prepare shapes` makes a data set, no download."""

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


def prepare_hnc_shards(
    images: Path,
    captions: Path,
    split: str,
    out: Path,
    types: str = "relation_subj+relation_obj+relation_pred",
    scene_graphs: Path | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> None:
    """Convert HNC: captions made from GQA's scene graphs, and hard negatives that are wrong about one object.

    Args:
        images: folder of GQA's image files.
        captions: the split's JSON file (hnc_clean_strict_val.json).
        split: name of the split.
        out: folder to make.
        types: caption types to take, joined by "+", or all; the default are the "<subject> <predicate> <object>"
            captions of the papers.
        scene_graphs: GQA's train_sceneGraphs.json or val_sceneGraphs.json. Only objects that are the single one of
            their class are measured; without this file, those that no caption mentions are not counted.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.hnc import prepare_hnc

    manifest = prepare_hnc(
        images=images,
        captions=captions,
        out=out,
        split=split,
        types=types,
        scene_graphs=scene_graphs,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


def prepare_conceptual_captions_shards(
    split: str,
    out: Path,
    captions: Path | None = None,
    images: Path | None = None,
    shards: Path | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> None:
    """Convert Conceptual Captions after its images were fetched: one caption an image, no boxes; nothing is downloaded.

    Args:
        split: name of the split: train or val.
        out: folder to make.
        captions: TSV file without header, each line a caption, a tab and the path of the image below --images (which
            has to be given, too). Lines with an address in place of the path were not fetched: they are counted.
        images: folder that the paths in --captions start from.
        shards: instead of both, the folder that `img2dataset --output_format webdataset` wrote: tar files with .jpg,
            .txt and .json members.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.conceptual_captions import prepare_conceptual_captions

    manifest = prepare_conceptual_captions(
        out=out,
        split=split,
        captions=captions,
        images=images,
        shards=shards,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


def prepare_ms_cxr_shards(
    images: Path,
    annotations: Path,
    out: Path,
    split: str | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> None:
    """Convert MS-CXR: phrases of radiology reports and the boxes that radiologists drew for each.

    Args:
        images: folder of MIMIC-CXR-JPG that holds files/ (or that folder itself), in the original resolution.
        annotations: MS_CXR_Local_Alignment_v1.1.0.json or .csv.
        out: folder to make.
        split: train, val, test, or several joined by "+" (from version 1.1.0 on); all annotations by default.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.ms_cxr import prepare_ms_cxr

    manifest = prepare_ms_cxr(
        images=images,
        annotations=annotations,
        out=out,
        split=split,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


def prepare_roco_shards(
    folder: Path, split: str, out: Path, samples_per_shard: int = 1000, overwrite: bool = False
) -> None:
    """Convert ROCO: radiology images with one caption each, no boxes.

    Args:
        folder: folder of the splits; each holds radiology/captions.txt and radiology/images/.
        split: which of them: train, validation or test.
        out: folder to make.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.roco import prepare_roco

    manifest = prepare_roco(folder, out, split, samples_per_shard, overwrite)
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


def prepare_rsicd_shards(
    images: Path, karpathy: Path, split: str, out: Path, samples_per_shard: int = 1000, overwrite: bool = False
) -> None:
    """Convert RSICD: aerial images with five captions each, no boxes.

    Args:
        images: folder of the image files (RSICD_images).
        karpathy: dataset_rsicd.json, which has the form of the Karpathy splits.
        split: train, val, test, or several joined by "+".
        out: folder to make.
        samples_per_shard: images in a shard.
        overwrite: replace a folder of shards that is there already.
    """
    from lightning_xai.data.shards import describe
    from lightning_xai.data.sources.rsicd import prepare_rsicd

    manifest = prepare_rsicd(images, karpathy, out, split, samples_per_shard, overwrite)
    print(describe(manifest))  # noqa: T201 - the summary is the command's output


SOURCES: dict[str, Callable[..., Any]] = {
    "shapes": prepare_shapes_shards,
    "coco": prepare_coco_shards,
    "flickr30k": prepare_flickr30k_shards,
    "hnc": prepare_hnc_shards,
    "conceptual-captions": prepare_conceptual_captions_shards,
    "ms-cxr": prepare_ms_cxr_shards,
    "roco": prepare_roco_shards,
    "rsicd": prepare_rsicd_shards,
}
"""`prepare NAME` calls the function; its parameters are the options, its docstring the help."""
