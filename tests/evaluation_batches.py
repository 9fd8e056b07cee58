"""Evaluation batches with phrases, named boxes and hard negatives, for tests of what is measured on them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from lightning_xai.data.batch import Batch, EvaluationCollate, Record
from lightning_xai.data.sample import HardNegative, RecordError, Region, Sample
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.image_transform import ImageTransform

# The replaced words stand at other places than the true ones.
NEGATIVE = HardNegative("see the old dog bite a big rat", (23, 30), 0, (14, 17), 1)
LABELS = ("cat", "dog", "horse")
CAPTIONS = (("a dog bites a cat", "the small dog"), ("nothing",), ("a cat", "one horse near a cat and the horse"))
# Class -> box in quarters of the width and halves of the height.
BOXES: tuple[dict[str, tuple[int, int, int, int]], ...] = (
    {"dog": (0, 0, 2, 2), "cat": (1, 1, 3, 1)},
    {},
    {"cat": (2, 0, 2, 2), "horse": (0, 0, 3, 1)},
)


def evaluation_batch(size: tuple[int, int], tokenizer: CaptionTokenizer, dtype: torch.dtype = torch.float64) -> Batch:
    """Three images of noise of `size` (height, width) behind a broken record, 5 captions, a hard negative and swaps."""
    height, width = size
    records: list[Record] = [(4, RecordError("broken"))]
    for number, (captions, boxes) in enumerate(zip(CAPTIONS, BOXES, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        regions = []
        for label, (x, y, across, down) in boxes.items():
            spans = {}
            for row, caption in enumerate(captions):
                starts = [start for start in range(len(caption)) if caption.startswith(label, start)]
                if starts:
                    spans[row] = tuple((start, start + len(label)) for start in starts)
            box = (x * width / 4, y * height / 2, across * width / 4, down * height / 2)
            regions.append(Region(label, box, spans))
        sample = Sample(f"k{number}", stream.getvalue(), (width, height), captions, tuple(regions))
        records.append((10 + number, sample if number else replace(sample, negatives=(NEGATIVE,))))
    collate = EvaluationCollate(ImageTransform(size=size), tokenizer, LABELS, swap_objects=True)
    batch = collate(records)
    return replace(batch, images=batch.images.to(dtype))
