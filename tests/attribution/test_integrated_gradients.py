from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from equation_10 import block_input, replacing
from inputs import batch_sizes, random_pairs
from linear_encoder import LinearEncoder
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from lightning_xai.attribution import IntegratedGradients
from lightning_xai.attribution.integrated_gradients import IntegrationRule
from lightning_xai.models import DualEncoder

MakeEncoder = Callable[..., DualEncoder]
STEPS = 4
ALPHAS = {
    "riemann_left": [0, 0.25, 0.5, 0.75],
    "riemann_right": [0.25, 0.5, 0.75, 1],
    "riemann_middle": [0.125, 0.375, 0.625, 0.875],
}


def literal(score: Callable[[Tensor], Tensor], point: Tensor, reference: Tensor, alphas: list[float]) -> Tensor:
    """The mean gradient on the path times the change, of a score [1, ...] -> [1]."""
    total = torch.zeros_like(point)
    for alpha in alphas:
        place = (reference + alpha * (point - reference)).requires_grad_()
        total += torch.autograd.grad(score(place).sum(), place)[0]
    return (point - reference) * total / len(alphas)


def text_sides(encoder: DualEncoder, tokens: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Embeddings as a function of what enters the first text block, at the caption, and at a caption of padding."""
    model: Any = encoder.model
    block = model.transformer.resblocks[0]
    padding = torch.zeros_like(tokens)
    padding[:, 0], padding[:, 2] = 49406, 49407
    points = [block_input(block, lambda ids=ids: model.encode_text(ids)) for ids in (tokens, padding)]  # type: ignore[misc]
    return (lambda hidden: replacing(block, hidden, lambda: model.encode_text(tokens))), points[0], points[1]


@pytest.mark.parametrize("rule", sorted(ALPHAS))
@pytest.mark.parametrize("reference", ["zeros", "black"])
def test_images_agree_with_a_literal_riemann_sum(make_encoder: MakeEncoder, rule: Any, reference: Any) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    method = IntegratedGradients(encoder, steps=STEPS, rule=rule, image_reference=reference)
    result = method.attribute(images, tokens)
    start = encoder.black_image().double() if reference == "black" else torch.zeros(3, 32, 32).double()
    for row in range(len(images)):
        text = encoder.encode_text(tokens[row, None]).detach()
        pixels = literal(
            lambda points, text=text: cosine_similarity(encoder.encode_image(points), text),  # type: ignore[misc]
            images[row, None],
            start[None],
            ALPHAS[rule],
        )
        expected = avg_pool2d(pixels.sum(dim=1), 8)[0] * 64
        torch.testing.assert_close(result.image[row], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", sorted(ALPHAS))
def test_text_agrees_with_a_literal_riemann_sum(make_encoder: MakeEncoder, rule: Any) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = IntegratedGradients(encoder, steps=STEPS, rule=rule).attribute(images, tokens)
    for row in range(len(images)):
        image = encoder.encode_image(images[row, None]).detach()
        embed, point, start = text_sides(encoder, tokens[row, None])
        values = literal(
            lambda hidden, embed=embed, image=image: cosine_similarity(embed(hidden), image),  # type: ignore[misc]
            point,
            start,
            ALPHAS[rule],
        )
        torch.testing.assert_close(result.text[row], values.sum(dim=2)[0], rtol=1e-6, atol=1e-9)
        assert result.text[row].abs().max() > 1e-4


@pytest.mark.parametrize("reference", ["zeros", "black"])
def test_both_maps_are_complete_and_the_completeness_error_is_that_of_the_worse(
    make_encoder: MakeEncoder, reference: Any
) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    start = encoder.black_image().double()[None] if reference == "black" else torch.zeros_like(images[:1])
    embed, _, padding = text_sides(encoder, tokens)
    with torch.no_grad():
        without_image = cosine_similarity(encoder.encode_image(start), encoder.encode_text(tokens))
        without_text = cosine_similarity(embed(padding), encoder.encode_image(images))

    def errors(steps: int, rule: Any) -> Tensor:
        method = IntegratedGradients(encoder, steps=steps, rule=rule, image_reference=reference)
        result = method.attribute(images, tokens)
        image = result.image.sum(dim=(1, 2)) - (result.similarity - without_image)
        text = result.text.sum(dim=1) - (result.similarity - without_text)
        both = torch.stack([image, text], dim=1)
        worse = both.gather(1, both.abs().argmax(dim=1, keepdim=True))[:, 0]
        torch.testing.assert_close(result.completeness_error, worse, rtol=1e-5, atol=1e-9)
        return both.abs()

    assert errors(60, "gausslegendre").max() < 1e-6
    # Each rule converges, the trapezoid (whose weights are wrong in Captum 0.9) too.
    for rule in get_args(IntegrationRule):
        assert errors(400, rule).max() < (1e-4 if rule in ("riemann_middle", "riemann_trapezoid") else 1e-2)
    assert errors(2, "riemann_right").amax(dim=1).min() > 1e-4


def test_patches_that_divide_no_image_lose_no_pixel() -> None:
    encoder = LinearEncoder(size=(9, 10), grid=(2, 3))
    images, tokens = random_pairs(encoder)
    result = IntegratedGradients(encoder, steps=1).attribute(images, tokens)
    # Neither a picture of zeros nor a caption of padding has any similarity.
    torch.testing.assert_close(result.image.sum(dim=(1, 2)), result.similarity, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(result.text.sum(dim=1), result.similarity, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("rule", "steps"), [(rule, 2) for rule in get_args(IntegrationRule)] + [("gausslegendre", 1)])
def test_a_linear_score_is_explained_exactly_by_every_rule(rule: IntegrationRule, steps: int) -> None:
    encoder = LinearEncoder()
    images, tokens = random_pairs(encoder)
    result = IntegratedGradients(encoder, steps=steps, rule=rule).attribute(images, tokens)
    pixels, words = encoder.image_terms(images), encoder.text_terms(tokens)
    s, t = pixels.sum(dim=(1, 2, 3)), words.sum(dim=1)
    expected = t[:, None, None] * avg_pool2d(pixels.sum(dim=1), 4) * 16
    torch.testing.assert_close(result.image, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(result.text, s[:, None] * words, rtol=1e-6, atol=1e-12)


def test_no_more_points_than_asked_for_pass_through_a_tower(
    make_encoder: MakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    sizes = batch_sizes(encoder, "encode_image", monkeypatch)
    IntegratedGradients(encoder, steps=5, internal_batch_size=2).attribute(images, tokens)
    assert max(sizes) == 2


def test_options_that_do_not_exist_are_errors_at_once(make_encoder: MakeEncoder) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rule": "simpson"}, "unknown quadrature rule 'simpson'; known: gausslegendre, riemann_left"),
        ({"steps": 0}, "at least 1 integration step.*steps=0"),
        ({"steps": 1, "rule": "riemann_trapezoid"}, "at least 2 integration step.*steps=1"),
        ({"image_reference": "grey"}, "'zeros' or 'black'; got 'grey'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            IntegratedGradients(make_encoder("vit"), **options)
