from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, TEXT, encoder_from
from inputs import random_pairs
from torch import Tensor

from lightning_xai.attribution import FeaturePairAttribution, feature_pair
from lightning_xai.attribution.caption_rows import CaptionRows
from lightning_xai.models import DualEncoder

SIGLIPS_TEXT = ARCHITECTURES["vit"] | {
    "custom_text": True,
    "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    return encoder_from(SIGLIPS_TEXT, tmp_path_factory.mktemp("model"))


def padding_of(encoder: DualEncoder, tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]) > tokens.argmax(dim=1, keepdim=True)


@pytest.mark.parametrize("layer", [0, -1])
def test_a_token_has_the_map_of_its_span_and_all_padding_together_its_own(encoder: DualEncoder, layer: int) -> None:
    images, tokens = random_pairs(encoder)
    method = FeaturePairAttribution(encoder, -1, layer, 3, rule="midpoint")
    interactions = method.attribute(images, tokens).interactions
    padding = padding_of(encoder, tokens)
    for position in range(12):  # as many as the longest caption has
        own = ~padding[:, position]
        span = torch.zeros_like(padding)
        span[:, position] = True
        expected = method.span_map(images[own], tokens[own], span[own])
        torch.testing.assert_close(interactions[own, position], expected, rtol=1e-9, atol=1e-13)
    for row, maps in enumerate(method.span_map(images, tokens, padding)):
        shared = interactions[row, padding[row]]
        torch.testing.assert_close(shared.sum(dim=0), maps, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(shared, shared[:1].expand_as(shared), rtol=0, atol=0)
        # At the input a caption's padding is the reference's own, so that nothing changes there.
        assert (maps.abs().max() > 1e-6) == (layer != 0)


@pytest.mark.parametrize("layer", [0, -1])
def test_two_captions_share_the_padding_of_both(encoder: DualEncoder, layer: int) -> None:
    _, tokens = random_pairs(encoder)
    method = FeaturePairAttribution(encoder, -1, layer, 3, rule="midpoint")
    result = method.attribute_texts(tokens[:2], tokens[1:])
    swapped = method.attribute_texts(tokens[1:], tokens[:2])
    torch.testing.assert_close(result.interactions.mT, swapped.interactions, rtol=1e-9, atol=1e-13)
    expected = result.interactions.sum(dim=(1, 2)) - result.completeness_error
    exact = FeaturePairAttribution(encoder, -1, layer, 40, rule="gauss_legendre").attribute_texts(
        tokens[:2], tokens[1:]
    )
    torch.testing.assert_close(exact.interactions.sum(dim=(1, 2)), expected, rtol=1e-7, atol=1e-9)
    padding = padding_of(encoder, tokens)
    for row in range(2):
        block = result.interactions[row][padding[row]][:, padding[row + 1]]
        torch.testing.assert_close(block, block[:1, :1].expand_as(block), rtol=1e-9, atol=1e-13)


def test_a_batch_has_as_many_selections_as_its_longest_caption_has_tokens_and_one(
    encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counts: list[int] = []
    module: Any = feature_pair
    whole = module.integrated_vjp

    def counted(path: Any, points: Tensor, weights: Tensor, cotangents_BSK: Tensor, tokens: int) -> Tensor:
        counts.append(cotangents_BSK.shape[1])
        found: Tensor = whole(path, points, weights, cotangents_BSK, tokens)
        return found

    monkeypatch.setattr(module, "integrated_vjp", counted)
    longest = 12  # tokens of the longest caption, its marks included
    for each in (encoder, encoder_from(ARCHITECTURES["vit"], tmp_path)):
        FeaturePairAttribution(each).attribute(*random_pairs(each))
    padded, causal = counts
    assert padded == longest + 1
    # The start of a caption attends to itself alone: it is the reference's, on some processors to the last bit.
    assert causal in (longest, longest - 1), "no padding is seen under a causal mask"


def test_tokens_that_a_tower_adds_and_tokens_that_it_does_not_see_belong_to_no_padding(encoder: DualEncoder) -> None:
    _, tokens = random_pairs(encoder)
    rows = CaptionRows.of(encoder.text_at_layer(), encoder.tokenizer, tokens[1:2], tokens.shape[1] + 1)
    assert rows.row_BT[0].tolist() == [0, 1, 2, 3, *[5] * 12, 4], "two words, their marks, padding, the added token"
    assert rows.selections(torch.ones(1)).sum(dim=2).tolist() == [[1, 1, 1, 1, 1, 12]]
    values = torch.arange(6.0)[None, :, None] + 1
    assert rows.spread(values)[0, :, 0].tolist() == [1, 2, 3, 4, *[0.5] * 12, 5]


def test_captions_without_padding_are_refused_where_it_is_read(encoder: DualEncoder, tmp_path: Path) -> None:
    images, tokens = random_pairs(encoder)
    short, span = tokens[:2, :9], tokens[:2, :9] > 0
    method = FeaturePairAttribution(encoder)
    for run in (
        lambda: method.attribute(images[:2], short),
        lambda: method.image_map(images[:2], short),
        lambda: method.span_map(images[:2], short, span),
        lambda: method.attribute_texts(short, short),
    ):
        with pytest.raises(ValueError, match=r"reads all 16 positions of a caption.*got captions of 9 tokens"):
            run()
    causal = FeaturePairAttribution(encoder_from(ARCHITECTURES["vit"], tmp_path))
    whole = causal.attribute(images[:2], tokens[:2]).interactions
    torch.testing.assert_close(causal.attribute(images[:2], short).interactions, whole[:, :9], rtol=1e-9, atol=1e-13)
