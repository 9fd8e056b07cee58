from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import captum.attr
import pytest
import torch
from inputs import batch_sizes, random_pairs
from linear_encoder import LinearEncoder
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from lightning_xai.attribution import KernelSHAP
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]


def shapley_values(players: int, value: Callable[[set[int]], float]) -> Tensor:
    """Shapley's definition: each player's marginal contributions to all coalitions of others."""
    known = {
        coalition: value(set(coalition))
        for size in range(players + 1)
        for coalition in combinations(range(players), size)
    }
    result = torch.zeros(players, dtype=torch.float64)
    for player in range(players):
        for coalition, worth in known.items():
            if player not in coalition:
                size = len(coalition)
                weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
                result[player] += weight * (known[tuple(sorted({*coalition, player}))] - worth)
    return result


def patch_game(encoder: DualEncoder, image: Tensor, tokens: Tensor, hidden: Tensor, side: int) -> Any:
    """The similarity of an image of 2 x 2 patches, of which only a coalition shows."""

    def value(coalition: set[int]) -> float:
        shown = hidden.clone()
        for patch in coalition:
            rows, columns = (
                slice(patch // 2 * side, (patch // 2 + 1) * side),
                slice(patch % 2 * side, (patch % 2 + 1) * side),
            )
            shown[:, rows, columns] = image[:, rows, columns]
        with torch.no_grad():
            return float(cosine_similarity(encoder.encode_image(shown[None]), encoder.encode_text(tokens[None])))

    return value


def token_game(encoder: DualEncoder, image: Tensor, tokens: Tensor, content: list[int]) -> Any:
    """The similarity of a caption, of whose own tokens only a coalition stays."""

    def value(coalition: set[int]) -> float:
        kept = tokens.clone()
        for player, position in enumerate(content):
            if player not in coalition:
                kept[position] = 0
        with torch.no_grad():
            return float(cosine_similarity(encoder.encode_image(image[None]), encoder.encode_text(kept[None])))

    return value


@pytest.mark.parametrize("reference", ["zeros", "black"])
def test_patches_agree_with_shapleys_definition(make_encoder: MakeEncoder, reference: Any) -> None:
    encoder = make_encoder("vit_custom_block", torch.float64)
    images, tokens = random_pairs(encoder, ["two cats"])
    images = 2 * images
    method = KernelSHAP(encoder, image_samples=16, image_reference=reference)
    hidden = encoder.black_image().double() if reference == "black" else torch.zeros_like(images[0])
    exact = shapley_values(4, patch_game(encoder, images[0], tokens[0], hidden, side=16)).reshape(2, 2)
    result = method.attribute(images, tokens)
    torch.testing.assert_close(result.image[0], exact, rtol=0, atol=1e-6)  # Captum fits in float32
    assert exact.abs().min() > 0.02 * exact.abs().max() > 1e-4


def test_tokens_agree_with_shapleys_definition(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder, ["a red mat there"])
    exact = shapley_values(4, token_game(encoder, images[0], tokens[0], [1, 2, 3, 4]))
    result = KernelSHAP(encoder, image_samples=20, text_samples=20).attribute(images, tokens)
    torch.testing.assert_close(result.text[0, 1:5], exact, rtol=0, atol=1e-6)
    assert exact.abs().min() > 1e-4
    assert not result.text[0, 0].any()
    assert not result.text[0, 5:].any()


def test_draws_come_close_where_coalitions_are_too_many(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder, ["a dog on a red mat there"])
    exact = shapley_values(7, token_game(encoder, images[0], tokens[0], list(range(1, 8))))
    # One sample less than there are coalitions, so they are drawn; what is left is noise, which averages out.
    drawn = torch.stack(
        [
            KernelSHAP(encoder, image_samples=20, text_samples=127, seed=seed).attribute(images, tokens).text[0, 1:8]
            for seed in range(12)
        ]
    )
    assert (drawn - exact).norm(dim=1).max() < 0.3 * exact.norm()
    assert (drawn - exact).norm(dim=1).min() > 1e-3 * exact.norm()
    assert (drawn.mean(dim=0) - exact).norm() < 0.1 * exact.norm()


def test_two_players_share_and_one_gets_everything(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder, ["two cats", "cats"])
    result = KernelSHAP(encoder, image_samples=20, text_samples=10).attribute(images, tokens)
    both = shapley_values(2, token_game(encoder, images[0], tokens[0], [1, 2]))
    torch.testing.assert_close(result.text[0, 1:3], both, rtol=0, atol=1e-6)
    alone = shapley_values(1, token_game(encoder, images[1], tokens[1], [1]))
    torch.testing.assert_close(result.text[1, 1:2], alone, rtol=1e-9, atol=1e-12)
    assert alone.abs() > 1e-3
    assert not result.text[1, 2:].any()


def test_captions_without_content_have_no_values(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder, ["cats"])
    tokens[0, 1], tokens[0, 2] = tokens[0, 2].clone(), 0
    with pytest.warns(UserWarning, match="text map .* is constant"):
        result = KernelSHAP(encoder, image_samples=20).attribute(images, tokens)
    assert not result.text.any()


def test_a_linear_score_is_explained_exactly_by_few_samples() -> None:
    encoder = LinearEncoder()
    images, tokens = random_pairs(encoder)
    result = KernelSHAP(encoder, image_samples=40, text_samples=60).attribute(images, tokens)
    pixels, words = encoder.image_terms(images), encoder.text_terms(tokens)
    s, t = pixels.sum(dim=(1, 2, 3)), words.sum(dim=1)
    expected = t[:, None, None] * avg_pool2d(pixels.sum(dim=1), 4) * 16
    torch.testing.assert_close(result.image, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.text, s[:, None] * words, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.similarity, s * t)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_values_sum_to_what_everything_adds_to_nothing(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    result = KernelSHAP(encoder, image_samples=200, text_samples=30).attribute(images, tokens)
    with torch.no_grad():
        image, text = encoder.encode_image(images), encoder.encode_text(tokens)
        nothing = torch.where(encoder.tokenizer.content_mask(tokens), 0, tokens)
        shown = result.similarity - cosine_similarity(encoder.encode_image(torch.zeros_like(images)), text)
        said = result.similarity - cosine_similarity(image, encoder.encode_text(nothing))
    torch.testing.assert_close(result.image.sum(dim=(1, 2)), shown, rtol=0, atol=5e-8)
    torch.testing.assert_close(result.text.sum(dim=1), said, rtol=0, atol=5e-8)
    errors = torch.stack([result.image.sum(dim=(1, 2)) - shown, result.text.sum(dim=1) - said], dim=1)
    worse = errors.gather(1, errors.abs().argmax(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(result.completeness_error, worse, rtol=0, atol=1e-12)


def test_the_seed_decides_what_is_drawn_and_the_global_state_neither_matters_nor_changes(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    torch.manual_seed(1)
    first = KernelSHAP(encoder, image_samples=40, seed=3).attribute(images, tokens)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = KernelSHAP(encoder, image_samples=40, seed=3).attribute(images, tokens)
    other = KernelSHAP(encoder, image_samples=40, seed=4).attribute(images, tokens)
    torch.testing.assert_close(first.image, second.image, rtol=0, atol=0)
    torch.testing.assert_close(first.text, second.text, rtol=0, atol=0)
    assert (first.image - other.image).abs().max() > 1e-6
    assert torch.equal(torch.get_rng_state(), state)

    def break_off(explainer: object, *arguments: object, **options: object) -> Tensor:
        torch.rand(3)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(captum.attr.KernelShap, "attribute", break_off)
    with pytest.raises(RuntimeError, match="on purpose"):
        KernelSHAP(encoder).attribute(images, tokens)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_masked_inputs_than_asked_for_pass_through_a_tower(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    shown, said = (batch_sizes(encoder, name, monkeypatch) for name in ("encode_image", "encode_text"))
    KernelSHAP(encoder, image_samples=50, text_samples=30, internal_batch_size=8).attribute(images, tokens)
    # The second caption has two tokens, so four coalitions.
    for sizes, samples in ((shown, 3 * 50 + 1), (said, 30 + 4 + 30 + 3)):
        assert max(sizes) == 8
        # Other than the samples only the pairs themselves, the empty image and the empty captions.
        assert sum(sizes) == samples + 3


def test_options_that_cannot_work_are_errors_in_words(make_encoder: MakeEncoder) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image_samples": 16}, "image_samples has to be at least 17 for 16 patches.*got 16"),
        ({"text_samples": 10}, "text_samples has to be at least 11 for 10 tokens of a caption.*got 10"),
        ({"image_reference": "grey"}, "'zeros' or 'black'; got 'grey'"),
    ]
    for options, message in cases:
        encoder = make_encoder("vit")
        with pytest.raises(ValueError, match=message):
            KernelSHAP(encoder, **options).attribute(*random_pairs(encoder))
