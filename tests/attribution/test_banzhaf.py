from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from inputs import batch_sizes, random_pairs
from linear_encoder import LinearEncoder
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from lightning_xai.attribution import BanzhafInteractions
from lightning_xai.attribution.coalitions import Coalitions, embed_without_tokens, masked_images
from lightning_xai.models import DualEncoder, UnsupportedTowerError

MakeEncoder = Callable[..., DualEncoder]
PATCHES, WORDS = 4, 3
CAPTION = "two red cats"


def values_of(encoder: DualEncoder, image: Tensor, tokens: Tensor, shown: Tensor, said: Tensor) -> Tensor:
    """The similarity of an image of 2 x 2 patches and a caption of which coalitions [N, 4] and [M, 3] are left: [N, M].

    Patches are zeros and tokens padding, set one by one.
    """
    pictures, captions = image.repeat(len(shown), 1, 1, 1), tokens.repeat(len(said), 1)
    for row, patch in (~shown).nonzero().tolist():
        top, left = patch // 2 * 16, patch % 2 * 16
        pictures[row, :, top : top + 16, left : left + 16] = 0
    for row, word in (~said).nonzero().tolist():
        captions[row, 1 + word] = 0
    with torch.no_grad():
        return cosine_similarity(encoder.encode_image(pictures)[:, None], encoder.encode_text(captions)[None], dim=2)


def all_values(encoder: DualEncoder, image: Tensor, tokens: Tensor) -> dict[tuple[bool, ...], float]:
    """The value of every coalition of the four patches and, after them, the three words."""
    shown, said = (torch.tensor([*product((False, True), repeat=n)]) for n in (PATCHES, WORDS))
    values = values_of(encoder, image, tokens, shown, said)
    return {
        (*one, *other): float(values[i, j])
        for i, one in enumerate(shown.tolist())
        for j, other in enumerate(said.tolist())
    }


@pytest.fixture
def pair(make_encoder: MakeEncoder) -> tuple[DualEncoder, Tensor, Tensor]:
    encoder = make_encoder("vit_custom_block", torch.float64)
    images, tokens = random_pairs(encoder, [CAPTION])
    return encoder, 2 * images, tokens


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7])
def test_interactions_of_all_coalitions_are_expected_second_differences(
    pair: tuple[DualEncoder, Tensor, Tensor], p: float
) -> None:
    encoder, images, tokens = pair
    values = all_values(encoder, images[0], tokens[0])
    expected = torch.zeros(WORDS, PATCHES, dtype=torch.float64)
    for word, patch in product(range(WORDS), range(PATCHES)):
        players = (patch, PATCHES + word)
        for others in product((False, True), repeat=PATCHES + WORDS - 2):
            probability = float(np.prod([p if present else 1 - p for present in others]))
            for both in product((False, True), repeat=2):
                coalition = list(others)
                for player, present in zip(players, both, strict=True):
                    coalition.insert(player, present)
                expected[word, patch] += probability * (1 if both[0] == both[1] else -1) * values[tuple(coalition)]
    result = BanzhafInteractions(encoder, p=p, image_samples=16, text_samples=8).attribute(images, tokens)
    assert result.interactions is not None
    torch.testing.assert_close(result.interactions[0, 1:4].flatten(1), expected, rtol=0, atol=1e-12)
    assert expected.abs().min() > 1e-5
    assert not result.interactions[0, 0].any(), "start and end are no players"
    assert not result.interactions[0, 4:].any()


def test_interactions_are_those_of_shapiq(pair: tuple[DualEncoder, Tensor, Tensor]) -> None:
    exact = pytest.importorskip("shapiq.game_theory.exact", reason="needs shapiq, which is no extra of this package")
    encoder, images, tokens = pair
    values = all_values(encoder, images[0], tokens[0])
    computer = exact.ExactComputer(lambda rows: np.array([values[tuple(row)] for row in rows.astype(bool).tolist()]), 7)
    theirs = computer("BII", order=2)
    result = BanzhafInteractions(encoder).attribute(images, tokens)
    assert result.interactions is not None
    for word, patch in product(range(WORDS), range(PATCHES)):
        own = float(result.interactions[0, 1 + word].flatten()[patch])
        assert own == pytest.approx(theirs[(patch, PATCHES + word)], abs=1e-10)


@pytest.mark.parametrize(("image_samples", "text_samples"), [(16, 8), (13, 8), (14, 7)])
@pytest.mark.parametrize("p", [0.4, 0.5])
def test_all_terms_are_those_of_a_dense_regression_over_pairs_of_coalitions(
    pair: tuple[DualEncoder, Tensor, Tensor], p: float, image_samples: int, text_samples: int
) -> None:
    encoder, images, tokens = pair
    shown, said = Coalitions.draw(PATCHES, image_samples, p, seed=5), Coalitions.draw(WORDS, text_samples, p, seed=5)
    values = values_of(encoder, images[0], tokens[0], shown.present, said.present)
    rows, targets = [], []
    for i, j in product(range(len(shown.present)), range(len(said.present))):
        image, text = ([1.0, *side.present[k].double().tolist()] for side, k in ((shown, i), (said, j)))
        weight = float(shown.weights[i] * said.weights[j]) ** 0.5
        rows.append([weight * a * b for a in text for b in image])
        targets.append(weight * float(values[i, j]))
    design, wanted = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    fit = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution
    expected = fit.reshape(1 + WORDS, 1 + PATCHES)
    method = BanzhafInteractions(encoder, p=p, image_samples=image_samples, text_samples=text_samples, seed=5)
    result: Any = method.attribute(images, tokens)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(result.interactions[0, 1:4].flatten(1), expected[1:, 1:], **close)
    torch.testing.assert_close(result.patches[0].flatten(), expected[0, 1:], **close)
    torch.testing.assert_close(result.tokens[0, 1:4], expected[1:, 0], **close)
    torch.testing.assert_close(result.constant[0], expected[0, 0], **close)


def test_draws_come_close_where_coalitions_are_too_many(pair: tuple[DualEncoder, Tensor, Tensor]) -> None:
    encoder, images, tokens = pair
    exact = BanzhafInteractions(encoder).attribute(images, tokens).interactions
    drawn = [BanzhafInteractions(encoder, image_samples=15, seed=seed).attribute(images, tokens) for seed in range(12)]
    maps = torch.stack([result.interactions for result in drawn])
    assert (maps[0] - maps[1]).norm() > 1e-3 * exact.norm()
    assert (maps.mean(dim=0) - exact).norm() < 0.4 * exact.norm()


def test_a_bilinear_similarity_is_explained_exactly_by_few_samples() -> None:
    encoder = LinearEncoder()
    images, tokens = random_pairs(encoder)
    result = BanzhafInteractions(encoder, image_samples=20, text_samples=40).attribute(images, tokens)
    patches = avg_pool2d(encoder.image_terms(images).sum(dim=1), 4) * 16
    expected = encoder.text_terms(tokens)[:, :, None, None] * patches[:, None]
    torch.testing.assert_close(result.interactions, expected, rtol=0, atol=1e-12)
    for lower in ("patches", "tokens", "constant"):
        assert getattr(result, lower).abs().max() < 1e-12


def test_an_image_is_regressed_once_for_all_its_captions(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    method = BanzhafInteractions(encoder, image_samples=60, text_samples=40, internal_batch_size=16)
    captions = torch.tensor([0, 1, 2])
    sizes = batch_sizes(encoder, "encode_image", monkeypatch)
    states = method.hidden_states(images[:1], tokens)
    assert sum(sizes) == 61
    assert max(sizes) == 16
    span = encoder.tokenizer.content_mask(tokens)
    shared = method.span_maps_of(states, torch.zeros(3, dtype=torch.int64), captions, span, method.references())
    alone = method.span_map(images[:1].expand(3, -1, -1, -1), tokens, span)
    torch.testing.assert_close(shared, alone)
    whole = method.attribute(images[:1].expand(3, -1, -1, -1), tokens)
    torch.testing.assert_close(shared, whole.image)
    assert method.span_maps_of(states, captions[:0], captions[:0], span[:0], method.references()).shape == (0, 4, 4)


# --- what stands for the absent ---


def test_removed_tokens_are_masked_in_the_attention_and_the_others_keep_their_positions(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("vit", torch.float64)
    model: Any = encoder.model
    tokens = encoder.tokenizer.encode(["a dog on a red mat"])[0]
    present = torch.ones(2, len(tokens), dtype=torch.bool)
    present[0, [2, 5]] = False
    expected = []
    for keep in present:
        mask = model.attn_mask.clone()
        mask[:, ~keep] = -torch.inf
        mask.fill_diagonal_(0)
        hidden = model.transformer(model.token_embedding(tokens)[None] + model.positional_embedding, attn_mask=mask)
        expected.append(model.ln_final(hidden[0, tokens.argmax()]) @ model.text_projection)
    with torch.no_grad():
        torch.testing.assert_close(embed_without_tokens(encoder, tokens, present, "removed"), torch.stack(expected))
        padded = embed_without_tokens(encoder, tokens, present, "padding")
    assert (padded[0] - expected[0]).norm() > 0.01 * expected[0].norm()
    torch.testing.assert_close(padded[1], expected[1])


def test_towers_that_attend_to_padding_cannot_have_tokens_removed(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit_average_pool", torch.float64)
    images, tokens = random_pairs(encoder)
    method = BanzhafInteractions(encoder, masking=("zeros", "removed"))
    with pytest.raises(UnsupportedTowerError, match="mask them by 'padding'"):
        method.attribute(images, tokens)


def test_absent_patches_show_the_mean_colour_or_a_blur(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit_custom_block", torch.float64)
    image = torch.randn(3, 32, 32, dtype=torch.float64) + 3
    present = torch.tensor([[[True, False], [True, True]]])
    for masking in ("zeros", "mean", "blur"):
        masked = masked_images(encoder, image, present, masking)[0]
        assert torch.equal(masked[:, :, :16], image[:, :, :16])
        assert torch.equal(masked[:, 16:], image[:, 16:])
        absent = masked[:, :16, 16:]
        average = 0 if masking == "zeros" else 3
        assert float(absent.mean()) == pytest.approx(average, abs=0.2)
        assert float(absent.std()) < 0.15


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, "between 0 and 1; got 0.0"),
        ({"p": 1.0}, "between 0 and 1; got 1.0"),
        ({"image_samples": 16}, "17 unknowns of 16 patches: raise image_samples to at least 17"),
        ({"p": 0.001, "image_samples": 20}, "leave some unknowns open"),
        ({"masking": ("black", "padding")}, "zeros, mean, blur there; got 'black'"),
        ({"masking": ("mean", "zeros")}, "padding, removed there; got 'zeros'"),
    ],
)
def test_what_cannot_be_determined_is_refused(make_encoder: MakeEncoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BanzhafInteractions(make_encoder("vit"), **options)


def test_captions_with_more_tokens_than_samples_are_refused_with_the_number_that_is_needed(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("vit")
    with pytest.raises(ValueError, match="7 unknowns of 6 tokens: raise text_samples to at least 7"):
        BanzhafInteractions(encoder, text_samples=6).attribute(*random_pairs(encoder, ["a dog on a red mat"]))


def test_a_regression_that_is_not_finite_is_refused(make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder, [CAPTION])
    method, encode = BanzhafInteractions(encoder, image_samples=32, text_samples=8), encoder.encode_image
    hidden = torch.tensor(torch.nan)
    monkeypatch.setattr(
        encoder, "encode_image", lambda shown: encode(shown) + hidden.where((shown == 0).any(), torch.tensor(0.0))
    )
    with pytest.raises(ValueError, match=r"BanzhafInteractions: the regression of pair\(s\) \[0\] is not finite"):
        method.attribute(images, tokens)
    with pytest.raises(ValueError, match=r"the span map of pair\(s\) \[0\] is not finite"):
        method.span_map(images, tokens, encoder.tokenizer.content_mask(tokens))


def test_a_caption_of_one_token_is_explained(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit_custom_block", torch.float64)
    images, tokens = random_pairs(encoder, ["cats"])
    shown, said = torch.tensor([*product((False, True), repeat=PATCHES)]), torch.tensor([[False], [True]])
    change = values_of(encoder, images[0], tokens[0], shown, said).diff(dim=1)[:, 0]
    first_present = shown[:, 0]
    result = BanzhafInteractions(encoder).attribute(images, tokens)
    assert float(result.interactions[0, 1, 0, 0]) == pytest.approx(
        float(change[first_present].mean() - change[~first_present].mean()), abs=1e-12
    )
