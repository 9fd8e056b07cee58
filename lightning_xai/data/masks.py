"""Segmentation masks as run lengths, in COCO's own form, which are checked before anything is decoded.

A text of a few hundred characters may claim any number of pixels, and pycocotools decodes it unchecked: shards come
from anywhere, so a mask is decoded here, and only once its runs are known to fill its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mask", "MaskError", "decode_mask", "encode_mask", "mask_runs", "resize_mask"]

_FIRST, _LAST = ord("0"), ord("0") + 63
_VALUE, _SIGN, _MORE = 0x1F, 0x10, 0x20  # of a character's six bits
_LONGEST = 7  # characters of a number: 35 bits
_MOST = 1 << 24  # characters of a mask: sums of as many numbers stay far below 64 bits


class MaskError(ValueError):
    """A mask that cannot be decoded; the message says what is wrong."""


# Not frozen: Lightning refuses batches that hold frozen dataclasses at 16-true, bf16-true and 64-true precision.
@dataclass(unsafe_hash=True)
class Mask:
    """The pixels of an object; never changed.

    Attributes:
        size: `(height, width)` in pixels, in COCO's order.
        counts: lengths of runs of pixels outside and inside by turns, down the columns, compressed to a text as
            pycocotools does.
    """

    size: tuple[int, int]
    counts: str


def encode_mask(pixels: NDArray[np.bool_]) -> Mask:
    """The mask of [h, w] pixels.

    >>> encode_mask(np.array([[True, False], [True, False]]))
    Mask(size=(2, 2), counts='022')
    """
    # Not before: reading shards needs no pycocotools.
    from pycocotools.mask import encode

    height, width = pixels.shape
    return Mask((height, width), encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"].decode("ascii"))


def mask_runs(mask: Mask) -> NDArray[np.int64]:
    """The lengths of runs of pixels outside and inside by turns, which begin outside and fill the mask's size.

    >>> mask_runs(Mask((2, 2), "022")).tolist()
    [0, 2, 2]

    Raises:
        MaskError: the text is none of pycocotools', or its runs do not add up to the size.
    """
    height, width = mask.size
    if min(height, width) < 1 or not mask.counts.isascii() or not 0 < len(mask.counts) <= _MOST:
        raise MaskError(f"a mask has a size of at least (1, 1) and run lengths in ASCII; got a size of {mask.size}")
    characters = np.frombuffer(mask.counts.encode("ascii"), dtype=np.uint8)
    if characters.min() < _FIRST or characters.max() > _LAST:
        raise MaskError("the run lengths of a mask hold characters that pycocotools does not write")
    bits = characters.astype(np.int64) - _FIRST
    ends = np.flatnonzero((bits & _MORE) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    if not len(ends) or ends[-1] != len(bits) - 1 or (ends - starts).max() >= _LONGEST:
        raise MaskError("the run lengths of a mask are cut off, or one has more digits than any image has pixels")
    digit = np.arange(len(bits)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((bits & _VALUE) << (5 * digit), starts)
    numbers -= np.where(bits[ends] & _SIGN, np.int64(1) << (5 * (ends - starts + 1)), 0)
    # From the fourth on, what is written is the difference from the run before the last one.
    runs: NDArray[np.int64] = numbers.copy()
    runs[1::2], runs[2::2] = np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])
    if runs.min() < 0 or runs.sum() != height * width:
        raise MaskError(f"the runs of a mask do not fill its size, {height} x {width} pixels")
    return runs


def decode_mask(mask: Mask) -> NDArray[np.bool_]:
    """The pixels [h, w]. Compare its size with that of an image that decodes first: it is all that bounds the memory.

    Raises:
        MaskError: see `mask_runs`.
    """
    runs = mask_runs(mask)
    pixels: NDArray[np.bool_] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(mask.size[::-1]).T
    return pixels


def resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """The mask of an image that is resized to (height, width): each pixel takes the one under its centre.

    Raises:
        MaskError: see `mask_runs`.
    """
    # In whole numbers: a centre that falls between two pixels takes the one to the right or below.
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, mask.size, strict=True))
    return encode_mask(decode_mask(mask)[np.ix_(rows, columns)])
