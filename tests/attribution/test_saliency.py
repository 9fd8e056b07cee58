from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equation_10 import block_input, replacing
from inputs import random_pairs
from linear_encoder import LinearEncoder
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from lightning_xai.attribution import Saliency
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def slopes(score: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of score [N, ...] -> [N] in each entry of one point."""
    moves = step * torch.eye(point.numel(), dtype=point.dtype).reshape(-1, *point.shape)
    with torch.no_grad():
        return ((score(point + moves) - score(point - moves)) / (2 * step)).reshape(point.shape)


def test_pixels_by_finite_differences(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = Saliency(encoder).attribute(images, tokens)
    text = encoder.encode_text(tokens[:1]).detach()
    # One row of patches: its 8 of 32 rows of pixels.
    rest = images[0, :, 8:]

    def score(points: Tensor) -> Tensor:
        whole = torch.cat([points, rest.expand(len(points), -1, -1, -1)], dim=2)
        return cosine_similarity(encoder.encode_image(whole), text)

    expected = avg_pool2d(slopes(score, images[0, :, :8]).abs().amax(dim=0)[None], 8)[0]
    torch.testing.assert_close(result.image[0, :1], expected, rtol=1e-5, atol=1e-9)
    assert expected.min() > 1e-6


def test_token_embeddings_by_finite_differences(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = Saliency(encoder).attribute(images, tokens)
    model: Any = encoder.model
    block = model.transformer.resblocks[0]
    hidden = block_input(block, lambda: model.encode_text(tokens[:1]))[0]
    image = encoder.encode_image(images[:1]).detach()

    def score(points: Tensor) -> Tensor:
        return cosine_similarity(
            replacing(block, points, lambda: model.encode_text(tokens[:1].expand(len(points), -1))), image
        )

    torch.testing.assert_close(result.text[0], slopes(score, hidden).norm(dim=1), rtol=1e-5, atol=1e-9)
    assert result.text[0, :8].min() > 1e-6


def test_a_linear_score_has_its_weights_as_saliency() -> None:
    encoder = LinearEncoder()
    images, tokens = random_pairs(encoder)
    result = Saliency(encoder).attribute(images, tokens)
    s, t = encoder.image_terms(images).sum(dim=(1, 2, 3)), encoder.text_terms(tokens).sum(dim=1)
    weight = encoder.image_weight.detach().abs().amax(dim=0)
    torch.testing.assert_close(result.image, t.abs()[:, None, None] * avg_pool2d(weight[None], 4))
    content = encoder.tokenizer.content_mask(tokens)
    torch.testing.assert_close(result.text, content * (s.abs() * encoder.text_weight.detach().norm())[:, None])
    torch.testing.assert_close(result.similarity, s * t)


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_the_callers_images_stay_as_they_were(make_encoder: MakeEncoder, needs_gradients: bool) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    images.requires_grad_(needs_gradients)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Captum warns where it has to change what inputs require
        result = Saliency(encoder).attribute(images, tokens)
    assert images.requires_grad == needs_gradients
    assert images.grad is None
    assert not result.image.requires_grad
    assert not result.text.requires_grad
