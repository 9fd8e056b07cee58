from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import random_pairs
from torch import Tensor
from written_out import Tower, own_words, resnet_pool, towers

from lightning_xai.attribution import AttentionRollout
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def literal(tower: Tower, start: int) -> Tensor:
    """The row that is read of the whole product of matrices [T]."""
    tower.run()
    rollout = torch.eye(len(tower.tokens_TD), dtype=torch.float64)
    for attended in tower.seen[start:]:
        mean = torch.stack(attended.probabilities).mean(dim=0).detach()
        mixed = 0.5 * mean + 0.5 * torch.eye(len(mean), dtype=torch.float64)
        rollout = mixed / mixed.sum(dim=1, keepdim=True) @ rollout
    return rollout[tower.read]


@pytest.mark.parametrize("start", [0, -1, (2, 1)], ids=str)
def test_agrees_with_the_product_of_whole_matrices(make_encoder: MakeEncoder, start: int | tuple[int, int]) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = AttentionRollout(encoder, start_layer=start).attribute(images, tokens)
    starts = start if isinstance(start, tuple) else (start, start)
    for row in range(len(images)):
        image, text = towers(encoder, images[row], tokens[row])
        expected = literal(image, range(3)[starts[0]])[1:]
        torch.testing.assert_close(result.image[row].flatten(), expected, rtol=1e-8, atol=1e-12)
        expected = own_words(16, text, literal(text, range(3)[starts[1]]))
        torch.testing.assert_close(result.text[row], expected, rtol=1e-8, atol=1e-12)


def test_the_image_map_does_not_depend_on_the_caption(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    maps = [AttentionRollout(encoder).attribute(images, tokens[order]).image for order in ([0, 1, 2], [2, 0, 1])]
    torch.testing.assert_close(*maps)


def test_a_resnets_pool_is_the_one_step(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("resnet", torch.float64, seed=1)
    images, tokens = random_pairs(encoder)
    result = AttentionRollout(encoder).attribute(images, tokens)
    for row in range(len(images)):
        pool, _ = resnet_pool(encoder, images[row])
        expected = torch.stack(pool.probabilities).mean(dim=0)[0, 1:].detach()
        torch.testing.assert_close(result.image[row].flatten(), expected, rtol=1e-8, atol=1e-12)
