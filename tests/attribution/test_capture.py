from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from torch import Tensor

from lightning_xai.attribution.capture import InputCapture
from lightning_xai.models import DualEncoder
from lightning_xai.models.at_layer import TowerAtLayer, differentiable

MakeEncoder = Callable[..., DualEncoder]
CAPTIONS = ["a dog", "one very long caption of eleven or more tokens here"]


def images_for(encoder: DualEncoder, seed: int = 0) -> Tensor:
    height, width = encoder.image_transform.size
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed)).double()


def hooks(encoder: DualEncoder) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in encoder.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_kept_is_the_stems_output_at_every_layer(name: str, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = images_for(encoder), encoder.tokenizer.encode(CAPTIONS)
    image_layers = range(1, 5) if name == "resnet" else range(ARCHITECTURES[name]["vision_cfg"]["layers"])
    cuts: list[tuple[TowerAtLayer, Tensor]] = [(encoder.image_at_layer(layer), images) for layer in image_layers]
    cuts += [(encoder.text_at_layer(layer), tokens) for layer in range(ARCHITECTURES[name]["text_cfg"]["layers"])]
    for split, inputs in cuts:
        with InputCapture(split) as capture:
            (encoder.encode_image if inputs is images else encoder.encode_text)(inputs)
            taken = capture.take()
        assert taken is not None
        torch.testing.assert_close(taken, split.features_before(inputs).detach(), rtol=1e-10, atol=1e-12)
        assert not taken.requires_grad


def test_a_tower_with_tokens_first_is_captured_with_the_batch_first(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    model: Any = encoder.model
    for transformer in (model.visual.transformer, model.transformer):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False
    images, tokens = images_for(encoder), encoder.tokenizer.encode(CAPTIONS)
    with InputCapture(encoder.image_at_layer(1)) as image, InputCapture(encoder.text_at_layer(1)) as text:
        encoder.encode_image(images)
        encoder.encode_text(tokens)
        assert image.hidden[0].shape == (2, 17, 32)
        torch.testing.assert_close(image.take(), encoder.image_at_layer(1).features_before(images).detach())
        torch.testing.assert_close(text.take(), encoder.text_at_layer(1).features_before(tokens).detach())


def test_take_gives_what_one_pass_left_and_nothing_after_none_or_several(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    first, second = images_for(encoder, 1), images_for(encoder, 2)
    with InputCapture(encoder.image_at_layer()) as capture:
        assert capture.take() is None
        capture.clear()
        encoder.encode_image(first)
        encoder.encode_image(second)
        assert len(capture.hidden) == 2
        assert capture.take() is None, "which of two passes was meant is not known"
        assert capture.hidden == []
        capture.clear()
        encoder.encode_image(second)
        torch.testing.assert_close(capture.take(), encoder.image_at_layer().features_before(second).detach())
        assert capture.take() is None, "each input is handed out once"


def test_what_runs_the_block_after_take_is_not_kept_until_clear(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    images = images_for(encoder)
    split = encoder.image_at_layer()
    with InputCapture(split) as capture:
        encoder.encode_image(images)
        hidden = capture.take()
        assert hidden is not None
        split.embed_from(hidden)
        assert capture.hidden == []
        assert capture.take() is None
        capture.clear()
        encoder.encode_image(images)
        assert torch.equal(hidden, torch.stack(capture.hidden)[0])
    with capture:
        encoder.encode_image(images)
        assert len(capture.hidden) == 1, "closing ends the pause"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hook_vanishes_also_after_an_exception(error: type[BaseException], make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    capture = InputCapture(encoder.image_at_layer())
    assert hooks(encoder) == 0

    def fail() -> None:
        with capture:
            assert hooks(encoder) == 1
            encoder.encode_image(images_for(encoder).float())
            raise error

    with pytest.raises(error):
        fail()
    assert hooks(encoder) == 0
    assert capture.hidden == []


def test_opening_twice_hooks_once_and_closing_ends_it(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder()
    images = images_for(encoder).float()
    capture = InputCapture(encoder.image_at_layer())
    capture.close()
    capture.open()
    capture.open()
    assert hooks(encoder) == 1
    encoder.encode_image(images)
    assert len(capture.hidden) == 1
    capture.close()
    assert hooks(encoder) == 0
    assert capture.hidden == []
    encoder.encode_image(images)
    assert capture.hidden == []
    capture.open()
    encoder.encode_image(images)
    assert len(capture.hidden) == 1
    capture.close()


def test_the_forward_pass_keeps_its_values_and_gradients(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    images = images_for(encoder).requires_grad_()
    expected = encoder.encode_image(images)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    with InputCapture(encoder.image_at_layer(1)) as capture:
        captured = encoder.encode_image(images)
        assert not capture.hidden[0].requires_grad, "what is kept must not keep the graph alive"
        (gradient,) = torch.autograd.grad(captured.sum(), images)
    assert torch.equal(captured, expected)
    assert torch.equal(gradient, expected_gradient)


def test_what_inference_mode_left_can_be_differentiated_from(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(dtype=torch.float64)
    images = images_for(encoder)
    split = encoder.image_at_layer(1)
    with InputCapture(split) as capture, torch.inference_mode():
        encoder.encode_image(images)
        hidden = capture.take()
    assert hidden is not None
    with differentiable(encoder.model):
        point = hidden.requires_grad_()
        (gradient,) = torch.autograd.grad(split.embed_from(point).sum(), point)
    assert gradient.abs().sum() > 0
