from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from torch import Tensor

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.attribution.pairwise import Captured, capture
from lightning_xai.models import DualEncoder
from lightning_xai.models.at_layer import differentiable

MakeEncoder = Callable[..., DualEncoder]
CAPTIONS = ["a dog", "one very long caption of eleven or more tokens here"]


def images_for(encoder: DualEncoder, seed: int = 0) -> Tensor:
    height, width = encoder.image_transform.size
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed)).double()


def hooks(encoder: DualEncoder) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in encoder.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_kept_is_features_before_at_every_layer(name: str, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = images_for(encoder), encoder.tokenizer.encode(CAPTIONS)
    text_layers = encoder.text_at_layer().layers
    for layer in encoder.image_at_layer().layers:
        image, text = encoder.image_at_layer(layer), encoder.text_at_layer(min(layer, text_layers[-1]))
        with capture(image, text) as captured:
            encoder.encode_image(images)
            encoder.encode_text(tokens)
        for tower, kept, inputs in ((image, captured.image, images), (text, captured.text, tokens)):
            hidden = Captured.only(kept, 2)
            assert hidden is not None
            assert not hidden.requires_grad
            torch.testing.assert_close(hidden, tower.features_before(inputs).detach(), rtol=1e-10, atol=1e-12)


def test_a_tower_with_tokens_first_is_captured_with_the_batch_first(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    model: Any = encoder.model
    if not hasattr(model.visual.transformer, "batch_first"):
        pytest.skip("open_clip 4 knows one order only")
    for transformer in (model.visual.transformer, model.transformer):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False
    images, tokens = images_for(encoder), encoder.tokenizer.encode(CAPTIONS)
    image, text = encoder.image_at_layer(1), encoder.text_at_layer(1)
    with capture(image, text) as captured:
        encoder.encode_image(images)
        encoder.encode_text(tokens)
    assert captured.image[0].shape == (2, 17, 32)
    torch.testing.assert_close(captured.image[0], image.features_before(images).detach())
    torch.testing.assert_close(captured.text[0], text.features_before(tokens).detach())


def test_only_one_pass_of_as_many_inputs_is_taken_for_that_of_the_batch(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    first, second, tokens = images_for(encoder, 1), images_for(encoder, 2), encoder.tokenizer.encode(CAPTIONS)
    method = FeaturePairAttribution(encoder)
    for passes in ([], [first, second], [first[:1]], [second]):
        with method.capturing() as captured:
            for images in passes:
                encoder.encode_image(images)
        assert (Captured.only(captured.image, 2) is None) == (len(passes) != 1 or len(passes[0]) != 2)
        states = method.hidden_states(second, tokens, captured)
        torch.testing.assert_close(states.image, encoder.image_at_layer().features_before(second).detach())
        torch.testing.assert_close(states.text, encoder.text_at_layer().features_before(tokens).detach())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_hooks_are_removed_also_after_an_exception(
    error: type[BaseException] | None, make_encoder: MakeEncoder
) -> None:
    encoder = make_encoder()
    images = images_for(encoder).float()

    def run() -> Captured:
        with capture(encoder.image_at_layer(), encoder.text_at_layer()) as captured:
            assert hooks(encoder) == 3, "both layers, and what the image tower ends in"
            encoder.encode_image(images)
            if error is not None:
                raise error
        return captured

    if error is None:
        kept = run()
        own = encoder.encode_image(images)
        assert len(kept.image) == len(kept.image_embeddings) == 1, "what passes later is not kept"
        torch.testing.assert_close(kept.image_embeddings[0], own.detach())
    else:
        with pytest.raises(error):
            run()
    assert hooks(encoder) == 0


def test_what_enters_the_head_is_kept_too(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    images, tokens = images_for(encoder), encoder.tokenizer.encode(CAPTIONS)
    image = encoder.image_at_layer(encoder.image_at_layer().layers.stop)
    with capture(image, encoder.text_at_layer()) as captured:
        encoder.encode_image(images)
        encoder.encode_text(tokens)
    assert len(captured.image) == 1
    torch.testing.assert_close(captured.image[0], image.features_before(images).detach(), rtol=1e-10, atol=1e-12)
    assert hooks(encoder) == 0


def test_the_forward_pass_keeps_its_values_and_gradients(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    images = images_for(encoder).requires_grad_()
    expected = encoder.encode_image(images)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    with capture(encoder.image_at_layer(1), encoder.text_at_layer(1)) as captured:
        embedding = encoder.encode_image(images)
        assert not captured.image[0].requires_grad, "what is kept must not keep the graph alive"
        (gradient,) = torch.autograd.grad(embedding.sum(), images)
    assert torch.equal(embedding, expected)
    assert torch.equal(gradient, expected_gradient)


def test_what_inference_mode_left_can_be_differentiated_from(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    tower = encoder.image_at_layer(1)
    with capture(tower, encoder.text_at_layer()) as captured, torch.inference_mode():
        encoder.encode_image(images_for(encoder))
    hidden = Captured.only(captured.image, 2)
    assert hidden is not None
    with differentiable(encoder.model):
        point = hidden.requires_grad_()
        (gradient,) = torch.autograd.grad(tower.embed_from(point).sum(), point)
    assert gradient.abs().sum() > 0
