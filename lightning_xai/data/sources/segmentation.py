"""Segmentations as annotation files of COCO's form give them, made masks of the upright image.

pycocotools encodes what was checked: an outline far from its image would fill memory, and a text of run lengths that
does not fit its size is decoded past its end.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from lightning_xai.data.excluded import ExcludedError, excluded_as
from lightning_xai.data.masks import Mask, MaskError, decode_mask, encode_mask
from lightning_xai.data.sample import UPRIGHT, Box
from lightning_xai.data.sources.boxes import BoxTransform

__all__ = ["pack_segmentation", "read_mask"]

_FARTHEST = 3  # corners of an outline lie at most so many times the image's longer side away
_LONGEST = 10_000_000  # pixels along all outlines of an object


def pack_segmentation(segmentation: object) -> str:
    """An annotation's segmentation as a text, which takes far less memory than lists of numbers."""
    try:
        return json.dumps(segmentation)
    except RecursionError:
        return '"nested too deep"'


def read_mask(packed: str, upright: BoxTransform, box: Box) -> Mask | None:
    """The mask on the upright image, from polygons or run lengths, compressed or not; None where there is none.

    Args:
        packed: whatever an annotation file holds, from `pack_segmentation`.
        upright: makes boxes of the same annotation boxes of the upright image.
        box: of the same object on the upright image.

    Raises:
        ExcludedError: `mask_malformed`, `mask_size` (of another size than the image), `mask_empty` (no pixel of the
            image), or `mask_off_its_box` (its own box and the annotated one share less than half of their union).
    """
    with excluded_as("mask_malformed", RecursionError):
        segmentation = json.loads(packed)
    if segmentation is None or segmentation == []:
        return None
    width, height = upright.size if upright.orientation < 5 else upright.size[::-1]
    if isinstance(segmentation, dict):
        mask = _from_runs(segmentation, (height, width))
    else:
        mask = _from_polygons(segmentation, (height, width))
    with excluded_as("mask_malformed", MaskError):
        pixels = decode_mask(mask)
    if upright.orientation >= 5:
        pixels = np.asarray(Image.fromarray(pixels).transpose(UPRIGHT[upright.orientation]))
        mask = encode_mask(pixels)
    if not pixels.any():
        raise ExcludedError("mask_empty")
    if _overlap(pixels, box) < 0.5:
        raise ExcludedError("mask_off_its_box")
    return mask


def _from_runs(segmentation: dict[Any, Any], size: tuple[int, int]) -> Mask:
    with excluded_as("mask_malformed", (KeyError, TypeError, ValueError, OverflowError)):
        height, width = (int(side) for side in segmentation["size"])
        counts = segmentation["counts"]
        if not isinstance(counts, str):
            counts = [int(run) for run in counts]
    if (height, width) != size:
        raise ExcludedError("mask_size")
    if isinstance(counts, str):
        return Mask(size, counts)
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        raise ExcludedError("mask_malformed")
    return _joined([coco.frPyObjects({"size": list(size), "counts": counts}, height, width)], size)


def _from_polygons(segmentation: object, size: tuple[int, int]) -> Mask:
    farthest = _FARTHEST * max(size)
    parts: list[list[float]] = []
    length = 0.0
    with excluded_as("mask_malformed", (TypeError, ValueError, OverflowError)):
        for part in segmentation:  # type: ignore[attr-defined]
            corners = [float(value) for value in part]
            # pycocotools would take four numbers for a box.
            if isinstance(part, str) or len(corners) < 6 or len(corners) % 2 or not all(map(math.isfinite, corners)):
                raise ExcludedError("mask_malformed")
            if max(map(abs, corners)) > farthest:
                raise ExcludedError("mask_malformed")
            places = list(zip(corners[::2], corners[1::2], strict=True))
            length += sum(max(abs(x - u), abs(y - v)) + 1 for (x, y), (u, v) in pairwise([*places, places[0]]))
            parts.append(corners)
    if length > _LONGEST:
        raise ExcludedError("mask_malformed")
    return _joined(coco.frPyObjects(parts, *size), size)


def _joined(parts: list[dict[str, Any]], size: tuple[int, int]) -> Mask:
    return Mask(size, coco.merge(parts)["counts"].decode("ascii"))


def _overlap(pixels: np.ndarray[Any, np.dtype[np.bool_]], box: Box) -> float:
    """The intersection over union of a box and that of some pixels."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    x, y, width, height = box
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    across = max(min(right, x + width) - max(left, x), 0)
    down = max(min(bottom, y + height) - max(top, y), 0)
    both = across * down
    return float(both / ((right - left) * (bottom - top) + width * height - both))
