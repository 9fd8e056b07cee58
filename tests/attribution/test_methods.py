"""What holds for every attribution method, whatever it computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT, encoder_from
from inputs import random_pairs
from torch import Tensor

from lightning_xai.attribution import (
    METHODS,
    Attribution,
    AttributionMethod,
    ConstantMapWarning,
    FeaturePairAttribution,
    min_max,
    upsample,
)
from lightning_xai.models import DualEncoder, UnsupportedTowerError

MakeEncoder = Callable[..., DualEncoder]
# Few samples: these tests ask for sameness, not for precision.
OPTIONS: dict[str, dict[str, Any]] = {
    "m2ib": {"steps": 3, "samples": 2},
    "integrated_gradients": {"steps": 5},
    "kernel_shap": {"image_samples": 24, "text_samples": 12},
    "nib": {"steps": 5},
    "rise": {"image_masks": 12, "text_masks": 8},
    "banzhaf_pairs": {"image_samples": 128, "text_samples": 40},
}

every_method = pytest.mark.parametrize("name", METHODS)


def build(name: str, encoder: DualEncoder, **options: Any) -> AttributionMethod:
    method: Any = METHODS[name]
    made: AttributionMethod = method(encoder, **{**OPTIONS.get(name, {}), **options})
    return made


def assert_same(actual: Attribution, expected: Attribution) -> None:
    for part in ("image", "text", "similarity", "interactions", "prefix", "completeness_error"):
        one, other = getattr(actual, part), getattr(expected, part)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def rows(result: Attribution, index: Any) -> Attribution:
    parts: dict[str, Any] = {key: None if value is None else value[index] for key, value in vars(result).items()}
    return type(result)(**parts)


@every_method
@pytest.mark.filterwarnings("ignore::lightning_xai.attribution.ConstantMapWarning")
def test_maps_have_the_patch_grid_and_the_captions_tokens_and_are_finite(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = build(name, encoder).attribute(images, tokens)
    assert result.image.shape == (3, 4, 4)
    assert result.text.shape == (3, 16)
    embeddings = encoder.model.encode_image(images, normalize=True), encoder.model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(result.similarity, (embeddings[0] * embeddings[1]).sum(dim=1))
    for part in (result.image, result.text, result.similarity):
        assert part.isfinite().all()
        assert not part.requires_grad
    if result.interactions is not None:
        assert result.interactions.shape == (3, 16, 4, 4)
    for row, last in enumerate(tokens.argmax(dim=1).tolist()):
        assert not result.text[row, last + 1 :].any(), "padding after the end contributes nothing"
    # GradCAM may find nothing positive in one image or caption (and then warns), but not in all.
    assert result.image.any()
    assert result.text.any()


@every_method
def test_order_neighbours_and_chunks_change_nothing(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    whole = build(name, encoder).attribute(images, tokens)
    order = torch.tensor([2, 0, 1])
    assert_same(build(name, encoder).attribute(images[order], tokens[order]), rows(whole, order))
    assert_same(build(name, encoder).attribute(images[1:2], tokens[1:2]), rows(whole, slice(1, 2)))
    for size in (1, 2, 7):
        assert_same(build(name, encoder, internal_batch_size=size).attribute(images, tokens), whole)


@every_method
def test_a_caption_cut_to_its_tokens_is_explained_as_among_padding(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    padded = build(name, encoder).attribute(images[1:2], tokens[1:2])
    cut = build(name, encoder).attribute(images[1:2], tokens[1:2, :6])
    torch.testing.assert_close(cut.image, padded.image, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cut.text, padded.text[:, :6], rtol=1e-6, atol=1e-9)
    if cut.interactions is not None and padded.interactions is not None:
        torch.testing.assert_close(cut.interactions, padded.interactions[:, :6], rtol=1e-6, atol=1e-9)


@every_method
def test_it_works_where_gradients_are_off(make_encoder: MakeEncoder, name: str) -> None:
    cases: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode]
    for mode in cases:
        encoder = make_encoder("vit", torch.float64)
        images, tokens = random_pairs(encoder)
        expected = build(name, encoder).attribute(images, tokens)
        with mode():
            assert_same(build(name, encoder).attribute(images.clone(), tokens.clone()), expected)


def state_of(encoder: DualEncoder) -> tuple[object, ...]:
    """The model's and the process's state that a method might leave changed, but for the weights' values."""
    return (
        {key: module.training for key, module in encoder.named_modules()},
        {key: (parameter.requires_grad, parameter.grad) for key, parameter in encoder.named_parameters()},
        [
            (dict(m._forward_pre_hooks), dict(m._forward_hooks), dict(m._backward_hooks), list(m._modules))
            for m in encoder.modules()
        ],
        [id(module) for module in encoder.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
    )


@every_method
def test_the_model_and_the_users_random_numbers_are_as_they_were_also_after_an_exception(
    make_encoder: MakeEncoder, name: str
) -> None:
    for architecture in ("vit", "resnet"):
        encoder = make_encoder(architecture).train()
        encoder.model.visual.eval()
        encoder.model.logit_scale.requires_grad_(False)
        images, tokens = random_pairs(encoder)
        weights = {key: value.clone() for key, value in encoder.state_dict().items()}
        before = state_of(encoder)
        try:
            method = build(name, encoder)
        except UnsupportedTowerError:
            assert state_of(encoder) == before
            continue
        method.attribute(images, tokens)
        assert state_of(encoder) == before
        with pytest.raises(IndexError):
            method.attribute(images, tokens + 10**6)  # in the middle of a pass: no such token
        assert state_of(encoder) == before
        for key, value in encoder.state_dict().items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=0)


@every_method
def test_images_of_another_size_are_refused(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    with pytest.raises(ValueError, match=r"takes images \[3, 32, 32\].*got \[3, 40, 32\].*image_size"):
        build(name, encoder).attribute(images.new_zeros(len(images), 3, 40, 32), tokens)


@every_method
@pytest.mark.filterwarnings("ignore::lightning_xai.attribution.ConstantMapWarning")
def test_every_open_clip_tower_is_explained_or_refused_with_advice(make_encoder: MakeEncoder, name: str) -> None:
    for architecture in ("resnet", "vit_average_pool", "vit_layer_scale_quick_gelu"):
        encoder = make_encoder(architecture)
        images, tokens = random_pairs(encoder)
        try:
            method = build(name, encoder)
        except UnsupportedTowerError as error:
            refusals = {
                "attention_relevance": ["resnet"],
                "clip_surgery": ["resnet"],
                "grad_eclip": ["vit_average_pool"],
            }
            assert architecture in refusals[name]
            assert "use a method that needs no attention" in str(error)  # noqa: PT017
            continue
        result = method.attribute(images, tokens)
        # On four patches a centred Gaussian is the same everywhere.
        assert result.image.flatten(1).std(dim=1).max() > 0 or name == "gaussian"


@every_method
def test_weights_that_are_not_finite_are_an_error_in_words(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    method = build(name, encoder)
    with torch.no_grad():
        encoder.model.visual.proj[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite.*weights"):
        method.attribute(images, tokens)


@every_method
def test_wrong_shapes_and_sizes_are_errors_in_words(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    with pytest.raises(ValueError, match="one caption an image"):
        build(name, encoder).attribute(images, tokens[:2])
    with pytest.raises(ValueError, match="at least one image"):
        build(name, encoder).attribute(images[:0], tokens[:0])
    with pytest.raises(ValueError, match="internal_batch_size has to be at least 1"):
        build(name, encoder, internal_batch_size=0)


@every_method
def test_half_precision_changes_digits_and_chunks_change_nothing_more(make_encoder: MakeEncoder, name: str) -> None:
    encoder = make_encoder("vit", torch.bfloat16)
    images, tokens = random_pairs(encoder)
    options = {"rise": {"image_masks": 512, "text_masks": 128}, "kernel_shap": {"image_samples": 512}}.get(name, {})
    half = [build(name, encoder, internal_batch_size=size, **options).attribute(images, tokens) for size in (2, 64)]
    full = build(name, encoder.float(), **options).attribute(images.float(), tokens)
    for result in half:
        for row in range(len(images)):
            maps = torch.stack([result.image[row].flatten().float(), full.image[row].flatten()])
            if maps.std(dim=1).min() > 0:  # GradCAM may find nothing positive
                assert torch.corrcoef(maps)[0, 1] > 0.9


@every_method
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, name: str) -> None:
    vision = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
    config = {"embed_dim": 96, "vision_cfg": vision, "text_cfg": TEXT | {"embed_cls": True}, "custom_text": True}
    encoder = encoder_from(config, tmp_path)
    images, tokens = random_pairs(encoder)
    options = {"kernel_shap": {"image_samples": 128}}.get(name, {})
    plain = build(name, encoder, **options).attribute(images, tokens)
    encoder.model.set_grad_checkpointing(True)
    assert_same(build(name, encoder, **options).attribute(images, tokens), plain)
    assert encoder.model.visual.trunk.grad_checkpointing
    assert encoder.model.text.transformer.grad_checkpointing


def test_no_more_pairs_than_asked_for_pass_through_a_tower_at_a_time(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    sizes: list[int] = []
    encoder.model.visual.conv1.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    method = FeaturePairAttribution(encoder, internal_batch_size=1)
    span = torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 1] = True
    method.attribute(images, tokens)
    method.span_map(images, tokens, span)
    assert set(sizes) == {1}


def test_within_a_modality_and_for_spans_weights_that_are_not_finite_are_an_error(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    method = FeaturePairAttribution(encoder)
    with torch.no_grad():
        encoder.model.visual.proj[0, 0] = float("nan")
        encoder.model.text_projection[0, 0] = float("nan")
    span = torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 1] = True
    for run in (
        lambda: method.attribute_images(images, images),
        lambda: method.attribute_texts(tokens, tokens),
        lambda: method.span_map(images, tokens, span),
    ):
        with pytest.raises(ValueError, match=r"pair\(s\) \[0, 1, 2\] is not finite"):
            run()


def test_a_text_map_that_is_the_same_for_all_of_a_captions_words_is_constant(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)

    class Counting(AttributionMethod):
        def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
            own = self.encoder.tokenizer.content_mask(tokens).float()
            own[0, 1] = 2
            similarity = self.encoder.own_similarity(images, tokens)
            return Attribution(image=torch.rand(len(images), 4, 4), text=own, similarity=similarity)

    with pytest.warns(ConstantMapWarning, match=r"the text map of pair\(s\) \[1, 2\] is constant"):
        Counting(encoder).attribute(images, tokens)


def test_a_constant_map_is_a_warning_that_names_method_and_pair(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)

    class Blind(AttributionMethod):
        def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
            image = torch.ones(len(images), 4, 4)
            image[0, 0, 0] = 2
            similarity = self.encoder.own_similarity(images, tokens)
            return Attribution(image=image, text=torch.rand(tokens.shape), similarity=similarity)

    with pytest.warns(ConstantMapWarning, match=r"Blind: the image map of pair\(s\) \[1, 2\] is constant"):
        Blind(encoder).attribute(images, tokens)


def test_upsampling_keeps_sign_extrema_and_a_linear_ramp() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    large = upsample(maps, (32, 40))
    assert large.shape == (2, 3, 32, 40)
    assert large.amax() <= maps.amax() + 1e-6
    assert large.amin() >= maps.amin() - 1e-6
    ramp = upsample(torch.arange(4.0).expand(3, 4), (3, 16))
    torch.testing.assert_close(ramp[1, 2:14].diff(), torch.full((11,), 0.25))


def test_min_max_spans_zero_to_one_and_leaves_a_constant_map_at_zero() -> None:
    maps = torch.stack([torch.arange(6.0).reshape(2, 3) - 2, torch.full((2, 3), 7.0)])
    scaled = min_max(maps)
    torch.testing.assert_close(scaled[0], torch.arange(6.0).reshape(2, 3) / 5)
    assert not scaled[1].any()
