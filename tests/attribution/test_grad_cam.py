from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, encoder_from
from equation_10 import block_input, replacing
from inputs import random_pairs
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_xai.attribution import GradCAM
from lightning_xai.models import DualEncoder

pytestmark = pytest.mark.filterwarnings("ignore::lightning_xai.attribution.ConstantMapWarning")  # ReLUs of random maps
MakeEncoder = Callable[..., DualEncoder]


def literal(block: nn.Module, encode: Callable[[], Tensor], other: Tensor) -> tuple[Tensor, Tensor]:
    """What enters a block for one input, and the gradient of the similarity by it, by hooks on the whole encoder."""
    hidden = block_input(block, encode).requires_grad_()
    similarity = cosine_similarity(replacing(block, hidden, encode), other.detach())
    (gradient,) = torch.autograd.grad(similarity.sum(), hidden)
    return hidden.detach()[0], gradient[0]


def cam(hidden_PD: Tensor, gradient_PD: Tensor) -> Tensor:
    """Eqs. 1 and 2 of the paper for features at P places: [P]."""
    return (hidden_PD * gradient_PD.mean(dim=0)).sum(dim=1).relu()


@pytest.mark.parametrize("layer", [None, 0, 1, -1])
def test_image_tokens_agree_with_the_papers_equations(make_encoder: MakeEncoder, layer: int | None) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    result = GradCAM(encoder, image_layer=layer).attribute(images, tokens)
    model: Any = encoder.model
    block = model.visual.transformer.resblocks[-1 if layer is None else layer]
    expected = []
    for row in range(len(images)):
        image, other = images[row, None], encoder.encode_text(tokens[row, None])
        hidden, gradient = literal(block, lambda image=image: model.encode_image(image), other)  # type: ignore[misc]
        expected.append(cam(hidden[1:], gradient[1:]).reshape(4, 4))
    torch.testing.assert_close(result.image, torch.stack(expected), rtol=1e-8, atol=1e-12)
    assert result.image.max() > 1e-6


@pytest.mark.parametrize("layer", [None, 2, 4])
def test_feature_maps_agree_with_the_papers_equations(make_encoder: MakeEncoder, layer: int | None) -> None:
    encoder = make_encoder("resnet", torch.float64, seed=1)
    images, tokens = random_pairs(encoder)
    result = GradCAM(encoder, image_layer=layer).attribute(images, tokens)
    model: Any = encoder.model
    # By default the last stage's output, as in the paper, which is what enters the pool.
    block = model.visual.attnpool if layer is None else getattr(model.visual, f"layer{layer}")
    expected = []
    for row in range(len(images)):
        image, other = images[row, None], encoder.encode_text(tokens[row, None])
        hidden, gradient = literal(block, lambda image=image: model.encode_image(image), other)  # type: ignore[misc]
        places = cam(hidden.flatten(1).mT, gradient.flatten(1).mT)
        expected.append(places.reshape(hidden.shape[1:]))
    torch.testing.assert_close(result.image, torch.stack(expected), rtol=1e-8, atol=1e-12)
    assert result.image.max() > 1e-8


@pytest.mark.parametrize("name", ["vit", "vit_average_pool"])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_text_agrees_with_the_papers_equations_over_visible_tokens(
    make_encoder: MakeEncoder, name: str, layer: int | None
) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    result = GradCAM(encoder, text_layer=layer).attribute(images, tokens)
    model: Any = encoder.model
    text = getattr(model, "text", model)
    block = text.transformer.resblocks[-1 if layer is None else layer]
    expected = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, end in enumerate(tokens.argmax(dim=1).tolist()):
        caption, other = tokens[row, None], encoder.encode_image(images[row, None])
        hidden, gradient = literal(block, lambda caption=caption: model.encode_text(caption), other)  # type: ignore[misc]
        seen = end + 1 if name == "vit" else len(hidden)  # the other's text is read at its last position
        expected[row, :seen] = cam(hidden[:seen], gradient[:seen])
    torch.testing.assert_close(result.text, expected, rtol=1e-8, atol=1e-12)
    assert result.text.max() > 1e-6


def test_a_text_tower_with_class_token_and_masked_padding_shows_its_captions_tokens(tmp_path: Path) -> None:
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
        "text_cfg": TEXT | {"embed_cls": True},
        "custom_text": True,
    }
    encoder = encoder_from(config, tmp_path)
    images, tokens = random_pairs(encoder)
    result = GradCAM(encoder, text_layer=1).attribute(images, tokens)
    block = encoder.model.text.transformer.resblocks[1]
    visible = encoder.text_at_layer().visible(tokens)
    expected = torch.zeros(tokens.shape, dtype=torch.float64)
    for row in range(len(images)):
        caption, other = tokens[row, None], encoder.encode_image(images[row, None])
        hidden, gradient = literal(block, lambda caption=caption: encoder.encode_text(caption), other)  # type: ignore[misc]
        seen = visible[row]
        expected[row, seen] = cam(hidden[:-1][seen], gradient[:-1][seen])  # the class token is the last
    torch.testing.assert_close(result.text, expected, rtol=1e-8, atol=1e-12)
    assert result.text.max() > 1e-6


def test_each_tower_runs_once_besides_the_models_own_pass(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    method, model, calls = GradCAM(encoder), encoder.model, list[int]()
    for place, tower in enumerate((model.visual, model)):
        tower.transformer.resblocks[0].register_forward_hook(lambda *_, place=place: calls.append(place))
    method.attribute(*random_pairs(encoder))
    # Foreign hooks have the method look at its towers again.
    calls.clear()
    method.attribute(*random_pairs(encoder))
    assert sorted(calls) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_layer": 4}, "image tower has layers"),
        ({"image_layer": 3}, "take image_layer=2"),
        ({"text_layer": -4}, "text tower has layers"),
    ],
)
def test_a_layer_that_does_not_exist_or_reads_no_patch_is_an_error_at_once(
    make_encoder: MakeEncoder, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GradCAM(make_encoder("vit"), **options)
