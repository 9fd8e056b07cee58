from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, encoder_from
from inputs import random_pairs
from torch import Tensor
from torch.nn.functional import cosine_similarity
from written_out import Tower, own_words, resnet_pool, towers

from lightning_xai.attribution import MaskCLIP
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def literal(tower: Tower, other: Tensor, *, residual: bool) -> Tensor:
    """Cosine of each token [T], by the last block's values."""
    tower.run()
    last, hidden = len(tower.blocks) - 1, tower.inputs[-1]
    value = tower.seen[-1].value
    dense = tower.rest(last, hidden, value) if residual else tower.project(last, value)
    return torch.stack([cosine_similarity(tower.head(token), other, dim=0) for token in dense]).detach()


@pytest.mark.parametrize("architecture", ["vit", "vit_layer_scale_quick_gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_agrees_with_values_written_out(make_encoder: MakeEncoder, residual: bool, architecture: str) -> None:
    encoder = make_encoder(architecture, torch.float64)
    images, tokens = random_pairs(encoder)
    result = MaskCLIP(encoder, residual=residual).attribute(images, tokens)
    for row in range(len(images)):
        image, text = towers(encoder, images[row], tokens[row])
        others = text.embedding().detach(), image.embedding().detach()
        image, text = towers(encoder, images[row], tokens[row])
        expected = literal(image, others[0], residual=residual)[1:]
        torch.testing.assert_close(result.image[row].flatten(), expected, rtol=1e-8, atol=1e-12)
        expected = own_words(16, text, literal(text, others[1], residual=residual))
        torch.testing.assert_close(result.text[row], expected, rtol=1e-8, atol=1e-12)


def test_a_resnets_pool_gives_its_values_as_in_the_paper(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("resnet", torch.float64, seed=1)
    images, tokens = random_pairs(encoder)
    result = MaskCLIP(encoder).attribute(images, tokens)
    for row in range(len(images)):
        pool, project = resnet_pool(encoder, images[row])
        caption = encoder.encode_text(tokens[row, None])[0]
        expected = [cosine_similarity(project(value), caption, dim=0) for value in pool.value[1:]]
        torch.testing.assert_close(result.image[row].flatten(), torch.stack(expected).detach(), rtol=1e-8, atol=1e-12)


def test_a_pool_with_a_query_of_its_own_gives_its_values(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
    encoder = encoder_from({"embed_dim": 96, "vision_cfg": vision, "text_cfg": TEXT}, tmp_path)
    images, tokens = random_pairs(encoder)
    result = MaskCLIP(encoder).attribute(images, tokens)
    trunk: Any = encoder.model.visual.trunk
    pool = trunk.attn_pool
    with torch.no_grad():
        value = pool.kv(trunk.forward_features(images)).chunk(2, dim=2)[1]
        projected = pool.proj(value)
        dense = trunk.head(trunk.fc_norm(projected + pool.mlp(pool.norm(projected))))
        expected = cosine_similarity(dense, encoder.encode_text(tokens)[:, None], dim=2)
    torch.testing.assert_close(result.image.flatten(1), expected[:, -100:], rtol=1e-8, atol=1e-12)
