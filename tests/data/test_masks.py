"""Masks as run lengths: to the pixel what pycocotools has, through the pixels' own transform, and hostile ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco
from torchvision.transforms.functional import center_crop

from lightning_xai.data.masks import Mask, MaskError, decode_mask, encode_mask, mask_runs
from lightning_xai.models.image_transform import ImageTransform
from lightning_xai.models.processor_transform import ProcessorTransform


def noise(seed: int, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Blots of different sizes, so that runs are of all lengths."""
    generator = np.random.default_rng(seed)
    coarse = generator.random((size[0] // 5 + 1, size[1] // 5 + 1)) < generator.random()
    return np.kron(coarse, np.ones((5, 5), dtype=bool))[: size[0], : size[1]] ^ (generator.random(size) < 0.02)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 1), (31, 23), (480, 640)])
def test_masks_are_decoded_to_the_pixel_as_pycocotools_does(size: tuple[int, int]) -> None:
    for seed in range(5):
        pixels = noise(seed, size)
        mask = encode_mask(pixels)
        assert (decode_mask(mask) == pixels).all()
        theirs = coco.decode({"size": list(size), "counts": mask.counts.encode()})
        assert (decode_mask(mask) == theirs.astype(bool)).all()
        assert mask_runs(mask).tolist() == [len(list(run)) for run in _runs(pixels)], (
            "as lengths of runs down the columns, the first of them outside"
        )


def _runs(pixels: NDArray[np.bool_]) -> list[list[bool]]:
    flat = pixels.T.flatten().tolist()
    runs = [list(run) for _, run in itertools.groupby(flat)]
    return [[], *runs] if flat[0] else runs


@pytest.mark.parametrize("counts", ["", "é", "0", "3", "05", "0o", "P", "4" * 3, "o" * 9, "0" + "o" * 6 + "0", "~~~"])
def test_run_lengths_that_do_not_fill_the_size_are_refused(counts: str) -> None:
    with pytest.raises(MaskError):
        decode_mask(Mask((2, 2), counts))


@pytest.mark.parametrize("size", [(0, 4), (-2, -2), (2, 3), (1 << 40, 1 << 40)])
def test_run_lengths_of_another_size_are_refused_without_taking_memory(size: tuple[int, int]) -> None:
    with pytest.raises(MaskError):
        decode_mask(Mask(size, "04"))


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_mask_or_refused(counts: str, height: int, width: int) -> None:
    try:
        pixels = decode_mask(Mask((height, width), counts))
    except MaskError:
        return
    assert (pixels == coco.decode({"size": [height, width], "counts": counts.encode()}).astype(bool)).all()


@pytest.mark.parametrize(
    "transform",
    [
        ImageTransform(size=(32, 32)),
        ImageTransform(size=(24, 40)),
        ImageTransform(size=(32, 32), resize_mode="longest"),
        ImageTransform(size=(30, 20), resize_mode="squash"),
        ProcessorTransform(size=(28, 28), resize_to=33),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(64, 64), (49, 71), (83, 40), (9, 11)])
def test_masks_go_through_the_resize_and_crop_of_the_pixels(transform: ImageTransform, size: tuple[int, int]) -> None:
    pixels = noise(1, size)
    found = transform.mask(encode_mask(pixels)).numpy()
    width, height = transform._resized(size[::-1])
    # Pillow rounds centres that fall between two pixels by chance: not on twice the pixels.
    places = [
        np.minimum((2 * np.arange(n) + 1) * side // (2 * n), side - 1)
        for n, side in ((height, size[0]), (width, size[1]))
    ]
    resized = pixels[places[0]][:, places[1]]
    if isinstance(transform, ProcessorTransform):
        top, left = (height - 28) // 2, (width - 28) // 2
        expected = resized[top : top + 28, left : left + 28]
    else:
        expected = center_crop(torch.from_numpy(resized)[None], list(transform.size))[0].numpy()
    assert (found == expected).all()
    theirs = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))
    assert (resized != theirs).mean() < 0.05


def test_a_mask_moves_as_its_box_does() -> None:
    transform = ImageTransform(size=(32, 32))
    pixels = np.zeros((64, 128), dtype=bool)
    pixels[10:30, 50:90] = True
    ((x0, y0, x1, y1),) = transform.boxes(torch.tensor([[50.0, 10.0, 40.0, 20.0]]), (128, 64)).long().tolist()
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[y0:y1, x0:x1] = True
    assert torch.equal(transform.mask(encode_mask(pixels)), expected)
