"""The contract between data sets, shards and the data module: one image, its captions, its named regions.

A sample is stored as two members of a tar shard: `KEY.jpg` (the image file's original bytes; `.png` and `.webp` for
those formats) and `KEY.json` (everything else, in the versioned schema written by `encode_sample`). Nothing is ever
unpickled: a shard may come from anywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import msgspec
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from lightning_xai.data.excluded import BROKEN_RECORD, CORRUPT_IMAGE, UNPAIRED_MEMBER
from lightning_xai.data.masks import Mask, MaskError, mask_runs

SCHEMA_VERSION = 1
# MPO is what Pillow calls a JPEG file that holds further pictures, as some phones and cameras write it.
IMAGE_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Only these decoders see the bytes: others go as far as running PostScript.
_DECODERS = ("JPEG", "PNG", "WEBP")
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
# EXIF orientation -> what makes the stored pixels upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STATES_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # keys of an image's `info`
_T = TypeVar("_T")
# JSON can hold it (a lone surrogate), but no tokenizer and no other file takes it.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,200}")

Box = tuple[float, float, float, float]
Span = tuple[int, int]


class RecordError(ValueError):
    """A record that cannot be used; the message names the record, what is wrong and what to do about it.

    Args:
        message: the message.
        kind: of the fault, for counting; see `lightning_xai.data.excluded`.
    """

    def __init__(self, message: str, *, kind: str = BROKEN_RECORD) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Region:
    """One object instance of an image and the places in the captions that name it.

    Attributes:
        label: class name, for instance `"dog"`. Regions of one image with the same label and entity are several
            instances of it.
        box: `(x, y, width, height)` in pixels of the upright image; x to the right and y down from the top left corner.
            None: an instance whose box is missing or cannot be used. It is not measured, but it counts: its class does
            not have exactly one instance where there is another.
        spans: caption index -> character spans `(start, end)` of that caption that name the region (end exclusive).
        crowd: the box holds a group of instances, not one.
        entity: distinguishes things of one class where the annotation says which of them a phrase names, as
            Flickr30k Entities does with its chains; empty where phrases name the class alone.
        mask: its pixels, of the upright image's size; None: not annotated.
    """

    label: str
    box: Box | None
    spans: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    crowd: bool = False
    entity: str = ""
    mask: Mask | None = None


@dataclass(frozen=True)
class HardNegative:
    """A caption that is wrong about one object: a phrase of a true caption is replaced by another one.

    Attributes:
        text: the wrong caption.
        span: characters `(start, end)` of `text` that stand in place of the true phrase (end exclusive).
        caption: index of the true caption in `Sample.captions`.
        true_span: characters of the true caption that were replaced.
        region: index in `Sample.regions` of the object that the true phrase names.
    """

    text: str
    span: Span
    caption: int
    true_span: Span
    region: int


@dataclass(frozen=True)
class WrongCaption:
    """A caption that does not fit the image, for a model to choose between it and a true one.

    Unlike a `HardNegative`, it is wrong as a whole: about any number of words, with or without boxes.

    Attributes:
        text: the wrong caption.
        caption: index of the true caption in `Sample.captions`.
        kind: what is wrong with it, by which scores are reported (`"swap_att"`); may be empty.
    """

    text: str
    caption: int
    kind: str = ""


@dataclass(frozen=True)
class Sample:
    """One image with all its captions and regions.

    Attributes:
        key: unique in its data set; letters, digits, `_` and `-` only, so that it names tar members safely.
        image: the image file's original bytes.
        size: `(width, height)` in pixels of the upright image (EXIF orientation applied).
        captions: at least one, none empty.
        regions: every annotated object, also those that no caption names, and those without a usable box.
        source: where the image came from, for messages and tables (`"coco/val2017/000000397133.jpg"`).
        negatives: wrong captions that the data set comes with.
        blanks: caption index -> positions in the tokenizer's output that padding takes the place of. They depend on the
            tokenizer: only degraded data sets, made for one model, have them.
        wrong_captions: captions to choose against, that the data set comes with.
        group: the same text in two samples where the wrong caption of each is the true one of the other, as in
            Winoground; empty elsewhere.
    """

    key: str
    image: bytes
    size: tuple[int, int]
    captions: tuple[str, ...]
    regions: tuple[Region, ...] = ()
    source: str = ""
    negatives: tuple[HardNegative, ...] = ()
    blanks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    wrong_captions: tuple[WrongCaption, ...] = ()
    group: str = ""

    def with_one_caption(self, index: int) -> Sample:
        """The sample as if it had that caption alone, with all of its regions."""
        return replace(
            self,
            captions=(self.captions[index],),
            regions=tuple(
                replace(region, spans={0: region.spans[index]} if index in region.spans else {})
                for region in self.regions
            ),
            negatives=tuple(replace(each, caption=0) for each in self.negatives if each.caption == index),
            blanks={0: self.blanks[index]} if index in self.blanks else {},
            wrong_captions=tuple(replace(each, caption=0) for each in self.wrong_captions if each.caption == index),
        )


class _Record(msgspec.Struct):
    """The `.json` member of a sample; msgspec checks its types."""

    captions: tuple[str, ...]
    width: int
    height: int
    source: str
    regions: tuple[Region, ...]
    negatives: tuple[HardNegative, ...] = ()
    blanks: dict[int, tuple[int, ...]] = {}
    wrong_captions: tuple[WrongCaption, ...] = ()
    group: str = ""


def stable_hash(*parts: int | str) -> int:
    """A non-negative 63-bit number from some parts: the same on every machine, process and Python version.

    It stands in for a random draw wherever processes must not choose differently.

    >>> stable_hash("epoch", 0) == stable_hash("epoch", 0)
    True
    >>> stable_hash("epoch", 0) == stable_hash("epoch", 1)
    False
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def is_text(text: str) -> bool:
    r"""False where a text holds half a character (a lone surrogate).

    >>> is_text("ünder"), is_text("\ud800")
    (True, False)
    """
    return _HALF_CHARACTER.search(text) is None


def parse_json(data: bytes, kind: type[_T], version: int) -> _T:
    """The content of a JSON file whose schema has that version.

    Raises:
        ValueError: it is no JSON, its schema has another version, or a field is missing or of the wrong type.
    """
    try:
        record = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error})") from error
    found = record.get("version") if isinstance(record, dict) else None
    if found != version:
        raise ValueError(f"schema version {found!r}, expected {version}")
    try:
        return msgspec.convert(record, kind, str_keys=True)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ValueError):  # a class's own check, which says more than its place
            raise error.__cause__ from error
        raise ValueError(f"field missing or of the wrong type ({error})") from error


def read_image(data: bytes, origin: str) -> Image.Image:
    """Decode an image file to upright 8-bit RGB; see `upright`.

    Raises:
        RecordError: the bytes are no image that can be decoded; the message names `origin`.
    """
    with _decoding(origin), Image.open(io.BytesIO(data), formats=_DECODERS) as opened:
        return _upright(opened)


def upright(image: Image.Image, origin: str) -> Image.Image:
    """Turn an image into upright 8-bit RGB.

    EXIF orientation is applied, greyscale, palette and CMYK images are converted, images of 16 bits or of floats in
    [0, 1] are scaled to 8 bits (PIL alone would clip them), and transparency is laid over white.

    Raises:
        RecordError: its pixels, which PIL reads when they are first needed, cannot be decoded, or leave these ranges.
    """
    with _decoding(origin):
        return _upright(image)


class _RangeError(ValueError):
    """Pixels of which nothing says which values are black and white; the message is a sentence for the reader."""


@contextmanager
def _decoding(origin: str) -> Iterator[None]:
    """Raise a RecordError that names the image where it does not decode."""
    try:
        yield
    except _RangeError as error:
        raise RecordError(f"{origin}: {error}", kind=CORRUPT_IMAGE) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # Pillow would name the buffer that the bytes lie in.
        reason = "no JPEG, PNG or WebP file" if isinstance(error, UnidentifiedImageError) else error
        raise RecordError(
            f"{origin}: the image does not decode ({reason}); replace the file or drop the record", kind=CORRUPT_IMAGE
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    # Not ImageOps.exif_transpose: it also rewrites the EXIF block, and crashes on blocks with other faults.
    turn = UPRIGHT.get(exif_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
        for name in _STATES_ORIENTATION:  # which would turn it once more where it is given to `upright` again
            image.info.pop(name, None)
    if image.mode.startswith(("I", "F")):
        image = _of_8_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _of_8_bits(image: Image.Image) -> Image.Image:
    """A greyscale image of 16 bits (0 to 65535), or of floats in [0, 1], scaled to 8 bits.

    Raises:
        _RangeError: a value is outside of these.
    """
    values, floats = np.asarray(image), image.mode == "F"
    white = 1 if floats else 65535
    if values.size and not (values.min() >= 0 and values.max() <= white):  # NaN is neither
        raise _RangeError(
            f"an image of PIL's mode {image.mode!r} has values in [0, {white}]; got {values.min():g} to "
            f"{values.max():g}: scale them, or convert the image to 8 bits"
        )
    return Image.fromarray(((values * 255).round() if floats else values // 257).astype(np.uint8))


def decode_image(sample: Sample) -> Image.Image:
    """A sample's image, see `read_image`.

    Raises:
        RecordError: it cannot be decoded, or is not of the size that its regions are given for.
    """
    where = f"record {sample.key!r} ({sample.source})"
    image = read_image(sample.image, where)
    if image.size != sample.size:
        raise RecordError(
            f"{where}: the image has {image.size} pixels, its annotation is for {sample.size}, so the boxes do not "
            "fit; annotate the image at its own size and prepare the shards again"
        )
    return image


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8) of an opened image file; 1, upright, where it has none that can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, EOFError, struct.error):
        return 1  # a broken EXIF block does not make the pixels unusable
    return orientation if orientation in UPRIGHT else 1


def image_extension(data: bytes, origin: str) -> str:
    """The shard member extension for an image file's bytes (`"jpg"`, `"png"` or `"webp"`).

    Raises:
        RecordError: the bytes are no image, or of a format that shards do not hold.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_DECODERS) as opened:
            image_format = str(opened.format)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RecordError(
            f"{origin}: no JPEG, PNG or WebP image ({error}); convert or replace the file, or drop the record"
        ) from error
    return IMAGE_FORMATS[image_format]


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """The tar members of a sample, by extension: `{"jpg": original bytes, "json": record}`.

    Raises:
        RecordError: the sample breaks the contract stated on `Sample` and `Region`.
    """
    _check(sample)
    for fault in mask_faults(sample):
        raise RecordError(f"record {sample.key!r} ({sample.source}): {fault}; mend or drop the mask")
    record = {
        "version": SCHEMA_VERSION,
        "captions": sample.captions,
        "width": sample.size[0],
        "height": sample.size[1],
        "source": sample.source,
        "regions": [_encode_region(region) for region in sample.regions],
    }
    # Only where there are any, so that shards without them keep their bytes.
    if sample.negatives:
        record["negatives"] = [asdict(negative) for negative in sample.negatives]
    if sample.blanks:
        record["blanks"] = dict(sample.blanks)
    if sample.wrong_captions:
        record["wrong_captions"] = [asdict(wrong) for wrong in sample.wrong_captions]
    if sample.group:
        record["group"] = sample.group
    return {
        image_extension(sample.image, sample.source or sample.key): sample.image,
        "json": json.dumps(record, ensure_ascii=False).encode(),
    }


def decode_sample(key: str, members: Mapping[str, bytes], origin: str) -> Sample:
    """Rebuild a sample from its tar members; the image bytes are not decoded here.

    Args:
        key: the members' common name without extension.
        members: extension -> bytes. Extensions other than the known ones are ignored, never decoded.
        origin: the shard's name, for messages.

    Raises:
        RecordError: a member is missing, the JSON is broken, or the record breaks the contract.
    """
    where = f"{origin}, record {key}"
    images = [members[extension] for extension in IMAGE_MEMBERS if extension in members]
    if len(images) != 1:
        raise RecordError(
            f"{where}: expected one image member of {IMAGE_MEMBERS}, found {len(images)}; rebuild the shard",
            kind=BROKEN_RECORD if images else UNPAIRED_MEMBER,
        )
    if "json" not in members:
        raise RecordError(f"{where}: the .json member is missing; rebuild the shard", kind=UNPAIRED_MEMBER)
    try:
        fields = parse_json(members["json"], _Record, SCHEMA_VERSION)
    except ValueError as error:
        raise RecordError(f"{where}: {error}; prepare the shards again with this release") from error
    sample = Sample(
        key=key,
        image=images[0],
        size=(fields.width, fields.height),
        captions=fields.captions,
        regions=fields.regions,
        source=fields.source,
        negatives=fields.negatives,
        blanks=fields.blanks,
        wrong_captions=fields.wrong_captions,
        group=fields.group,
    )
    _check(sample, where)
    return sample


def _encode_region(region: Region) -> dict[str, Any]:
    # In this order, and without an entity or a mask where there is none, so that shards keep their bytes.
    record: dict[str, Any] = {"label": region.label, "box": region.box, "crowd": region.crowd}
    record["spans"] = dict(region.spans)
    if region.entity:
        record["entity"] = region.entity
    if region.mask is not None:
        record["mask"] = asdict(region.mask)
    return record


def mask_faults(sample: Sample) -> Iterator[str]:
    """What is wrong with each mask that cannot be used.

    Reading does not ask: a wrong mask spoils what is measured by mask alone, and only there is it decoded.
    """
    for region in sample.regions:
        if region.mask is None:
            continue
        if region.mask.size != sample.size[::-1]:
            yield (
                f"the mask of {region.label!r} has {region.mask.size} pixels (height, width), its image "
                f"{sample.size[::-1]}"
            )
            continue
        try:
            mask_runs(region.mask)
        except MaskError as error:
            yield f"the mask of {region.label!r}: {error}"


def _check(sample: Sample, where: str | None = None) -> None:
    regions = chain.from_iterable(_region_faults(region, sample) for region in sample.regions)
    advice = "mend or drop the record" if where is None else "prepare the shard again"
    for fault in chain(_faults(sample), regions, _negative_faults(sample), _wrong_caption_faults(sample)):
        raise RecordError(f"{where or f'record {sample.key!r} ({sample.source})'}: {fault}; {advice}")


def _faults(sample: Sample) -> Iterator[str]:
    """All that breaks the contract but regions and negatives; each check may rely on those before it."""
    if not _KEY.fullmatch(sample.key):
        yield f"a key has 1 to 200 letters, digits, '_' or '-'; got {sample.key!r}"
    if min(sample.size) < 1:
        yield f"width and height have to be positive; got {sample.size}"
    if not sample.captions or not all(isinstance(text, str) and text.strip() for text in sample.captions):
        yield f"at least one caption is needed and none may be empty; got {sample.captions!r}"
    names = (name for region in sample.regions for name in (region.label, region.entity))
    others = (*(negative.text for negative in sample.negatives), sample.group)
    wrong = (text for each in sample.wrong_captions for text in (each.text, each.kind))
    for text in (*sample.captions, sample.source, *names, *others, *wrong):
        if not is_text(text):
            yield f"{text!r} is no text (surrogates not allowed)"
    for caption, positions in sample.blanks.items():
        if not 0 <= caption < len(sample.captions) or min(positions, default=0) < 0:
            yield f"blanks {list(positions)} of caption {caption} of {len(sample.captions)}"


def _wrong_caption_faults(sample: Sample) -> Iterator[str]:
    for each in sample.wrong_captions:
        if not each.text.strip():
            yield f"a wrong caption is empty: {each.text!r}"
        if not 0 <= each.caption < len(sample.captions):
            yield f"the wrong caption {each.text!r} belongs to caption {each.caption} of {len(sample.captions)}"


def _negative_faults(sample: Sample) -> Iterator[str]:
    for negative in sample.negatives:
        if not 0 <= negative.caption < len(sample.captions) or not 0 <= negative.region < len(sample.regions):
            yield (
                f"the hard negative {negative.text!r} belongs to caption {negative.caption} of "
                f"{len(sample.captions)} and region {negative.region} of {len(sample.regions)}"
            )
        elif sample.regions[negative.region].box is None:
            yield f"the hard negative {negative.text!r} is about a region without a box"
        true = sample.captions[negative.caption]
        for (start, end), text in ((negative.span, negative.text), (negative.true_span, true)):
            if not 0 <= start < end <= len(text):
                yield f"span {(start, end)} of a hard negative leaves its caption {text!r}"


def _region_faults(region: Region, sample: Sample) -> Iterator[str]:
    if region.box is not None:
        x, y, width, height = region.box
        if not all(math.isfinite(value) for value in region.box) or width <= 0 or height <= 0:
            yield f"the box of {region.label!r} has no area: {region.box}"
        if x + width <= 0 or y + height <= 0 or x >= sample.size[0] or y >= sample.size[1]:
            yield f"the box of {region.label!r} lies outside the image {sample.size}: {region.box}"
    for caption, spans in region.spans.items():
        if not 0 <= caption < len(sample.captions):
            yield f"{region.label!r} has spans in caption {caption} of {len(sample.captions)}"
        for start, end in spans:
            if not 0 <= start < end <= len(sample.captions[caption]):
                yield f"span {(start, end)} of {region.label!r} leaves caption {caption}"
