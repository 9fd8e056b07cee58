from __future__ import annotations

import dataclasses
import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_xai.data.sample import (
    HardNegative,
    RecordError,
    Region,
    Sample,
    WrongCaption,
    decode_sample,
    encode_sample,
    exif_orientation,
    image_extension,
    read_image,
    upright,
)

ORIENTATION = 0x0112


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = read_image(data, "test")
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


NEGATIVE = HardNegative("a hen and a dog", span=(2, 5), caption=0, true_span=(2, 5), region=0)


def negative(**changes: Any) -> dict[str, Any]:
    return {"negatives": (dataclasses.replace(NEGATIVE, **changes),)}


WRONG = (WrongCaption("a dog on a dog", 0, "replace_rel"), WrongCaption("cat", 1))


def sample(**changes: Any) -> Sample:
    regions = (
        Region("dog", (0.5, 0.25, 3.0, 2.0), {0: ((2, 5), (12, 15)), 1: ((0, 3),)}),
        Region("cat", (-1.0, 0.0, 3.0, 2.0), crowd=True, entity="283585"),
    )
    original = Sample(
        key="000000000042",
        image=encode(Image.fromarray(gradient())),
        size=(6, 4),
        captions=("a dog and a dog", "dog \u2014 \u72ac"),
        regions=regions,
        source="test/42.png",
        negatives=(NEGATIVE,),
        blanks={1: (1, 3)},
        wrong_captions=WRONG,
        group="7",
    )
    return dataclasses.replace(original, **changes)


def record(**changes: Any) -> dict[str, bytes]:
    members = encode_sample(sample())
    fields = json.loads(members["json"])
    fields.update(changes)
    return {**members, "json": json.dumps(fields).encode()}


def test_a_sample_comes_back_as_it_was_written() -> None:
    members = encode_sample(sample())
    assert set(members) == {"png", "json"}
    assert members["png"] == sample().image
    assert decode_sample("000000000042", members, "shard") == sample()


FORMATS = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")]


def test_the_member_is_named_after_the_image_format() -> None:
    for image_format, extension in FORMATS:
        data = encode(Image.fromarray(gradient()), image_format)
        assert image_extension(data, "test") == extension
        assert encode_sample(sample(image=data))[extension] == data


def test_records_without_hard_negatives_blanks_entities_and_wrong_captions_do_not_name_them() -> None:
    plain = sample(negatives=(), blanks={}, wrong_captions=(), group="")
    members = encode_sample(plain)
    record = json.loads(members["json"])
    assert not {"negatives", "blanks", "wrong_captions", "group"} & record.keys()
    assert ["entity" in region for region in record["regions"]] == [False, True]
    assert decode_sample("000000000042", members, "shard") == plain


def test_a_region_without_a_box_comes_back_and_no_hard_negative_is_about_it() -> None:
    original = sample(regions=(Region("dog", None),), negatives=())
    assert decode_sample("000000000042", encode_sample(original), "shard") == original
    with pytest.raises(RecordError, match="about a region without a box"):
        encode_sample(sample(regions=(Region("dog", None),), negatives=(HardNegative("a cat", (2, 5), 0, (2, 5), 0),)))


WRONG_SAMPLES: list[tuple[dict[str, Any], str]] = [
    ({"key": "a.b"}, "key"),
    ({"key": "../a"}, "key"),
    ({"key": ""}, "key"),
    ({"size": (0, 4)}, "positive"),
    ({"captions": ()}, "caption"),
    ({"captions": ("a dog and a dog", " \n")}, "caption"),
    ({"regions": (Region("dog", (1.0, 1.0, 0.0, 2.0)),)}, "no area"),
    ({"regions": (Region("dog", (1.0, 1.0, 2.0, -2.0)),)}, "no area"),
    ({"regions": (Region("dog", (float("nan"), 1.0, 2.0, 2.0)),)}, "no area"),
    ({"regions": (Region("dog", (6.0, 1.0, 2.0, 2.0)),)}, "outside"),
    ({"regions": (Region("dog", (-2.0, 1.0, 2.0, 2.0)),)}, "outside"),
    ({"regions": (Region("dog", (1.0, 4.0, 2.0, 2.0)),)}, "outside"),
    ({"regions": (Region("dog", (1.0, 1.0, 2.0, 2.0), {2: ((0, 1),)}),)}, "caption 2 of 2"),
    ({"regions": (Region("dog", (1.0, 1.0, 2.0, 2.0), {0: ((0, 16),)}),)}, "leaves caption 0"),
    ({"regions": (Region("dog", (1.0, 1.0, 2.0, 2.0), {0: ((3, 3),)}),)}, "leaves caption 0"),
    (negative(caption=2), "belongs to caption 2 of 2"),
    (negative(region=2), "region 2"),
    (negative(span=(2, 16)), "leaves its caption 'a hen"),
    (negative(true_span=(5, 5)), "leaves its caption 'a dog"),
    ({"blanks": {2: (1,)}}, "caption 2 of 2"),
    ({"wrong_captions": (WrongCaption("a hen", 2),)}, "the wrong caption 'a hen' belongs to caption 2 of 2"),
    ({"wrong_captions": (WrongCaption("a hen", -1),)}, "caption -1 of 2"),
    ({"wrong_captions": (WrongCaption(" ", 0),)}, "a wrong caption is empty"),
    ({"wrong_captions": (WrongCaption("a \ud83d", 0),)}, "is no text"),
    ({"wrong_captions": (WrongCaption("a hen", 0, "\ud83d"),)}, "is no text"),
    ({"group": "\ud83d"}, "is no text"),
    ({"blanks": {0: (-1,)}}, "blanks"),
    ({"captions": ("a dog and a dog \ud83d", "two")}, "is no text"),
    ({"source": "test/42.png \udce9"}, "is no text"),
    ({"regions": (Region("\ud83d", (1.0, 1.0, 2.0, 2.0)),)}, "is no text"),
    ({"regions": (Region("dog", (1.0, 1.0, 2.0, 2.0), entity="\ud83d"),)}, "is no text"),
    (negative(text="a hen \ud83d"), "is no text"),
    ({"image": b"no image"}, "no JPEG, PNG or WebP"),
    ({"image": b""}, "no JPEG, PNG or WebP"),
    ({"image": encode(Image.fromarray(gradient()), "GIF")}, "no JPEG, PNG or WebP"),
    ({"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, "no JPEG, PNG or WebP"),
]


def test_a_sample_that_breaks_the_contract_is_not_written() -> None:
    for changes, message in WRONG_SAMPLES:
        with pytest.raises(RecordError, match=message) as caught:
            encode_sample(sample(**changes))
        assert "test/42.png" in str(caught.value)


BROKEN_RECORDS: list[tuple[dict[str, bytes], str]] = [
    ({"json": encode_sample(sample())["json"]}, "one image member"),
    ({"jpg": b"", **encode_sample(sample())}, "found 2"),
    ({"png": b""}, "json member is missing"),
    ({"png": b"", "json": b"{"}, "broken JSON"),
    ({"png": b"", "json": b"\xff\xfe\xfd"}, "broken JSON"),
    ({"png": b"", "json": b"[]"}, "schema version None"),
    (record(version=2), "schema version 2"),
    (record(width="wide"), "field"),
    (record(regions=None), "field"),
    (record(regions=[{"label": "dog"}]), "field"),
    (record(regions=[{"label": "dog", "box": [1, 2, 3], "crowd": False, "spans": {}}]), "field"),
    (record(regions=[{"label": "dog", "box": [1, 2, 3, 1], "crowd": False, "spans": {"x": []}}]), "field"),
    (record(negatives=[{"text": "a hen and a dog"}]), "field"),
    (record(blanks={"0": ["x"]}), "field"),
    (record(wrong_captions=[{"text": "a hen"}]), "field"),
    (record(wrong_captions=[{"text": "a hen", "caption": True}]), "field"),
    (record(group=7), "field"),
    (record(blanks={"0": [-1]}), "blanks"),
    (record(captions=["a dog and a dog", None]), "caption"),
    (record(captions=["a dog and a dog"]), "caption 1 of 1"),
    (record(captions=["a dog and a \ud83d", "two"]), "is no text"),
    (record(height=0), "positive"),
]


def test_a_broken_record_is_an_error_that_names_shard_and_record() -> None:
    for members, message in BROKEN_RECORDS:
        with pytest.raises(RecordError, match=message) as caught:
            decode_sample("000000000042", members, "shard-000007.tar")
        assert "shard-000007.tar, record 000000000042" in str(caught.value)


def test_greyscale_palette_and_two_level_images_become_rgb() -> None:
    grey = gradient()[..., 0]
    assert (pixels(encode(Image.fromarray(grey))) == grey[..., None]).all()
    palette = Image.fromarray(gradient()).quantize(4)
    assert (pixels(encode(palette)) == np.asarray(palette.convert("RGB"))).all()
    bits = Image.fromarray(grey > 127)
    assert (pixels(encode(bits)) == np.where(grey > 127, 255, 0)[..., None]).all()


def test_cmyk_images_keep_their_colours() -> None:
    red = Image.new("RGB", (16, 16), (200, 40, 30)).convert("CMYK")
    assert np.abs(pixels(encode(red, "JPEG", quality=95)).astype(int) - (200, 40, 30)).max() <= 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_16_bit_images_are_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    data = encode(Image.fromarray(deep))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode.startswith("I")
    assert np.abs(pixels(data)[..., 0] - deep / 257.0).max() <= 1
    assert (pixels(data)[..., 0] == pixels(data)[..., 2]).all()


def test_images_of_other_depths_are_scaled_as_they_are_or_refused_in_a_sentence() -> None:
    deep = np.array([[0, 257, 32768, 65535]])
    expected = [0, 1, 127, 255]
    big_endian = Image.frombytes("I;16B", (4, 1), deep.astype(">u2").tobytes())
    for image in (Image.fromarray(deep.astype(np.uint16)), Image.fromarray(deep.astype(np.int32)), big_endian):
        assert np.asarray(upright(image, "x"))[0, :, 1].tolist() == expected, image.mode
    floats = Image.fromarray((np.array([[0, 1, 127, 255]]) / 255).astype(np.float32))
    assert np.asarray(upright(floats, "x"))[0, :, 1].tolist() == expected
    for values, message in (
        (np.array([[-1, 5]], np.int32), r"x: an image of PIL's mode 'I' has values in \[0, 65535\]; got -1 to 5"),
        (np.array([[0, 200]], np.float32), r"x: an image of PIL's mode 'F' has values in \[0, 1\]; got 0 to 200"),
        (np.array([[0, np.nan]], np.float32), "got nan to nan: scale them, or convert the image to 8 bits"),
    ):
        with pytest.raises(RecordError, match=message):
            upright(Image.fromarray(values), "x")


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = (0, 51, 255)
    assert pixels(encode(Image.fromarray(rgba)))[0, :, 0].tolist() == [255, 204, 0]
    grey = Image.fromarray(np.array([[0, 100]], dtype=np.uint8))
    assert pixels(encode(grey, transparency=0))[0, :, 0].tolist() == [255, 100]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    seen = gradient()
    # What a camera held that way stores, as the EXIF standard words it: row 0 and column 0 of the file are these sides.
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: seen.transpose(1, 0, 2)[::-1],
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: seen.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert (pixels(data) == seen).all()
    # What is upright stays so, such as an image that the caller has read and gives to `explain`.
    assert (np.asarray(upright(read_image(data, "x"), "x")) == seen).all()
    with Image.open(io.BytesIO(data)) as opened:
        assert exif_orientation(opened) == orientation


def exif_block(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """A little-endian EXIF block with one broken entry after orientation 6."""
    entries = struct.pack("<HHI4s", ORIENTATION, 3, 1, struct.pack("<HH", 6, 0))
    entries += struct.pack("<HHI4s", tag, kind, count, value)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


BROKEN_EXIF = [
    (b"Exif\0\0no such thing", (6, 4)),
    # A resolution stored as text: PIL can read this block but not write it again.
    (exif_block(0x011A, 2, 4, b"ab\0\0"), (4, 6)),
    (exif_block(0x0128, 2, 4, b"ab\0\0"), (4, 6)),
]


def test_broken_exif_does_not_lose_the_image() -> None:
    for block, size in BROKEN_EXIF:
        data = encode(Image.fromarray(gradient()), "JPEG", exif=block)
        assert read_image(data, "test").size == size


NO_ORIENTATIONS = [0, 9, 700]


def test_an_orientation_that_does_not_exist_means_upright() -> None:
    for value in NO_ORIENTATIONS:
        exif = Image.Exif()
        exif[ORIENTATION] = value
        assert (pixels(encode(Image.fromarray(gradient()), exif=exif)) == gradient()).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_an_error_that_names_it(image_format: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), image_format)
    with pytest.raises(RecordError, match="some/image: the image does not decode"):
        read_image(data[: len(data) // 2], "some/image")


NO_IMAGES = [b"", b"<html>404</html>", bytes(100)]


def test_bytes_that_are_no_image_are_an_error() -> None:
    for data in NO_IMAGES:
        with pytest.raises(RecordError, match="does not decode"):
            read_image(data, "some/image")
