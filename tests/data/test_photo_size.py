from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captioned_shards import jpeg as small_jpeg
from captioned_shards import make_samples, make_shards
from image_files import jpeg
from numpy.typing import NDArray
from PIL import Image
from shard_files import read, write

from lightning_xai.cli import main
from lightning_xai.commands.verify import Verify
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.excluded import CORRUPT_IMAGE
from lightning_xai.data.masks import Mask, decode_mask, encode_mask
from lightning_xai.data.photo_size import PhotoSize, shrink, shrink_all
from lightning_xai.data.sample import RecordError, Region, Sample, read_image
from lightning_xai.data.shards import MANIFEST_NAME, Manifest, ResizedPhotos, describe, write_shards
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.image_transform import ImageTransform
from lightning_xai.models.processor_transform import ProcessorTransform

ORIENTATION = 0x0112


def smooth(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture whose details a JPEG file keeps."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: NDArray[Any], image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(pixels: NDArray[Any], image: bytes | None = None, **changes: Any) -> Sample:
    height, width = pixels.shape[:2]
    return Sample("a", image or encode(pixels), (width, height), ("a dog",), **changes)


def resized(pixels: NDArray[Any], width: int, height: int) -> NDArray[np.float64]:
    """Bicubic with antialiasing, literally, one output value at a time along each axis, in float64."""

    def cubic(x: float) -> float:
        x, a = abs(x), -0.5
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def along(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
        scale = values.shape[0] / size
        rows = []
        for place in range(size):
            centre = (place + 0.5) * scale
            weights = np.array([cubic((old + 0.5 - centre) / scale) for old in range(values.shape[0])])
            rows.append(np.tensordot(weights / weights.sum(), values, axes=1))
        result: NDArray[np.float64] = np.clip(np.stack(rows), 0, 255)
        return result

    across = along(pixels.astype(np.float64).swapaxes(0, 1), width).swapaxes(0, 1)
    return along(across, height)


@pytest.mark.parametrize(("width", "height"), [(160, 96), (96, 160), (170, 128)])
def test_pixels_are_those_of_a_literal_bicubic_up_to_what_jpeg_loses(width: int, height: int) -> None:
    colour = smooth(width, height)
    grey = np.repeat(colour[:, :, :1], 3, axis=2)
    for pixels, mean, most in ((grey, 0.5, 2.0), (colour, 1.0, 6.0)):
        small = shrink(photo(pixels), PhotoSize(64, jpeg_quality=100))
        assert min(small.size) == 64
        assert small.size[0] / small.size[1] == pytest.approx(width / height, abs=0.01)
        found = np.asarray(read_image(small.image, "test"), dtype=np.float64)
        difference = np.abs(found - resized(pixels, *small.size))
        assert difference.mean() < mean
        assert difference.max() < most
    rough = shrink(photo(colour), PhotoSize(64, jpeg_quality=20))
    assert len(rough.image) < len(small.image) / 3


def test_boxes_and_masks_go_along_and_all_else_stays() -> None:
    pixels = smooth(150, 100)
    inside = np.random.default_rng(1).random((100, 150)) > 0.5
    regions = (
        Region("dog", (15.0, 10.0, 60.0, 50.0), {0: ((2, 5),)}, entity="7", mask=encode_mask(inside)),
        Region("cat", None, crowd=True),
        Region("dog", (-3.0, 90.0, 30.0, 10.0)),
    )
    sample = photo(pixels, regions=regions, source="s", group="g")
    small = shrink(sample, PhotoSize(40))
    assert small.size == (60, 40)
    assert [region.box for region in small.regions] == [
        pytest.approx((6.0, 4.0, 24.0, 20.0)),
        None,
        pytest.approx((-1.2, 36.0, 12.0, 4.0)),
    ]
    mask = small.regions[0].mask
    assert mask is not None
    literal = [[inside[int((y + 0.5) * 2.5), int((x + 0.5) * 2.5)] for x in range(60)] for y in range(40)]
    assert np.array_equal(decode_mask(mask), np.array(literal))
    unchanged = {"image": sample.image, "size": sample.size, "regions": regions}
    assert dataclasses.replace(small, **unchanged) == sample  # type: ignore[arg-type]
    parts = {"box": None, "mask": None}
    for was, now in zip(regions, small.regions, strict=True):
        assert dataclasses.replace(was, **parts) == dataclasses.replace(now, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_stored_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(smooth(96, 64), "JPEG", exif=exif, quality=100)
    upright = read_image(data, "test")
    small = shrink(Sample("a", data, upright.size, ("a dog",)), PhotoSize(32, jpeg_quality=100))
    stored = read_image(small.image, "test")
    assert stored.size == small.size == ((48, 32) if orientation < 5 else (32, 48))
    assert stored.getexif() == {}
    expected = np.asarray(upright.resize(small.size, Image.Resampling.BICUBIC), dtype=np.float64)
    assert np.abs(np.asarray(stored) - expected).mean() < 1.5


def test_what_is_transparent_becomes_white() -> None:
    pixels = np.dstack([smooth(64, 48), np.zeros((48, 64), dtype=np.uint8)])
    small = shrink(photo(pixels), PhotoSize(24))
    assert np.asarray(read_image(small.image, "test")).min() > 250


def test_small_photos_stay_as_they_are_and_are_counted(tmp_path: Path) -> None:
    sides = (10, 24, 40, 23)
    samples = [dataclasses.replace(photo(smooth(48, max(side, 16))), key=f"k{side}") for side in sides]
    samples[0] = dataclasses.replace(samples[0], image=jpeg((48, 10)), size=(48, 10))
    samples[3] = dataclasses.replace(samples[3], image=jpeg((23, 48)), size=(23, 48))
    manifest = write_shards(samples, tmp_path / "out", name="made", progress=False, photo_size=PhotoSize(24, 90))
    assert manifest.photos == ResizedPhotos(24, 90, smaller=2)
    assert Manifest.load(tmp_path / "out") == manifest
    stored = read(tmp_path / "out", manifest)
    assert [stored[0], stored[1], stored[3]] == [samples[0], samples[1], samples[3]]
    assert isinstance(stored[2], Sample)
    assert stored[2].size == (29, 24)
    line = "  photos resized to a short side of 24 pixels, JPEG quality 90; 2 smaller ones as they were"
    assert line in describe(manifest).splitlines()


def test_manifests_of_plain_shards_do_not_name_photos(tmp_path: Path) -> None:
    write(tmp_path / "out", list(make_samples(2)))
    assert "photos" not in json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())


def test_a_photo_that_does_not_decode_is_counted_and_the_order_stays(tmp_path: Path) -> None:
    excluded: Counter[str] = Counter()
    samples = list(make_samples(40, broken={3, 20}))
    manifest = write_shards(
        samples, tmp_path / "out", name="made", excluded=excluded, progress=False, photo_size=PhotoSize(8)
    )
    assert excluded == manifest.excluded == {CORRUPT_IMAGE: 2}
    stored = read(tmp_path / "out", manifest)
    one_by_one = [shrink(sample, PhotoSize(8)) for number, sample in enumerate(samples) if number not in {3, 20}]
    assert stored == one_by_one


def test_a_mask_that_cannot_be_used_is_refused_as_without_resizing(tmp_path: Path) -> None:
    wrong = photo(smooth(64, 48), regions=(Region("dog", (1.0, 1.0, 5.0, 5.0), mask=Mask((48, 64), "0")),))
    right = dataclasses.replace(wrong, key="b", regions=())
    reasons = []
    for name, photo_size in (("plain", None), ("small", PhotoSize(24))):
        excluded: Counter[str] = Counter()
        write_shards(
            [wrong, right], tmp_path / name, name="m", excluded=excluded, progress=False, photo_size=photo_size
        )
        reasons.append(dict(excluded))
    assert reasons[0] == reasons[1] == {"broken record": 1}


def test_a_photo_of_another_size_than_its_annotation_is_an_error() -> None:
    with pytest.raises(RecordError, match="its annotation is for"):
        shrink(dataclasses.replace(photo(smooth(64, 48)), size=(64, 50)), PhotoSize(24))


@pytest.mark.parametrize("quality", [90, 100])
def test_noise_which_takes_more_than_a_byte_a_pixel_is_stored(quality: int) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (400, 520, 3), dtype=np.uint8) * 255
    small = shrink(photo(noise), PhotoSize(380, quality))
    assert len(small.image) > small.size[0] * small.size[1]
    literal = np.asarray(Image.fromarray(noise).resize(small.size, Image.Resampling.BICUBIC), dtype=np.float64)
    difference = np.abs(np.asarray(read_image(small.image, "test")) - literal)
    assert difference.mean() < (10 if quality == 90 else 2)


def test_a_photo_that_is_too_long_for_jpeg_is_an_error_of_its_record() -> None:
    size = (70_000, 20)
    with pytest.raises(RecordError, match=r"a: resized to \(66500, 19\) pixels, it cannot be stored as JPEG"):
        shrink(Sample("a", encode(np.zeros((20, 70_000, 3), dtype=np.uint8)), size, ("a dog",)), PhotoSize(19))


def test_an_error_of_the_source_comes_through() -> None:
    def source() -> Any:
        yield from make_samples(3)
        raise OSError("the disk of the source failed")

    with pytest.raises(OSError, match="disk"):
        list(shrink_all(source(), PhotoSize(8)))


def test_no_more_photos_are_decoded_ahead_than_the_cores_that_may_be_used_need(one_core: None) -> None:
    taken: list[str] = []

    def source() -> Any:
        for sample in make_samples(9):
            taken.append(sample.key)
            yield sample

    next(shrink_all(source(), PhotoSize(8)))
    assert len(taken) == 3  # one that is shrunk, and two that wait for the core


@pytest.mark.parametrize("options", [{"short_side": 0}, {"short_side": 9, "jpeg_quality": 101}])
def test_sizes_and_qualities_outside_their_range_are_errors(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="has to be"):
        PhotoSize(**options)


def prepare(tmp_path: Path, *options: str) -> Path:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / "one.jpg").write_bytes(encode(smooth(64, 48), "JPEG"))
    record = [{"filename": "one.jpg", "split": "val", "sentences": [{"raw": "a dog"}], "imgid": 0}]
    (tmp_path / "k.json").write_text(json.dumps({"images": record, "dataset": "rsicd"}))
    files = ["--images", str(tmp_path / "images"), "--karpathy", str(tmp_path / "k.json"), "--split", "val"]
    main(["prepare", "rsicd", *files, "--out", str(tmp_path / "out"), *options])
    return tmp_path / "out"


def test_prepare_resizes_and_verify_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prepare(tmp_path, "--short_side", "32")
    assert Manifest.load(out).photos == ResizedPhotos(32, 90)
    (sample,) = read(out, Manifest.load(out))
    assert isinstance(sample, Sample)
    assert sample.size == read_image(sample.image, "test").size == (43, 32)
    capsys.readouterr()
    Verify([str(out)], workers=0)()
    assert f"{out}: photos resized to a short side of 32 pixels, JPEG quality 90\nok: " in capsys.readouterr().out


def test_a_quality_without_a_size_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    files = ["--images", str(tmp_path), "--karpathy", str(tmp_path / "missing.json"), "--split", "val"]
    with pytest.raises(SystemExit, match="jpeg_quality is of photos that are resized; give short_side, too"):
        main(["prepare", "rsicd", *files, "--out", str(tmp_path / "out"), "--jpeg_quality", "90"])


def test_verify_finds_photos_of_other_sizes_than_the_manifest_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards(tmp_path / "set", 3)  # of 12 pixels
    content = Manifest.load(folder)
    known = {name: getattr(content, name) for name in ("name", "shards", "labels", "excluded", "captions")}

    def says(photos: ResizedPhotos) -> str:
        Manifest(**known, photos=photos).save(folder)
        with pytest.raises(ValueError, match=r"1 fault in manifest\.json"):
            Verify([str(folder)], workers=0)()
        return capsys.readouterr().out

    assert "says photos with a short side above 8 pixels: 0, the shards hold 3" in says(ResizedPhotos(8, 95))
    assert "says photos with a short side below 16 pixels: 0, the shards hold 3" in says(ResizedPhotos(16, 95))
    Manifest(**known, photos=ResizedPhotos(16, 95, smaller=3)).save(folder)
    Verify([str(folder)], workers=0)()


def test_a_model_of_larger_images_is_refused_and_others_read_with_torch(
    tmp_path: Path, tokenizer: CaptionTokenizer
) -> None:
    folder = tmp_path / "set"
    write_shards(make_samples(8), folder, name="test", progress=False, photo_size=PhotoSize(10))
    data = ShardDataModule(train=folder, val=folder, test=folder, batch_size=4, num_workers=0)
    for transform, needed in (
        (ImageTransform((12, 12)), 12),
        (ImageTransform((8, 12), resize_mode="squash"), 12),
        (ProcessorTransform((8, 8), resize_to=11), 11),
    ):
        data.bind(transform, tokenizer)
        for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
            with pytest.raises(
                ValueError, match=rf"short side of 10 pixels, .* resized to {needed}: .*--short_side {needed} or more"
            ):
                loader()
    transform = ImageTransform((8, 8))
    data.bind(transform, tokenizer)
    (first, *_) = data.test_dataloader()
    stored = [sample for sample in read(folder, data.manifest("test")) if isinstance(sample, Sample)]
    fast = transform.with_resizer("torch")
    expected = torch.stack([fast(read_image(sample.image, "test")) for sample in stored[:4]])
    assert torch.equal(first.images, expected)
    plain = ShardDataModule(test=make_shards(tmp_path / "plain", 4), batch_size=4, num_workers=0)
    plain.bind(transform, tokenizer)
    (batch,) = plain.test_dataloader()
    assert torch.equal(batch.images[0], transform(read_image(small_jpeg(0), "test")))
