"""What is explained is the model as it stands: with adapters, hooks, wrappers, and parts without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import random_pairs
from torch import Tensor, nn

from lightning_xai.attribution import METHODS, FeaturePairAttribution, GradCAM
from lightning_xai.models import DualEncoder, UnsupportedTowerError

MakeEncoder = Callable[..., DualEncoder]
OPTIONS: dict[str, dict[str, Any]] = {
    "feature_pair": {"steps": 40, "rule": "midpoint"},
    "integrated_gradients": {"steps": 20},
    "kernel_shap": {"image_samples": 40, "text_samples": 40},
    "rise": {"image_masks": 4, "text_masks": 4},
    "banzhaf_pairs": {"image_samples": 64, "text_samples": 64},
}


def adapted(encoder: DualEncoder, targets: list[str], *, wrapped: bool) -> DualEncoder:
    """The encoder with random low-rank adapters of peft."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=targets)
    torch.manual_seed(0)
    if wrapped:
        encoder.model = peft.get_peft_model(encoder.model, config)
    else:
        peft.inject_adapter_in_model(config, encoder.model)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return encoder.eval()


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "wrapped"])
@pytest.mark.parametrize("targets", [["c_fc", "c_proj"], ["out_proj"], ["attn"]], ids=lambda targets: targets[0])
def test_every_method_explains_the_adapted_model_and_leaves_it_as_it_was(
    targets: list[str], wrapped: bool, make_encoder: MakeEncoder
) -> None:
    plain = make_encoder("vit")
    if targets == ["attn"] and not any(isinstance(part, nn.MultiheadAttention) for part in plain.modules()):
        pytest.skip("peft adapts PyTorch's attention, which open_clip 4 has no more")
    encoder = adapted(plain, targets, wrapped=wrapped)
    images, tokens = random_pairs(encoder)
    with torch.no_grad():
        own = torch.cosine_similarity(encoder.model.encode_image(images), encoder.model.encode_text(tokens))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for name in METHODS:
        options = OPTIONS.get(name, {})
        if issubclass(METHODS[name], FeaturePairAttribution) and targets == ["attn"]:
            with pytest.raises(UnsupportedTowerError, match=r"resblocks.0.attn rewrites .*merge_and_unload\(\) first"):
                METHODS[name](encoder, **options)
            continue
        result = METHODS[name](encoder, **options).attribute(images, tokens)
        torch.testing.assert_close(result.similarity, own, rtol=1e-4, atol=1e-5)
        if name == "feature_pair":
            assert result.completeness_error is not None
            assert result.completeness_error.abs().max() < 1e-3
    after = encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_compiled_model_is_explained(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    expected = FeaturePairAttribution(encoder).attribute(images, tokens)
    encoder.model = torch.compile(encoder.model, backend="eager")
    result = FeaturePairAttribution(encoder).attribute(images, tokens)
    torch.testing.assert_close(result.interactions, expected.interactions)


@pytest.mark.parametrize("part", ["visual", "visual.transformer", "ln_final"])
def test_a_hook_that_is_passed_by_is_refused_whenever_it_comes(part: str, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    before = [FeaturePairAttribution(encoder), GradCAM(encoder)]
    handle = encoder.model.get_submodule(part).register_forward_hook(lambda _, __, output: _changed(output))
    for method in before:
        try:
            result = method.attribute(images, tokens)
        except ValueError as error:
            assert "forward hooks change what the model computes" in str(error)  # noqa: PT017
            continue
        # Where the hook is passed through, its change is part of what is explained.
        torch.testing.assert_close(result.similarity, encoder.own_similarity(images, tokens), rtol=1e-4, atol=1e-5)
    handle.remove()
    for method in before:
        method.attribute(images, tokens)


def _changed(output: Tensor) -> Tensor:
    return output * torch.linspace(0.5, 2, output.shape[-1])


class Stopping(nn.Module):
    """A part that computes without a graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.inner(x)
        return output


def test_a_layer_that_stops_gradients_is_named(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    block: Any = encoder.model.visual.transformer.resblocks[1]
    block.mlp = Stopping(block.mlp)
    with pytest.raises(UnsupportedTowerError, match=r"visual\.transformer\.resblocks\.1\.mlp\.inner\.c_fc, a Linear"):
        FeaturePairAttribution(encoder, image_layer=0)
    FeaturePairAttribution(encoder)  # whose path does not lead through that block


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_integer_layers_are_named(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    visual: Any = encoder.model.visual
    quantize: Any = torch.ao.quantization.quantize_dynamic
    quantize(visual, {nn.Linear}, inplace=True)
    with pytest.raises(UnsupportedTowerError, match=r"resblocks\.\d\.\S+, a Linear in the image tower, passes"):
        GradCAM(encoder, image_layer=0)


def test_what_is_no_encoder_and_what_is_no_tensor_is_said(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    with pytest.raises(TypeError, match="as load_dual_encoder makes it; got a CLIP"):
        GradCAM(encoder.model)
    method = GradCAM(encoder)
    cases: list[tuple[Any, Any, str]] = [
        ([1], tokens, "got list and Tensor"),
        (images, ["a red ring"], "got Tensor and list"),
        ((images * 9).to(torch.uint8), tokens, "normalised floating-point pixels.*got torch.uint8"),
    ]
    for these, those, message in cases:
        with pytest.raises(TypeError, match=message):
            method.attribute(these, those)


def test_an_overflow_of_half_precision_is_called_one(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit").half()
    images, tokens = random_pairs(encoder)
    with torch.no_grad():
        encoder.model.token_embedding.weight.mul_(1e-3)
        encoder.model.positional_embedding.mul_(1e-3)
    try:
        FeaturePairAttribution(encoder, text_layer=0).attribute(images.half(), tokens)
    except ValueError as error:
        assert "float16 ends at 65,504" in str(error)  # noqa: PT017
