"""Targets: contrasts and probabilities by every method, against differences of similarities, autograd and sums."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
import torch
from inputs import CAPTIONS, batch_sizes, random_pairs
from linear_encoder import LinearEncoder
from torch import Tensor
from torch.nn.functional import cosine_similarity

import lightning_xai.attribution.path_integral
from lightning_xai.attribution import (
    METHODS,
    TARGETS,
    Attribution,
    AttributionMethod,
    Contrast,
    FeaturePairAttribution,
    IntegratedGradients,
    InteractionAttribution,
    KernelSHAP,
    Probability,
    Saliency,
    Similarity,
    Target,
    UnsupportedTargetError,
)
from lightning_xai.models import DualEncoder
from lightning_xai.registry import PluginError, Registry

MakeEncoder = Callable[..., DualEncoder]
OTHERS = ("a red mat on a dog", "three cats", "a short one")
MORE = ("a dog under a red mat", "two dogs", "two cats")
LINEAR = (
    "feature_pair", "similarity_grad_cam", "banzhaf_pairs", "nib", "integrated_gradients", "kernel_shap", "rise",
    "mask_clip", "clip_surgery",
)  # fmt: skip
# Few samples: these tests ask for sameness, not for precision.
OPTIONS: dict[str, dict[str, Any]] = {
    "m2ib": {"steps": 3, "samples": 2},
    "integrated_gradients": {"steps": 5},
    "kernel_shap": {"image_samples": 24, "text_samples": 12},
    "nib": {"steps": 5},
    "rise": {"image_masks": 12, "text_masks": 8},
    "banzhaf_pairs": {"image_samples": 64, "text_samples": 40},
}
SERVING = [name for name, method in METHODS.items() if method.serves(Contrast)]
pytestmark = pytest.mark.filterwarnings("ignore::lightning_xai.attribution.ConstantMapWarning")


def build(name: str, encoder: DualEncoder, **options: Any) -> AttributionMethod:
    method: Any = METHODS[name]
    made: AttributionMethod = method(encoder, **{**OPTIONS.get(name, {}), **options})
    return made


def each(*columns: tuple[str, ...]) -> list[list[str]]:
    """The other captions of each pair."""
    return [list(captions) for captions in zip(*columns, strict=True)]


def others_of(result: Attribution) -> Any:
    assert result.others is not None
    return result.others


@pytest.fixture
def encoder(make_encoder: MakeEncoder) -> DualEncoder:
    return make_encoder("vit", torch.float64)


# --- contrast ---


@pytest.mark.parametrize("name", LINEAR)
def test_the_image_map_of_a_contrast_is_the_difference_of_similarity_maps(encoder: DualEncoder, name: str) -> None:
    images, tokens = random_pairs(encoder)
    method = build(name, encoder)
    own = method.attribute(images, tokens)
    first, second = (method.attribute(images, encoder.tokenizer.encode(list(given))) for given in (OTHERS, MORE))
    result = method.attribute(images, tokens, Contrast(each(OTHERS, MORE)))
    torch.testing.assert_close(result.image, own.image - (first.image + second.image) / 2, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.similarity, own.similarity)
    assert result.explained is not None
    torch.testing.assert_close(result.explained, own.similarity - (first.similarity + second.similarity) / 2)
    others = others_of(result)
    torch.testing.assert_close(others.similarity, torch.stack([first.similarity, second.similarity], dim=1))
    if method.has_zero:  # elsewhere a common term is added
        torch.testing.assert_close(result.text, own.text, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(others.text, -torch.stack([first.text, second.text], 1) / 2, rtol=1e-6, atol=1e-8)
    if isinstance(own, InteractionAttribution) and isinstance(second, InteractionAttribution):
        torch.testing.assert_close(result.interactions, own.interactions)
        torch.testing.assert_close(others.interactions[:, 1], -second.interactions / 2)
        torch.testing.assert_close(others.prefix[:, 1], -second.prefix / 2)


@pytest.mark.parametrize("name", SERVING)
def test_pairs_with_any_number_of_other_captions_are_explained_as_on_their_own(encoder: DualEncoder, name: str) -> None:
    images, tokens = random_pairs(encoder)
    given = [[OTHERS[0]], [OTHERS[1], MORE[1]], ["one bird", "two birds", "three birds"]]
    for kind in [kind for kind in (Contrast, Probability) if METHODS[name].serves(kind)]:
        whole = build(name, encoder).attribute(images, tokens, kind(given))
        order = torch.tensor([2, 0, 1])
        turned = build(name, encoder, internal_batch_size=2).attribute(
            images[order], tokens[order], kind([given[row] for row in order.tolist()])
        )
        for place, row in enumerate(order.tolist()):
            rows = slice(row, row + 1)
            alone = build(name, encoder).attribute(images[rows], tokens[rows], kind(given[row]))
            count = len(given[row])
            for result, at in ((whole, row), (turned, place)):
                close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}
                torch.testing.assert_close(result.image[at], alone.image[0], **close)
                torch.testing.assert_close(result.text[at], alone.text[0], **close)
                torch.testing.assert_close(others_of(result).text[at, :count], others_of(alone).text[0], **close)
                assert not others_of(result).text[at, count:].any()
                assert others_of(result).counted[at].tolist() == [i < count for i in range(3)]


@pytest.mark.parametrize("name", ["saliency", "grad_cam", "grad_eclip", "attention_relevance"])
def test_methods_without_sign_say_what_speaks_for_the_other_caption(encoder: DualEncoder, name: str) -> None:
    images, tokens = random_pairs(encoder)
    method = build(name, encoder)
    result = method.attribute(images, tokens, Contrast(each(OTHERS)))
    other = method.attribute(images, encoder.tokenizer.encode(list(OTHERS)))
    torch.testing.assert_close(others_of(result).text[:, 0], other.text)
    assert not torch.allclose(result.image, method.attribute(images, tokens).image)


def test_the_weights_of_a_softmax_contrast_are_those_of_the_pair(encoder: DualEncoder) -> None:
    images, tokens = random_pairs(encoder)
    result = IntegratedGradients(encoder, steps=2).attribute(images, tokens, Contrast(OTHERS, weight="softmax"))
    similarity = others_of(result).similarity
    weights = (encoder.logit_scale.exp() * similarity).softmax(dim=1).detach()
    assert result.explained is not None
    torch.testing.assert_close(result.explained, result.similarity - (weights * similarity).sum(dim=1))
    parts = [
        IntegratedGradients(encoder, steps=2).attribute(images, encoder.tokenizer.encode([caption] * 3)).image
        for caption in OTHERS
    ]
    own = IntegratedGradients(encoder, steps=2).attribute(images, tokens).image
    torch.testing.assert_close(result.image, own - torch.einsum("bm,mbhw->bhw", weights, torch.stack(parts)))


def test_on_a_linear_encoder_a_contrast_has_the_values_that_are_known() -> None:
    encoder = LinearEncoder()
    images, tokens = random_pairs(encoder)
    other = encoder.tokenizer.encode(list(OTHERS))
    difference = (encoder.text_terms(tokens).sum(dim=1) - encoder.text_terms(other).sum(dim=1))[:, None, None]
    pixels = encoder.image_terms(images).sum(dim=1)
    patches = pixels.reshape(3, 2, 4, 3, 4).sum(dim=(2, 4))
    s = pixels.sum(dim=(1, 2))
    for method in (IntegratedGradients(encoder), KernelSHAP(encoder, image_samples=64)):
        result = method.attribute(images, tokens, Contrast(each(OTHERS)))
        torch.testing.assert_close(result.image, difference * patches, rtol=1e-6, atol=1e-9)
        expected = -s[:, None] * encoder.text_terms(other)
        torch.testing.assert_close(others_of(result).text[:, 0], expected, rtol=1e-6, atol=1e-9)


def test_the_sum_of_a_contrast_is_complete(encoder: DualEncoder) -> None:
    images, tokens = random_pairs(encoder)
    contrast = Contrast(each(OTHERS))
    result = IntegratedGradients(encoder, steps=200).attribute(images, tokens, contrast)
    texts = [encoder.encode_text(each) for each in (tokens, encoder.tokenizer.encode(list(OTHERS)))]
    nothing = encoder.encode_image(torch.zeros_like(images))
    start = cosine_similarity(nothing, texts[0]) - cosine_similarity(nothing, texts[1])
    assert result.explained is not None
    torch.testing.assert_close(result.image.sum(dim=(1, 2)), result.explained - start.detach(), rtol=0, atol=1e-4)
    pairs = FeaturePairAttribution(encoder, steps=100, rule="midpoint")
    fine, apart = (
        pairs.attribute(images, tokens, contrast),
        [pairs.attribute(images, each) for each in (tokens, encoder.tokenizer.encode(list(OTHERS)))],
    )
    total = fine.image.sum(dim=(1, 2)) + fine.prefix.sum(dim=1) + others_of(fine).prefix.sum(dim=(1, 2))
    exact = [each.interactions.sum(dim=(1, 2, 3)) + each.prefix.sum(dim=1) - each.completeness_error for each in apart]
    torch.testing.assert_close(total - fine.completeness_error, exact[0] - exact[1])
    assert fine.completeness_error.abs().max() < 1e-3


def test_the_contrast_map_of_feature_pairs_costs_less_than_one_more_span_map(
    encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, tokens = random_pairs(encoder)
    method = FeaturePairAttribution(encoder)
    contrast = Contrast(each(OTHERS))
    expected = [method.attribute(images, tokens, target).image for target in (Similarity(), contrast)]
    counts = dict.fromkeys(("jvp_with_embedding", "integrated_vjp"), 0)
    for name in counts:
        plain = getattr(lightning_xai.attribution.path_integral, name)

        def counted(
            path: Any, points: Any, weights: Any, sides_BSX: Tensor, *more: Any, of: Any = (name, plain)
        ) -> Any:
            counts[of[0]] += sides_BSX.shape[1]
            return of[1](path, points, weights, sides_BSX, *more)

        monkeypatch.setattr(f"lightning_xai.attribution.feature_pair.{name}", counted)
    sizes = batch_sizes(encoder, "encode_image", monkeypatch)
    own = method.image_map(images, tokens)
    assert counts == {"jvp_with_embedding": 1, "integrated_vjp": 1}, "as a span map"
    both = method.image_map(images, tokens, contrast)
    assert counts == {"jvp_with_embedding": 1 + 2, "integrated_vjp": 1 + 1}
    assert sizes == []
    torch.testing.assert_close([own, both], expected)


@pytest.mark.parametrize("name", ["integrated_gradients", "kernel_shap", "rise", "saliency", "banzhaf_pairs"])
def test_a_contrast_runs_the_image_no_more_often_than_a_similarity(
    encoder: DualEncoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, tokens = random_pairs(encoder)
    sizes = batch_sizes(encoder, "encode_image", monkeypatch)
    counts = []
    for target in (Similarity(), Contrast(each(OTHERS, MORE))):
        sizes.clear()
        build(name, encoder).attribute(images, tokens, target)
        counts.append(sum(sizes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["banzhaf_pairs", "feature_pair"])
def test_terms_of_a_contrast_are_its_value_for_coalitions_with_the_others_whole(
    encoder: DualEncoder, name: str
) -> None:
    images, tokens = random_pairs(encoder)
    method = build(name, encoder)
    own, other = (method.attribute(images, each) for each in (tokens, encoder.tokenizer.encode(list(OTHERS))))
    generator = torch.Generator().manual_seed(0)
    shown = (torch.rand(3, 5, 4, 4, generator=generator) < 0.5).double()
    said = (torch.rand(3, 5, 16, generator=generator) < 0.5).double()
    result = method.attribute(images, tokens, Contrast(each(OTHERS))).of_coalitions(shown, said)
    expected = own.of_coalitions(shown, said) - other.of_coalitions(shown, torch.ones_like(said))
    torch.testing.assert_close(result, expected)


# --- probability ---


def test_a_probability_is_that_of_the_model_and_its_gradient_that_of_autograd(encoder: DualEncoder) -> None:
    images, tokens = random_pairs(encoder)
    result = Saliency(encoder).attribute(images, tokens, Probability(OTHERS))
    pixels = images.clone().requires_grad_()
    columns = [
        encoder.encode_text(tokens),
        *(encoder.encode_text(encoder.tokenizer.encode([caption] * 3)) for caption in OTHERS),
    ]
    cosines = torch.stack([cosine_similarity(encoder.encode_image(pixels), text) for text in columns], dim=1)
    probability = (encoder.logit_scale.exp() * cosines).softmax(dim=1)[:, 0]
    assert result.explained is not None
    torch.testing.assert_close(result.explained, probability.detach())
    (gradient,) = torch.autograd.grad(probability.sum(), pixels)
    expected = gradient.abs().amax(dim=1).reshape(3, 4, 8, 4, 8).mean(dim=(2, 4))
    torch.testing.assert_close(result.image, expected)


@pytest.mark.parametrize("name", ["saliency", "grad_cam", "grad_eclip", "attention_relevance"])
def test_the_gradient_of_a_probability_is_that_of_the_softmax_contrast_times_a_factor(
    encoder: DualEncoder, name: str
) -> None:
    images, tokens = random_pairs(encoder)
    method = build(name, encoder)
    probability = method.attribute(images, tokens, Probability(OTHERS))
    contrast = method.attribute(images, tokens, Contrast(OTHERS, weight="softmax"))
    p = probability.explained
    assert p is not None
    # Attention relevance takes contrasts as logits already.
    factor = p * (1 - p) * (1.0 if name == "attention_relevance" else encoder.logit_scale.exp().detach())
    torch.testing.assert_close(probability.image, factor[:, None, None] * contrast.image)
    torch.testing.assert_close(probability.text, factor[:, None] * contrast.text)
    torch.testing.assert_close(others_of(probability).text, factor[:, None, None] * others_of(contrast).text)


def test_a_probability_is_integrated_along_its_path(encoder: DualEncoder) -> None:
    images, tokens = random_pairs(encoder)
    result = IntegratedGradients(encoder, steps=200).attribute(images, tokens, Probability(OTHERS))
    assert result.completeness_error is not None
    assert result.completeness_error.abs().max() < 1e-4
    assert (others_of(result).text.sum(dim=2).abs() > 1e-6).any(), "tokens of other candidates count too"


def test_the_caption_among_its_candidates_counts_once(encoder: DualEncoder) -> None:
    images, tokens = random_pairs(encoder)
    method = build("integrated_gradients", encoder)
    result = method.attribute(images, tokens, Probability(CAPTIONS))
    for row in range(3):
        rest = [caption for caption in CAPTIONS if caption != CAPTIONS[row]]
        alone = method.attribute(images[row : row + 1], tokens[row : row + 1], Probability(rest))
        torch.testing.assert_close(result.image[row], alone.image[0])


# --- what is refused ---


def test_captions_of_no_use_are_errors_in_words(encoder: DualEncoder) -> None:
    images, tokens = random_pairs(encoder)
    method = build("saliency", encoder)
    with pytest.raises(ValueError, match=r"'Two  CATS' of pair 1 is the same as its own to the model, which reads 16"):
        method.attribute(images, tokens, Contrast(["Two  CATS"]))
    with pytest.raises(ValueError, match="only candidate of pair 1 is its own caption"):
        method.attribute(images, tokens, Probability(["two cats"]))
    with pytest.raises(ValueError, match="captions for 2 pairs; got 3 pairs"):
        method.attribute(images, tokens, Contrast([["one"], ["two"]]))
    for others, message in (
        ([], "needs at least one other caption"),
        ([["one"], []], "needs at least one other caption"),
        ("a dog", r"takes a list of captions; got the text 'a dog': give \['a dog'\]"),
        (["a dog", " "], "is empty"),
        ([3], "takes captions as texts; got 3"),
    ):
        wrong: Any = others
        with pytest.raises((ValueError, TypeError), match=message):
            Contrast(wrong)
    unknown: Any = "max"
    with pytest.raises(ValueError, match="weight is one of mean, softmax; got 'max'"):
        Contrast(["a dog"], weight=unknown)


def test_a_method_that_cannot_explain_a_target_names_those_that_can(encoder: DualEncoder) -> None:
    images, tokens = random_pairs(encoder)

    class OfSimilarity(AttributionMethod):
        def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
            return Saliency(self.encoder).attribute(images, tokens)

    for method in (build("rollout", encoder), OfSimilarity(encoder)):
        with pytest.raises(
            UnsupportedTargetError, match="does not explain the target Contrast: take a method that explains any, such"
        ):
            method.attribute(images, tokens, Contrast(OTHERS))
    for name in ("feature_pair", "similarity_grad_cam", "banzhaf_pairs"):
        with pytest.raises(UnsupportedTargetError, match=r"Probability: .*or Contrast\(others, weight=\"softmax\"\)"):
            build(name, encoder).attribute(images, tokens, Probability(OTHERS))
    with pytest.raises(UnsupportedTargetError, match="does not explain the target Probability"):
        FeaturePairAttribution(encoder).image_map(images, tokens, Probability(OTHERS))


# --- targets of other packages ---


class Largest(Target):
    """The lead over the nearest of the other captions."""

    def value(self, similarities: Tensor, pair: Any) -> Tensor:
        return similarities[..., 0] - similarities[..., 1:].masked_fill(~pair.counted[..., 1:], -torch.inf).amax(dim=-1)


def test_a_target_of_another_package_is_explained(encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("extra_targets")
    vars(module).update(entry=Largest, wrong=Saliency)
    monkeypatch.setitem(sys.modules, "extra_targets", module)
    group = "lightning_xai.targets"
    points = [EntryPoint(name, f"extra_targets:{name}", group) for name in ("entry", "wrong")]
    monkeypatch.setattr("lightning_xai.registry.entry_points", lambda group: points)
    registry: Registry[type[Target]] = Registry("target", TARGETS._builtin, group, TARGETS._check)
    with pytest.raises(PluginError, match=r"entry 'wrong' of lightning_xai.targets: a target is a subclass of"):
        registry["wrong"]
    made: Any = registry["entry"]
    images, tokens = random_pairs(encoder)
    result = build("integrated_gradients", encoder).attribute(images, tokens, made(OTHERS))
    others = others_of(result)
    assert result.explained is not None
    torch.testing.assert_close(result.explained, result.similarity - others.similarity.amax(dim=1))
