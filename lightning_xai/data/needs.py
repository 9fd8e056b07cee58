"""What training batches hold in addition to images and captions, and whether a data set has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_xai.data.object_swaps import object_swaps
from lightning_xai.data.sample import HardNegative, Sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shard_store import ShardStore
from lightning_xai.data.shards import Manifest

__all__ = ["BatchNeeds", "find_missing", "hard_negatives"]

_ANNOTATED = (
    "prepare the data with their annotation of objects (`prepare coco --instances=FILE`, for example), or train "
    "without this objective"
)
_SEARCHED = 1000  # samples: where none of so many serves an objective, it would hardly ever have anything to do


@dataclass(frozen=True)
class BatchNeeds:
    """What training batches hold in addition to images and captions.

    Attributes:
        phrases: phrases that name objects.
        boxes: phrases are of use only where their object has a box.
        negatives: most hard negatives of an image; 0: none.
        swap_objects: hard negatives are also made from captions, see `lightning_xai.data.object_swaps`.
        phrase_tokens: phrases, where there are any, are also tokenised as separate captions (`Phrases.tokens`).

    Example:
        >>> BatchNeeds(phrases=True) | BatchNeeds(negatives=2)
        BatchNeeds(phrases=True, boxes=False, negatives=2, swap_objects=False, phrase_tokens=False)
    """

    phrases: bool = False
    boxes: bool = False
    negatives: int = 0
    swap_objects: bool = False
    phrase_tokens: bool = False

    @property
    def any_phrases(self) -> bool:
        """Whether batches hold phrases at all."""
        return self.phrases or self.phrase_tokens

    def __or__(self, other: BatchNeeds) -> BatchNeeds:
        return BatchNeeds(
            self.phrases or other.phrases,
            self.boxes or other.boxes,
            max(self.negatives, other.negatives),
            self.swap_objects or other.swap_objects,
            self.phrase_tokens or other.phrase_tokens,
        )


def hard_negatives(
    sample: Sample,
    captions: Sequence[str],
    label_names: Sequence[str],
    *,
    swap_objects: bool,
    draw: tuple[int, ...] = (),
) -> list[HardNegative]:
    """The stored hard negatives of a sample's first captions, and those made from them if `swap_objects`."""
    stored = [negative for negative in sample.negatives if negative.caption < len(captions)]
    return stored + (object_swaps(sample, captions, label_names, draw) if swap_objects else [])


def find_missing(
    needs: BatchNeeds, store: ShardStore, manifest: Manifest, captions_per_image: int | None = None
) -> str:
    """Search the first samples of a data set for what training batches have to hold.

    Args:
        needs: what is searched for.
        store: the shards.
        manifest: their manifest.
        captions_per_image: only the first so many captions of an image take part; None: all.

    Returns:
        What none of the first 1,000 samples has, and what to do about it, as the end of a sentence that begins with
        who needs it; empty where everything is there.
    """
    wanted = {name for name in ("phrases", "boxes", "negatives") if getattr(needs, name)}
    read, searched = 0, min(_SEARCHED, manifest.samples)
    # Image after image, so that data which have all of it cost the first few records.
    records = read_samples(store, manifest, range(len(manifest.shards)), 0, searched) if wanted else iter(())
    for _, sample in records:
        if isinstance(sample, Sample):
            read += 1
            wanted -= set(_kinds(sample, sample.captions[:captions_per_image], needs, manifest.labels))
        if not wanted:
            return ""
    if not read:  # nothing can be read, which training itself will say
        return ""
    none = f"none of the {'first ' if searched < manifest.samples else ''}{read:,} samples of {store} has"
    if "phrases" in wanted:
        return f"phrases that name objects, and {none} one: {_ANNOTATED}"
    if "boxes" in wanted:
        return f"boxes of the objects that captions name, and {none} one: {_ANNOTATED}"
    if needs.swap_objects:
        return (
            f"hard negatives, and {none} one or a caption that one can be made from: that takes an object with a box "
            "that is the only one of its class and that the caption names once, and classes that the image lacks "
            "(Flickr30k's entities have too coarse classes); take other data, such as COCO or HNC"
        )
    return (
        f"hard negatives, and {none} one: set its option swap_objects to true, which makes them from captions and "
        "boxes, or take data that have some, such as HNC"
    )


def _kinds(sample: Sample, captions: Sequence[str], needs: BatchNeeds, label_names: Sequence[str]) -> Iterator[str]:
    """What one sample has of phrases, boxes and negatives."""
    named = [region for region in sample.regions if any(index < len(captions) for index in region.spans)]
    if named:
        yield "phrases"
    if any(region.box is not None for region in named):
        yield "boxes"
    if needs.negatives and hard_negatives(sample, captions, label_names, swap_objects=needs.swap_objects):
        yield "negatives"
