"""The data sets of ROAR+: a training and a validation part of a split, and what methods leave of the training part.

All of it, the original data included, is written as shards of images as the model sees them, so that only the
degradation differs: original and degraded images go through the same steps.

Shape suffixes: N pairs, L caption tokens, H x W the patch grid.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_xai.attribution import Attribution, AttributionMethod
from lightning_xai.data.batch import EvaluationCollate
from lightning_xai.data.dataset import EvaluationDataset
from lightning_xai.data.degradation import cut_through_ties, degrade_image, important_tokens
from lightning_xai.data.excluded import BROKEN_RECORD
from lightning_xai.data.sample import RecordError, Sample, read_image, stable_hash
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest, ShardsExistError, write_shards
from lightning_xai.evaluation.sanity_check import attributions_of
from lightning_xai.heat_maps import upsample
from lightning_xai.models.dual_encoder import DualEncoder

__all__ = ["attribute_pairs", "count_ties", "partition", "read_keys", "write_degraded", "write_original"]

Modality = Literal["image", "text"]
Fill = Literal["model_mean", "image_mean"]

NO_TOKENS = "caption without tokens"


def partition(
    keys: Sequence[str], *, validation: float = 0.2, samples: int | None = None, skip: int = 0, seed: int = 0
) -> tuple[frozenset[str], frozenset[str]]:
    """Draw samples, and split them into a training part, to degrade, and a validation part, to measure on as it is.

    A function of the keys, not of their order: samples are sorted by a hash of seed and key, of which the first
    `skip` are skipped, so that two drawings with the same seed need not overlap.

    Args:
        keys: all keys of a split.
        validation: share of the validation part, rounded to whole samples.
        samples: how many to draw; None for all that are left.
        skip: how many of the sorted samples to skip.
        seed: of the drawing and of the parts.

    Returns:
        The keys of both parts.

    Raises:
        ValueError: there are not that many samples, or a part would be empty.

    Example:
        >>> training, validation = partition([f"key{i}" for i in range(100)], samples=50)
        >>> len(training), len(validation), training & validation
        (40, 10, frozenset())
    """
    if skip < 0 or (samples is not None and samples < 1) or skip + (samples or 1) > len(keys):
        raise ValueError(
            f"the split has {len(keys)} samples: skip (at least 0) and samples (at least 1) have to fit in; got skip "
            f"{skip} and samples {samples}"
        )
    drawn = sorted(keys, key=lambda key: stable_hash("roar sample", seed, key))
    drawn = drawn[skip : None if samples is None else skip + samples]
    drawn.sort(key=lambda key: stable_hash("roar part", seed, key))
    count = round(validation * len(drawn))
    if not 0 < count < len(drawn):
        raise ValueError(
            f"a share of {validation} of {len(drawn)} samples leaves a part empty; give a share between 0 and 1, or "
            "more samples"
        )
    return frozenset(drawn[count:]), frozenset(drawn[:count])


def read_keys(folder: Path, manifest: Manifest) -> tuple[list[str], int]:
    """The keys of all samples of a folder of shards that can be read, and how many cannot."""
    keys = [sample.key for sample in _samples(folder, manifest) if isinstance(sample, Sample)]
    return keys, manifest.samples - len(keys)


def write_original(encoder: DualEncoder, source: Path, keys: frozenset[str], out: Path, name: str) -> Manifest:
    """Write samples of a split as a model sees them: PNG images of its input size, each with its first caption.

    Unusable samples are left out and counted in the manifest. Does nothing if `out` exists.

    Args:
        encoder: the model; its transform leaves the written images as they are.
        source: folder of the split's shards.
        keys: the samples to write.
        out: folder to make.
        name: of the data, for people.

    Raises:
        ShardError: `source` holds no shards, or not one sample could be written.
        ValueError: the photos of `source` were resized, and the model takes larger ones.
    """
    photos = Manifest.load(source).photos
    if photos is not None:
        photos.check(encoder.image_transform, str(source))
    excluded: Counter[str] = Counter()
    return _write(out, name, _originals(encoder, source, keys, excluded), excluded)


def attribute_pairs(
    method: AttributionMethod,
    folder: Path,
    *,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Attribution:
    """Explain each image of a folder of shards and its caption.

    Args:
        method: what explains, and with it the model.
        folder: shards that `write_original` made.
        batch_size: pairs explained at a time; bounds memory, changes no number.
        on_progress: called after each batch with its number of pairs.

    Returns:
        Maps of all N pairs in the order of the shards, on the CPU.

    Raises:
        ValueError: a record that cannot be read, or a map that is not finite.
    """
    encoder = method.encoder
    if not isinstance(encoder, DualEncoder):
        raise ValueError(f"ROAR+ needs a model of images and captions; got a {type(encoder).__name__}")
    manifest = Manifest.load(folder)
    collate = EvaluationCollate(encoder.image_transform, encoder.tokenizer, manifest.labels)
    device = next(encoder.parameters()).device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in EvaluationDataset(folder, manifest, collate, batch_size=batch_size):
            if batch.faults:
                raise ValueError(f"{folder}: {batch.faults[0].message}; delete the folder and run again")
            batch = batch.to(device)
            yield batch.images, batch.tokens
            on_progress(len(batch.images))

    return attributions_of(method, batches())


def count_ties(
    encoder: DualEncoder, source: Path, maps: Attribution, *, pixels: float, tokens: float
) -> dict[str, int]:
    """Count the images and captions in which the cut runs through equal values of the map.

    There the map does not decide which of them to remove: those further up, or earlier, are. Maps that are zero for
    most of an image cause many.

    Args:
        encoder: the model.
        source: shards that `write_original` made.
        maps: of their N pairs, in order.
        pixels: share of an image's pixels that is removed.
        tokens: share of a caption's content tokens that is removed.

    Returns:
        Modality -> pairs.
    """
    captions = [sample.captions[0] for sample in _intact(source, Manifest.load(source))]
    own = encoder.tokenizer.content_mask(encoder.tokenizer.encode(captions))
    images = 0
    for heat in maps.image:
        flat = upsample(heat, encoder.image_transform.size).flatten()
        images += int(cut_through_ties(flat, torch.ones_like(flat, dtype=torch.bool), pixels))
    return {"image": images, "text": int(cut_through_ties(maps.text, own, tokens).sum())}


def write_degraded(
    encoder: DualEncoder,
    source: Path,
    maps: Attribution,
    out: Path,
    *,
    modality: Modality,
    fraction: float,
    fill: Fill = "model_mean",
    name: str,
) -> Manifest:
    """Write a data set without what a method finds most important, in one modality.

    Does nothing if `out` exists. See `data.degradation` for what exactly is removed.

    Args:
        encoder: the model.
        source: shards that `write_original` made.
        maps: of their N pairs, in order.
        out: folder to make.
        modality: what is degraded; the other one stays as it is.
        fraction: of an image's pixels, or of a caption's own tokens.
        fill: the color that pixels get: the mean of each channel that the model's normalisation subtracts, free of
            information; or that over the image itself, which keeps some of the removed color. Tokens become padding.
        name: of the data, for people.

    Raises:
        ValueError: a fraction outside [0, 1], or maps that are not those of the source.
    """
    manifest = Manifest.load(source)
    if len(maps.image) != manifest.samples:
        raise ValueError(f"{source} holds {manifest.samples} pairs; got maps of {len(maps.image)}")
    color = None if fill == "image_mean" else torch.tensor(encoder.image_transform.mean) * 255

    def degraded() -> Iterator[Sample]:
        for row, sample in enumerate(_intact(source, manifest)):
            if modality == "image":
                heat = upsample(maps.image[row], encoder.image_transform.size)
                yield replace(sample, image=_png(degrade_image(_stored_pixels(sample), heat, fraction, color)))
            else:
                own = encoder.tokenizer.content_mask(encoder.tokenizer.encode(sample.captions))[0]
                chosen = important_tokens(maps.text[row], own, fraction)
                yield replace(sample, blanks={0: tuple(chosen.nonzero()[:, 0].tolist())})

    return _write(out, name, degraded(), Counter())


def _write(out: Path, name: str, samples: Iterator[Sample], excluded: Counter[str]) -> Manifest:
    """Write shards, unless they exist or another process is faster, which writes the same."""
    try:
        return write_shards(samples, out, name=name, excluded=excluded, progress=False)
    except ShardsExistError:
        return Manifest.load(out)


def _samples(folder: Path, manifest: Manifest) -> Iterator[Sample | RecordError]:
    records = read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)
    return (sample for _, sample in records)


def _intact(folder: Path, manifest: Manifest) -> Iterator[Sample]:
    for sample in _samples(folder, manifest):
        if isinstance(sample, RecordError):
            raise ValueError(f"{sample}; delete {folder} and run again")
        yield sample


def _originals(encoder: DualEncoder, source: Path, keys: frozenset[str], excluded: Counter[str]) -> Iterator[Sample]:
    for sample in _samples(source, Manifest.load(source)):
        # Records too broken to have a key are counted where the keys are read.
        if isinstance(sample, Sample) and sample.key in keys:
            caption = sample.captions[0]
            if not encoder.tokenizer.content_mask(encoder.tokenizer.encode([caption])).any():
                excluded[NO_TOKENS] += 1
                continue
            try:
                image = _as_seen(encoder, sample)
            except RecordError:
                excluded[BROKEN_RECORD] += 1
                continue
            height, width = encoder.image_transform.size
            yield Sample(sample.key, image, (width, height), (caption,), source=sample.source)


def _as_seen(encoder: DualEncoder, sample: Sample) -> bytes:
    """The image at the model's input size, as a PNG file that the model's transform leaves unchanged."""
    transform, where = encoder.image_transform, sample.source or sample.key
    seen = transform(read_image(sample.image, where))
    data = _png((transform.denormalize(seen) * 255).round().to(torch.uint8))
    if not torch.equal(transform(read_image(data, where)), seen):
        raise ValueError(f"{where}: the model's image transform changes an image of the size it makes; {transform}")
    return data


def _stored_pixels(sample: Sample) -> Tensor:
    """[3, h, w] uint8."""
    return torch.from_numpy(np.array(read_image(sample.image, sample.key))).permute(2, 0, 1)


def _png(pixels: Tensor) -> bytes:
    stream = io.BytesIO()
    # Written once and read in every epoch, so decoding has to be fast.
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
