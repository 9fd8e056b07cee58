from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from lightning_xai.data.sample import RecordError
from lightning_xai.models.image_transform import ImageTransform, open_clip_preprocessing
from lightning_xai.models.processor_transform import ProcessorTransform

ZEROS = (0.0, 0.0, 0.0)
ONES = (1.0, 1.0, 1.0)
TARGETS = [(64, 64), (48, 80), (80, 48), (225, 225)]
SIZES = [(64, 64), (100, 80), (80, 100), (333, 97), (97, 333), (31, 45), (45, 31), (640, 427), (225, 226), (501, 500)]


def draw(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A white rectangle (x, y, w, h) on black."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    return image


def edges(profile: np.ndarray) -> tuple[float, float]:
    """Where a box filter of height 1 begins and ends, from the half-height crossings of its linear profile."""
    inside = np.flatnonzero(profile > 0.5)
    first, last = int(inside[0]), int(inside[-1])
    begin = float(first)
    if first > 0:
        begin = first - (profile[first] - 0.5) / (profile[first] - profile[first - 1]) + 0.5
    end = float(last + 1)
    if last + 1 < len(profile):
        end = last + (profile[last] - 0.5) / (profile[last] - profile[last + 1]) + 0.5
    return begin, end


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "letterbox", "squash"])
def test_boxes_lie_where_the_pixels_lie(resize_mode: str) -> None:
    options: dict[str, Any] = {"interpolation": "bilinear", "mean": ZEROS, "std": ONES}
    for target, (width, height) in product(TARGETS, SIZES):
        transform = ImageTransform(size=target, resize_mode=resize_mode, **options)
        box = (int(width * 0.4), int(height * 0.35), max(width // 4, 8), max(height // 4, 8))
        pixels = transform(draw((width, height), box)).mean(0).numpy()
        x0, y0, x1, y1 = transform.boxes(torch.tensor([box]), (width, height))[0].tolist()
        found_x, found_y = edges(pixels.max(0)), edges(pixels.max(1))
        # The half-height crossing of an edge is exact up to the resampling filter's asymmetry.
        assert (found_x[0], found_y[0], found_x[1], found_y[1]) == pytest.approx((x0, y0, x1, y1), abs=0.6), (
            width,
            height,
        )


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "letterbox", "squash"])
def test_the_whole_image_covers_exactly_the_pixels_that_show_it(resize_mode: str) -> None:
    # Whole-pixel arithmetic of padding: white images against black filling.
    for target, (width, height) in product(TARGETS, [*SIZES, (65, 64), (64, 65), (130, 67)]):
        transform = ImageTransform(size=target, resize_mode=resize_mode, mean=ZEROS, std=ONES)
        white = (transform(Image.new("RGB", (width, height), "white")).mean(0) > 0.5).numpy()
        x0, y0, x1, y1 = transform.boxes(torch.tensor([[0, 0, width, height]]), (width, height))[0].tolist()
        columns, rows = np.flatnonzero(white.any(0)), np.flatnonzero(white.any(1))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x0, y0, x1, y1), (width, height)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "letterbox"])
def test_cropping_offsets_agree_to_the_pixel(resize_mode: str) -> None:
    # Images that are not scaled (one side already fits) show each source column as it is.
    sign = 1 if resize_mode == "shortest" else -1
    for target, extra, tall in product(TARGETS, range(6), (False, True)):
        transform = ImageTransform(size=target, resize_mode=resize_mode, mean=ZEROS, std=ONES)
        height, width = target
        size = (width, height + sign * extra) if tall else (width + sign * extra, height)
        box = (11, 13, 20, 17)
        pixels = transform(draw(size, box)).mean(0) > 0.5
        x0, y0, x1, y1 = (int(edge) for edge in transform.boxes(torch.tensor([box]), size)[0].tolist())
        expected = torch.zeros(target, dtype=torch.bool)
        expected[y0:y1, x0:x1] = True
        assert torch.equal(pixels, expected), size


def test_pixels_are_those_of_open_clip() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    for mode, interpolation in product(("shortest", "longest", "squash"), ("bicubic", "bilinear", "random")):
        options: dict[str, Any] = {"resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
        expected = image_transform_v2(PreprocessCfg(size=(48, 64), **options), is_train=False)(image)
        assert torch.equal(ImageTransform(size=(48, 64), **options)(image), expected), options


@pytest.mark.parametrize("transform", [ImageTransform((48, 64)), ProcessorTransform((48, 64), resize_to=70)])
def test_the_faster_resizer_differs_by_single_grey_levels(transform: ImageTransform) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    for mode, size in product(("shortest", "longest", "letterbox", "squash"), ((141, 90), (90, 141), (40, 30))):
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        exact = replace(transform, resize_mode=mode, mean=ZEROS, std=(1 / 255,) * 3, fill_color=9)
        difference = (exact.with_resizer("torch")(image) - exact(image)).abs()
        assert difference.max() < 2.5
        assert (difference > 0.5).float().mean() < 0.2  # with ratios whose halves are rounded otherwise


def test_boxes_outside_the_crop_have_no_area() -> None:
    transform = ImageTransform(size=(100, 100))
    boxes = torch.tensor([[0, 0, 90, 100], [310, 0, 90, 100], [50, 0, 100, 200]])
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in transform.boxes(boxes, (400, 200)).tolist()]
    assert areas == [0, 0, 25 * 100]


def test_boxes_leave_their_argument_alone() -> None:
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    ImageTransform(size=(10, 10)).boxes(boxes, (50, 70))
    assert boxes.tolist() == [[1, 2, 3, 4]]


def test_denormalize_gives_the_pixels_back() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    transform = ImageTransform(size=(32, 32))
    restored = transform.denormalize(transform(Image.fromarray(noise)).expand(2, 3, 32, 32))
    expected = torch.from_numpy(noise).permute(2, 0, 1) / 255
    assert torch.allclose(restored, expected.expand(2, -1, -1, -1), atol=1e-6)


def test_the_transform_of_a_model_is_the_one_it_was_built_with() -> None:
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt", force_image_size=96)
    transform = ImageTransform.from_open_clip(model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    assert transform.size == (96, 96)
    assert torch.equal(transform(image), preprocess(image))


def test_a_model_without_a_configuration_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Linear has no visual\.preprocess_cfg"):
        ImageTransform.from_open_clip(torch.nn.Linear(1, 1))


def test_transforms_pickle_and_compare() -> None:
    transform = ImageTransform(size=(32, 48), resize_mode="longest", fill_color=9)
    copy = pickle.loads(pickle.dumps(transform))
    image = Image.new("RGB", (50, 20), "red")
    assert copy == transform
    assert torch.equal(copy(image), transform(image))
    assert transform != ImageTransform(size=(32, 48))


def test_an_image_too_thin_to_resize_is_a_broken_record() -> None:
    with pytest.raises(RecordError, match="too thin"):
        ImageTransform(size=(32, 32), resize_mode="longest")(Image.new("RGB", (1, 500)))


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"size": (0, 5)}, "size"),
    ({"size": (5, 5), "resize_mode": "crop"}, "shortest"),
    ({"size": (5, 5), "interpolation": "nearest"}, "bicubic"),
    ({"size": (5, 5), "resizer": "opencv"}, "pillow"),
]


def test_options_that_open_clip_lacks_are_errors() -> None:
    for options, message in WRONG_OPTIONS:
        with pytest.raises(ValueError, match=message):
            ImageTransform(**options)


@pytest.mark.parametrize(("mode", "share"), [("shortest", 0.25), ("longest", 1), ("letterbox", 1), ("squash", 1)])
def test_the_share_that_a_crop_leaves_is_known(mode: str, share: float) -> None:
    assert ImageTransform(size=(32, 32), resize_mode=mode).geometry((400, 100)).seen == pytest.approx(share)


@pytest.mark.parametrize("size", [(90, 140), (140, 90), (64, 48), (33, 31), (500, 12)])
def test_a_letterbox_is_the_photo_pasted_on_the_mean_colour(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for target in ((64, 64), (48, 64)):
        transform = ImageTransform(size=target, resize_mode="letterbox")
        ratio = max(size[0] / target[1], size[1] / target[0])
        small = image.resize((round(size[0] / ratio), round(size[1] / ratio)), Image.Resampling.BICUBIC)
        literal = Image.new("RGB", (target[1], target[0]), tuple(round(255 * value) for value in transform.mean))
        left, top = (target[1] - small.width) // 2, (target[0] - small.height) // 2
        literal.paste(small, (left, top))
        mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
        expected = (torch.from_numpy(np.array(literal)).permute(2, 0, 1) / 255 - mean) / std
        found = transform(image)
        assert torch.allclose(found, expected, atol=0.5 / 255 / min(transform.std))  # the mean is no whole grey
        photo = torch.zeros(target, dtype=torch.bool)
        photo[top : top + small.height, left : left + small.width] = True
        assert torch.allclose(found[:, photo], expected[:, photo], atol=1e-6)
        assert not found[:, ~photo].any()


def test_a_letterbox_shows_something_of_every_photo_and_open_clip_can_load_it() -> None:
    transform = ImageTransform(size=(32, 32), resize_mode="letterbox")
    for size in ((1, 1), (1, 500), (3000, 2)):
        pixels = transform(Image.new("RGB", size, "white"))
        assert pixels.any()
        box = transform.boxes(torch.tensor([[0.0, 0.0, *size]]), size)[0]
        assert (box[2:] - box[:2]).min() >= 1
        assert transform.geometry(size).seen == 1
    config = open_clip_preprocessing({"size": (32, 32), "resize_mode": "letterbox", "mean": transform.mean})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)(image)
    assert torch.allclose(transform(image), theirs, atol=0.5 / 255 / min(transform.std))
