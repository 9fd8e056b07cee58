"""Maps on the photo: a bright square at a known place, through every way to fit a photo into a model's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_xai.attribution.patch_grid import PatchGrid
from lightning_xai.models.image_transform import ImageTransform
from lightning_xai.photo import PhotoGeometry, on_photo

MODES = ["shortest", "longest", "letterbox", "squash"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(200, 120), (120, 200), (96, 96)])
@pytest.mark.parametrize("target", [(96, 96), (48, 96)])
def test_a_map_of_brightness_lies_on_the_bright_square(
    mode: str, size: tuple[int, int], target: tuple[int, int]
) -> None:
    x, y, side = size[0] // 2 - 12, size[1] // 2 - 4, 24
    photo = Image.new("RGB", size)
    photo.paste((255, 255, 255), (x, y, x + side, y + side))
    transform = ImageTransform(target, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode)
    patches = PatchGrid((target[0] // 4, target[1] // 4)).means(transform(photo).mean(dim=0)).numpy()
    heat = on_photo(patches, transform.geometry(size)).astype(float)
    assert heat.shape == (size[1], size[0])
    rows, columns = np.nonzero(np.nan_to_num(heat) > 0.5)
    patch = 4 / np.array(transform.geometry(size).scale)  # half a patch is as near as patches tell
    assert abs(columns.min() - x) <= patch[0] / 2 + 1
    assert abs(columns.max() + 1 - x - side) <= patch[0] / 2 + 1
    assert abs(rows.min() - y) <= patch[1] / 2 + 1
    assert abs(rows.max() + 1 - y - side) <= patch[1] / 2 + 1


@pytest.mark.parametrize("mode", MODES)
def test_boxes_come_back_where_they_were_but_for_what_the_crop_cuts(mode: str) -> None:
    for size in ((200, 120), (7, 300), (1, 1), (64, 64)):
        transform = ImageTransform((64, 48), resize_mode=mode)
        if mode == "longest" and min(size) < 5:
            continue  # open_clip's own rounding leaves nothing of such images
        geometry = transform.geometry(size)
        for box in ([0.0, 0.0, *size], [size[0] / 3, size[1] / 4, size[0] / 3, size[1] / 2]):
            x0, y0, x1, y1 = transform.boxes(torch.tensor([box]), size)[0].double().tolist()
            corners = np.array([[x0, y0], [x1, y1]])
            back = (corners - geometry.offset) / geometry.scale
            left, top, right, bottom = geometry.seen_xyxy
            wanted = np.array([box[:2], [box[0] + box[2], box[1] + box[3]]])
            np.testing.assert_allclose(back, wanted.clip([left, top], [right, bottom]), atol=1e-3)


def test_what_the_crop_cuts_is_nan_and_padding_is_known_by_patch() -> None:
    cropped = PhotoGeometry((40, 10), (10, 10), (1.0, 1.0), (-15.0, 0.0))
    heat = on_photo(np.ones((2, 2)), cropped)
    assert np.isnan(heat[:, :15]).all()
    assert np.isnan(heat[:, 25:]).all()
    assert (heat[:, 15:25] == 1).all()
    assert cropped.seen == 0.25
    assert not cropped.padding((2, 2)).any()
    padded = PhotoGeometry((40, 20), (20, 20), (0.5, 0.5), (0.0, 5.0))
    np.testing.assert_allclose(padded.padding((4, 2)), np.array([[1, 1], [0, 0], [0, 0], [1, 1]]))
    np.testing.assert_allclose(padded.padding((2, 1)), [[0.5], [0.5]])
    assert padded.seen == 1
    np.testing.assert_allclose(padded.frame_xyxy, (0, -10, 40, 30))
    assert PhotoGeometry.of(padded.record()) == padded


def test_large_photos_are_reduced_and_tensors_keep_their_leading_axes() -> None:
    geometry = PhotoGeometry((4000, 1000), (32, 32), (0.008, 0.032), (0.0, 0.0))
    assert on_photo(np.zeros((3, 2, 4, 4)), geometry).shape == (3, 2, 256, 1024)
    assert on_photo(np.zeros((1, 1)), PhotoGeometry((1, 1), (32, 32), (32.0, 32.0), (0.0, 0.0))).shape == (1, 1)
