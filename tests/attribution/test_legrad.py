from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import random_pairs
from torch import Tensor
from torch.nn.functional import cosine_similarity
from written_out import Tower, own_words, resnet_pool, towers

from lightning_xai.attribution import LeGrad
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def literal(tower: Tower, other: Tensor, start: int) -> Tensor:
    """The sum over blocks [T], with the gradient by every entry of every head's attention."""
    outputs = [tower.run()]
    outputs = [*tower.inputs[1:], *outputs]
    total = torch.zeros(len(outputs[0]), dtype=other.dtype)
    for attended, output in list(zip(tower.seen, outputs, strict=True))[start:]:
        score = cosine_similarity(tower.head(output.mean(dim=0)), other, dim=0)
        gradients = torch.autograd.grad(score, attended.probabilities, retain_graph=True)
        for gradient in gradients:
            for query, row in enumerate(gradient):
                for key, value in enumerate(row):
                    if tower.mask is None or key <= query:
                        total[key] += max(0.0, float(value)) / len(gradients) / len(gradient)
    return total


def scaled(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("start", [0, -1, (1, 2)], ids=str)
def test_agrees_with_the_papers_formula_entry_by_entry(make_encoder: MakeEncoder, start: int | tuple[int, int]) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = LeGrad(encoder, start_layer=start).attribute(images, tokens)
    starts = start if isinstance(start, tuple) else (start, start)
    for row in range(len(images)):
        image, text = towers(encoder, images[row], tokens[row])
        others = text.embedding().detach(), image.embedding().detach()
        image, text = towers(encoder, images[row], tokens[row])
        expected = scaled(literal(image, others[0], range(3)[starts[0]])[1:])
        torch.testing.assert_close(result.image[row].flatten(), expected, rtol=1e-8, atol=1e-12)
        expected = literal(text, others[1], range(3)[starts[1]])
        expected[1 : text.read] = scaled(expected[1 : text.read])
        torch.testing.assert_close(result.text[row], own_words(16, text, expected), rtol=1e-8, atol=1e-12)


def test_a_resnet_is_explained_by_its_pools_attention(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("resnet", torch.float64, seed=1)
    images, tokens = random_pairs(encoder)
    result = LeGrad(encoder).attribute(images, tokens)
    for row in range(len(images)):
        pool, project = resnet_pool(encoder, images[row])
        score = cosine_similarity(project(pool.context)[0], encoder.encode_text(tokens[row, None])[0].detach(), dim=0)
        gradients = torch.autograd.grad(score, pool.probabilities)
        expected = scaled(torch.stack(gradients).clamp(min=0).mean(dim=(0, 1))[1:])
        torch.testing.assert_close(result.image[row].flatten(), expected, rtol=1e-8, atol=1e-12)
