from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import random_pairs
from torch import Tensor
from torch.nn.functional import cosine_similarity
from written_out import Attended, Tower, own_words, resnet_pool, towers

from lightning_xai.attribution import GradECLIP
from lightning_xai.models import DualEncoder, UnsupportedTowerError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_xai.attribution.ConstantMapWarning")  # ReLUs of random maps
MakeEncoder = Callable[..., DualEncoder]


def of_attention(attended: Attended, gradient_D: Tensor, read: int, compared: range) -> Tensor:
    """The paper's map of one attention [T], token by token; s is scaled over the `compared` tokens."""
    cosines = [float(cosine_similarity(attended.query[read], attended.key[p], dim=0)) for p in compared]
    values = torch.zeros(len(attended.key), dtype=gradient_D.dtype)
    for p, cosine in zip(compared, cosines, strict=True):
        s = (cosine - min(cosines)) / (max(cosines) - min(cosines))
        values[p] = max(0.0, sum(float(g * v) for g, v in zip(gradient_D, attended.value[p], strict=True)) * s)
    return values


def literal(tower: Tower, other: Tensor, start: int, *, single: bool, compared: range) -> Tensor:
    hidden = tower.run(start if single else None)
    score = cosine_similarity(tower.head(hidden[tower.read]), other, dim=0)
    total = torch.zeros(len(hidden), dtype=hidden.dtype)
    for attended in tower.seen[start:]:
        (gradient,) = torch.autograd.grad(score, attended.context, retain_graph=True)
        total += of_attention(attended, gradient[tower.read], tower.read, compared)
    return total


@pytest.mark.parametrize("heads", ["model", "single"])
@pytest.mark.parametrize("start", [-1, 0, (1, 0)], ids=str)
def test_agrees_with_the_papers_formula_token_by_token(
    make_encoder: MakeEncoder, start: int | tuple[int, int], heads: Any
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = GradECLIP(encoder, start_layer=start, heads=heads).attribute(images, tokens)
    starts = [range(3)[layer] for layer in (start if isinstance(start, tuple) else (start, start))]
    for row in range(len(images)):
        image, text = towers(encoder, images[row], tokens[row])
        others = text.embedding().detach(), image.embedding().detach()
        image, text = towers(encoder, images[row], tokens[row])
        single = heads == "single"
        expected = literal(image, others[0], starts[0], single=single, compared=range(1, 17))
        torch.testing.assert_close(result.image[row].flatten(), expected[1:], rtol=1e-8, atol=1e-13)
        expected = literal(text, others[1], starts[1], single=single, compared=range(text.read + 1))
        torch.testing.assert_close(result.text[row], own_words(16, text, expected), rtol=1e-8, atol=1e-13)
    assert min(result.image.max(), result.text.max()) > 1e-4


def test_one_head_is_not_the_models_cosine_but_that_is_what_is_reported(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    pairs = random_pairs(encoder)
    many, one = (GradECLIP(encoder, heads=heads).attribute(*pairs) for heads in ("model", "single"))
    assert not torch.allclose(many.image, one.image, rtol=1e-2)
    torch.testing.assert_close(one.similarity, encoder.own_similarity(*pairs))


def test_a_resnet_is_explained_at_its_pool(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("resnet", torch.float64, seed=1)
    images, tokens = random_pairs(encoder)
    result = GradECLIP(encoder).attribute(images, tokens)
    for row in range(len(images)):
        pool, project = resnet_pool(encoder, images[row])
        score = cosine_similarity(project(pool.context)[0], encoder.encode_text(tokens[row, None])[0].detach(), dim=0)
        (gradient,) = torch.autograd.grad(score, pool.context)
        expected = of_attention(pool, gradient[0], 0, range(1, len(pool.key)))
        torch.testing.assert_close(result.image[row].flatten(), expected[1:], rtol=1e-8, atol=1e-13)
    assert result.image.max() > 1e-6


def test_keys_that_are_all_alike_give_a_map_of_zeros(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    for tower in (encoder.model.visual, encoder.model):
        attention = tower.transformer.resblocks[-1].attn
        with torch.no_grad():
            attention.in_proj_weight[len(attention.in_proj_weight) // 3 : -len(attention.in_proj_weight) // 3] = 0
    result = GradECLIP(encoder).attribute(images, tokens)
    assert not result.image.any()
    assert not result.text.any()


def test_a_tower_that_averages_and_unknown_heads_are_refused(make_encoder: MakeEncoder) -> None:
    with pytest.raises(UnsupportedTowerError, match=r"image tower, which averages its tokens.*such as FeaturePair"):
        GradECLIP(make_encoder("vit_average_pool"))
    with pytest.raises(ValueError, match="unknown heads 'all'; known: model, single"):
        GradECLIP(make_encoder("vit"), heads="all")  # type: ignore[arg-type]
