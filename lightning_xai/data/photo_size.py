"""Photos stored smaller than their source has them, with the boxes and masks that belong to them.

A worker's time goes into decoding pixels that the model's transform throws away again. `shrink` throws them away once.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from lightning_xai.cores import usable_cores
from lightning_xai.data.masks import resize_mask
from lightning_xai.data.sample import RecordError, Region, Sample, decode_image, mask_faults

__all__ = ["JPEG_QUALITY", "PhotoSize", "shrink", "shrink_all"]

JPEG_QUALITY = 90


@dataclass(frozen=True)
class PhotoSize:
    """The size and quality to store photos in.

    Attributes:
        short_side: pixels of a photo's shorter side, at most. Photos are only ever made smaller.
        jpeg_quality: 1 to 100, of the JPEG files that resized photos become; their colour keeps its resolution.

    Raises:
        ValueError: an option outside its range.
    """

    short_side: int
    jpeg_quality: int = JPEG_QUALITY

    def __post_init__(self) -> None:
        if self.short_side < 1:
            raise ValueError(f"short_side has to be at least 1 pixel; got {self.short_side}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality has to be between 1 and 100; got {self.jpeg_quality}")

    def of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) in which a photo of (width, height) pixels is stored.

        >>> PhotoSize(288).of((640, 480)), PhotoSize(288).of((200, 300))
        ((384, 288), (200, 300))
        """
        shorter = min(size)
        if shorter <= self.short_side:
            return size
        width, height = (round(side * self.short_side / shorter) for side in size)
        return width, height


def shrink(sample: Sample, photo_size: PhotoSize) -> Sample:
    """Resize a sample's photo, bicubic with antialiasing, and its boxes and masks along; a small photo stays as it is.

    Raises:
        RecordError: the photo does not decode, has not the size that its regions are given for, or is longer than a
            JPEG file can be.
    """
    size = photo_size.of(sample.size)
    if size == sample.size or any(mask_faults(sample)):  # writing refuses such masks, and says why
        return sample
    resized = decode_image(sample).resize(size, Image.Resampling.BICUBIC)
    try:
        image = _jpeg(resized, photo_size.jpeg_quality)
    except OSError as error:
        where = sample.source or sample.key
        raise RecordError(
            f"{where}: resized to {size} pixels, it cannot be stored as JPEG ({error}); drop the record"
        ) from error
    regions = tuple(_shrink_region(region, sample.size, size) for region in sample.regions)
    return replace(sample, image=image, size=size, regions=regions)


def shrink_all(samples: Iterable[Sample], photo_size: PhotoSize) -> Iterator[Sample | RecordError]:
    """`shrink` samples on all usable cores, in their order; the error in place of one that cannot be decoded."""
    cores = usable_cores()
    attempt = partial(_attempt, photo_size=photo_size)
    pending: deque[Future[Sample | RecordError]] = deque()
    with ThreadPoolExecutor(cores) as pool:  # Pillow works outside of the interpreter's lock
        for sample in samples:
            pending.append(pool.submit(attempt, sample))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _attempt(sample: Sample, photo_size: PhotoSize) -> Sample | RecordError:
    try:
        return shrink(sample, photo_size)
    except RecordError as error:
        return error


def _jpeg(image: Image.Image, quality: int) -> bytes:
    # Colour at half the resolution decodes faster, but took a trained model's embeddings of shapes from a cosine of
    # 0.998 with the original's to 0.949.
    save = partial(image.save, format="JPEG", quality=quality, subsampling="4:4:4")
    try:
        save(file := io.BytesIO(), optimize=True)
    except OSError:  # Pillow's buffer of a byte a pixel is too small for noise, or for high qualities
        save(file := io.BytesIO())
    return file.getvalue()


def _shrink_region(region: Region, was: tuple[int, int], now: tuple[int, int]) -> Region:
    box = region.box
    if box is not None:
        across, down = now[0] / was[0], now[1] / was[1]
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return replace(region, box=box, mask=None if region.mask is None else resize_mask(region.mask, now[::-1]))
