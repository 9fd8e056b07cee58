from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from inputs import random_pairs
from linear_encoder import LinearEncoder

from lightning_xai.attribution import CentredGaussian, RandomMap
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def test_noise_follows_from_the_pair_alone(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    result = RandomMap(encoder).attribute(images, tokens)
    alone = RandomMap(encoder).attribute(images[1:2], tokens[1:2, :6])
    assert torch.equal(alone.image[0], result.image[1])
    assert torch.equal(alone.text[0], result.text[1, :6])
    changed = images.clone()
    changed[0, 0, 0, 0] += 1e-3
    tokens[1, 1] += 1
    other = RandomMap(encoder).attribute(changed, tokens)
    for row in (0, 1):
        assert not torch.equal(other.image[row], result.image[row])
        assert not torch.equal(other.text[row], result.text[row])
    assert torch.equal(other.image[2], result.image[2])


def test_noise_of_another_seed_is_other_noise_and_the_global_state_stays(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    state = torch.get_rng_state()
    first, second = (RandomMap(encoder, seed=seed).attribute(images, tokens) for seed in (0, 1))
    assert (first.image - second.image).abs().max() > 0.1
    assert (first.text - second.text).abs().max() > 0.1
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_uniform_on_patches_and_content_tokens() -> None:
    encoder = LinearEncoder(size=(80, 120), grid=(40, 60))
    images, tokens = random_pairs(encoder)
    result = RandomMap(encoder).attribute(images, tokens)
    quarters = torch.histc(result.image, bins=4, min=0, max=1) / result.image.numel()
    torch.testing.assert_close(quarters, torch.full_like(quarters, 0.25), rtol=0, atol=0.02)
    content = encoder.tokenizer.content_mask(tokens)
    assert torch.equal(result.text > 0, content)
    assert result.text.max() < 1


def test_the_gaussian_is_centred_and_as_wide_in_pixels_on_both_axes() -> None:
    encoder = LinearEncoder(size=(20, 40), grid=(5, 5))  # patches of 4 x 8 pixels
    images, tokens = random_pairs(encoder)
    result = CentredGaussian(encoder, width=0.3).attribute(images, tokens)
    for row in range(5):
        for column in range(5):
            squared = (4 * (row - 2)) ** 2 + (8 * (column - 2)) ** 2
            expected = math.exp(-squared / (2 * (0.3 * 20) ** 2))
            assert result.image[1, row, column] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(result.image[0], result.image[2])


def test_the_text_gaussian_is_centred_on_the_content_tokens(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder, ["a red mat there", "two big cats", "cats"])
    result = CentredGaussian(encoder, width=0.25).attribute(images, tokens)
    four = [math.exp(-(((place - 1.5) / (0.25 * 4)) ** 2) / 2) for place in range(4)]
    assert result.text[0].tolist() == pytest.approx([0, *four, *[0] * 11])
    three = [math.exp(-(((place - 1) / (0.25 * 3)) ** 2) / 2) for place in range(3)]
    assert result.text[1].tolist() == pytest.approx([0, *three, *[0] * 12])
    assert result.text[2].tolist() == [0, 1, *[0] * 14]


@pytest.mark.parametrize("method", [RandomMap, CentredGaussian])
def test_controls_report_the_true_similarity(method: type[RandomMap] | type[CentredGaussian]) -> None:
    encoder = LinearEncoder()
    images, tokens = random_pairs(encoder)
    result = method(encoder, internal_batch_size=2).attribute(images, tokens)
    s, t = encoder.image_terms(images).sum(dim=(1, 2, 3)), encoder.text_terms(tokens).sum(dim=1)
    torch.testing.assert_close(result.similarity, s * t)


def test_a_width_that_is_not_positive_is_an_error(make_encoder: MakeEncoder) -> None:
    cases: list[float] = [0.0, -1.0, float("nan")]
    for width in cases:
        with pytest.raises(ValueError, match="width has to be positive"):
            CentredGaussian(make_encoder("vit"), width=width)
