from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from inputs import batch_sizes, random_pairs
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate

from lightning_xai.attribution import RISE
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def literal_image_masks(masks: int, cells: int, probability: float, size: tuple[int, int], seed: int) -> Tensor:
    """Section 3.2 of the paper, one mask after the other: draw cells, enlarge them, cut out a shifted window."""
    generator = torch.Generator().manual_seed(seed)
    sides = [math.ceil(length / cells) for length in size]
    drawn = []
    for _ in range(masks):
        numbers = torch.rand(2 + cells**2, generator=generator)
        top, left = int(numbers[0] * sides[0]), int(numbers[1] * sides[1])
        shown = (numbers[2:] < probability).double().reshape(1, 1, cells, cells)
        enlarged = interpolate(shown, size=[(cells + 1) * side for side in sides], mode="bilinear")[0, 0]
        drawn.append(enlarged[top : top + size[0], left : left + size[1]])
    return torch.stack(drawn)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize(("cells", "probability"), [(7, 0.5), (3, 0.2)])
def test_images_agree_with_the_paper_taken_mask_by_mask(
    make_encoder: MakeEncoder, name: str, cells: int, probability: float
) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    method = RISE(encoder, image_masks=20, text_masks=1, cells=cells, probability=probability, seed=5)
    result = method.attribute(images, tokens)
    side = images.shape[-1]
    masks = literal_image_masks(20, cells, probability, (side, side), seed=5)
    assert masks.shape == (20, side, side)
    expected = torch.zeros_like(result.image)
    with torch.no_grad():
        for row in range(len(images)):
            text = encoder.encode_text(tokens[row, None])
            for mask in masks:
                score = cosine_similarity(encoder.encode_image(images[row, None] * mask), text)
                expected[row] += score * avg_pool2d(mask[None], side // 4)[0] / (20 * probability)
    torch.testing.assert_close(result.image, expected, rtol=1e-6, atol=1e-9)


def test_masks_show_each_pixel_as_often_as_asked_and_cover_oblong_images(make_encoder: MakeEncoder) -> None:
    method = RISE(make_encoder("vit"), image_masks=4000, cells=4, probability=0.3, internal_batch_size=1000)
    shown = torch.cat(list(method._draw_image_masks(torch.zeros(1, 3, 10, 19))))
    assert shown.shape == (4000, 10, 19)
    assert shown.min() >= 0
    assert shown.max() <= 1
    torch.testing.assert_close(shown.mean(dim=0), torch.full((10, 19), 0.3), rtol=0, atol=0.04)


def test_text_agrees_with_the_expectation_over_all_masks(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder, ["a red mat there"])
    probability = 0.4
    expected = torch.zeros(16, dtype=torch.float64)
    with torch.no_grad():
        image = encoder.encode_image(images)
        for mask in product([0, 1], repeat=4):
            kept = tokens.clone()
            kept[0, 1:5] *= torch.tensor(mask)  # the padding token is 0
            weight = math.prod(probability if one else 1 - probability for one in mask)
            score = cosine_similarity(encoder.encode_text(kept), image)
            expected[1:5] += weight * score * torch.tensor(mask) / probability
    result = RISE(encoder, image_masks=1, text_masks=20000, probability=probability).attribute(images, tokens)
    assert expected[1:5].max() - expected[1:5].min() > 0.01
    torch.testing.assert_close(result.text[0], expected, rtol=0, atol=0.005)


def test_the_seed_decides_what_is_drawn(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    state = torch.get_rng_state()
    first, second, other = (
        RISE(encoder, image_masks=10, text_masks=10, seed=seed).attribute(images, tokens) for seed in (1, 1, 2)
    )
    torch.testing.assert_close(first.image, second.image, rtol=0, atol=0)
    assert (first.image - other.image).abs().max() > 1e-4
    assert (first.text - other.text).abs().max() > 1e-4
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_masked_inputs_than_asked_for_pass_through_a_tower(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    sizes = batch_sizes(encoder, "encode_image", monkeypatch)
    RISE(encoder, image_masks=30, text_masks=1, internal_batch_size=8).attribute(images, tokens)
    assert max(sizes) == 8
    assert sum(sizes) == 3 * (30 + 1)  # the pairs' own similarity, too


def test_options_that_cannot_work_are_errors_at_once(make_encoder: MakeEncoder) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_masks": 0}, "image_masks has to be at least 1; got 0"),
        ({"text_masks": 0}, "text_masks has to be at least 1; got 0"),
        ({"cells": 0}, "cells has to be at least 1; got 0"),
        ({"probability": 1.0}, "probability has to lie between 0 and 1.*got 1.0"),
        ({"probability": 0.0}, "probability has to lie between 0 and 1.*got 0.0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            RISE(make_encoder("vit"), **options)
