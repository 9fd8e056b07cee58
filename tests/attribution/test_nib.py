from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equation_10 import block_input, replacing
from inputs import random_pairs
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution import NIB
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def literal(block: nn.Module, encode: Callable[[], Tensor], other: Tensor, steps: int) -> Tensor:
    """Right Riemann sum of the gradient along the path from zero, times the hidden states: [T]."""
    hidden = block_input(block, encode)
    total = torch.zeros_like(hidden)
    for step in range(1, steps + 1):
        point = (step / steps * hidden).requires_grad_()
        score = cosine_similarity(replacing(block, point, encode), other).sum()
        total += torch.autograd.grad(score, point)[0] / steps
    return (total * hidden).sum(dim=2).flatten()


@pytest.mark.parametrize("layer", [None, 0, (2, 1)], ids=str)
def test_agrees_with_gradients_summed_along_the_path(
    make_encoder: MakeEncoder, layer: int | tuple[int, int] | None
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = NIB(encoder, layer=layer, steps=7).attribute(images, tokens)
    numbers = layer if isinstance(layer, tuple) else (1 if layer is None else layer,) * 2
    model = encoder.model
    blocks = model.visual.transformer.resblocks[numbers[0]], model.transformer.resblocks[numbers[1]]
    for row in range(len(images)):
        image, caption = images[row, None], tokens[row, None]
        embeddings = model.encode_image(image).detach(), model.encode_text(caption).detach()
        expected = literal(blocks[0], lambda image=image: model.encode_image(image), embeddings[1], 7)  # type: ignore[misc]
        torch.testing.assert_close(result.image[row].flatten(), expected[1:], rtol=1e-8, atol=1e-12)
        expected = literal(blocks[1], lambda caption=caption: model.encode_text(caption), embeddings[0], 7)  # type: ignore[misc]
        torch.testing.assert_close(result.text[row], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("architecture", ["vit", "resnet", "vit_average_pool"])
def test_the_completeness_error_vanishes_with_more_steps(make_encoder: MakeEncoder, architecture: str) -> None:
    encoder = make_encoder(architecture, torch.float64)
    pairs = random_pairs(encoder)
    few, many = (NIB(encoder, steps=steps, rule="midpoint").attribute(*pairs) for steps in (4, 1000))
    assert few.completeness_error is not None
    assert many.completeness_error is not None
    assert many.completeness_error.abs().max() < 1e-3
    assert few.completeness_error.abs().max() > many.completeness_error.abs().max()
