from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, TEXT, encoder_from
from equation_10 import Side, assert_same, block_input, equation_10, replacing, sharing_padding
from inputs import CAPTIONS, random_pairs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.models import DualEncoder, UnsupportedTowerError
from lightning_xai.models.at_layer import TowerAtLayer, as_constant, differentiable

VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
# What open_clip's configurations can also say about its towers.
VARIANTS: dict[str, dict[str, Any]] = {
    "text_as_a_module": {"embed_dim": 24, "custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "oblong_pooled_before_norm": {
        "embed_dim": 24,
        "vision_cfg": VIT | {"image_size": [32, 48], "final_ln_after_pool": True, "no_ln_pre": True},
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"},
    },
    "attention_pool_biased_projection": {
        "embed_dim": 24,
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 4},
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407, "proj_bias": True},
    },
    "patch_dropout_no_projection": {
        "embed_dim": 32,
        "vision_cfg": VIT | {"patch_dropout": 0.5},
        "text_cfg": TEXT | {"proj_type": "none"},
    },
    "sine_positions_text_read_first": {
        "embed_dim": 24,
        "vision_cfg": VIT | {"pos_embed_type": "sin_cos_2d"},
        "text_cfg": TEXT | {"pool_type": "first", "no_causal_mask": True},
    },
    "text_read_at_its_end_without_causal_mask": {
        "embed_dim": 24,
        "vision_cfg": VIT,
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "argmax"},
    },
    "siglips_text": {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": VIT,
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "coca": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VIT
        | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 4, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"layers": 1, "attn_pooler_heads": 4},
    },
}
# Settings of open_clip's text transformer that no configuration has.
MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "coca_mask_in_its_place": ("coca", {"correct_cls_mask": True}),
    "padding_mask_read_at_the_end": ("text_read_at_its_end_without_causal_mask", {"use_pad_mask": True}),
    "padding_mask_read_last": ("siglips_text", {"use_pad_mask": True}),
}
for _name, (_base, _) in MASKS.items():
    VARIANTS[_name] = VARIANTS[_base] | {"custom_text": True}
ALL = {**ARCHITECTURES, **VARIANTS}


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DualEncoder]:
    """Encoders in float64 that the tests of this file share, so they must not change them."""

    def make(name: str) -> DualEncoder:
        encoder = encoder_from(ALL[name], tmp_path_factory.mktemp(name))
        for attribute, value in MASKS[name][1].items() if name in MASKS else ():
            setattr(encoder.model.text, attribute, value)
        return DualEncoder(encoder.model, encoder.tokenizer, encoder.architecture).eval()

    return cache(make)


def block_of(encoder: DualEncoder, tower: str, layer: int) -> nn.Module:
    """The block that open_clip gives this number, found without the code under test."""
    model: Any = encoder.model
    if tower == "text":
        transformer = (model.text if hasattr(model, "text") else model).transformer
        block: nn.Module = transformer.resblocks[layer]
    elif hasattr(model.visual, "transformer"):
        block = model.visual.transformer.resblocks[layer]
    else:
        block = getattr(model.visual, f"layer{layer}")
    return block


def layers_of(name: str, tower: str) -> list[int]:
    config = ALL[name]
    depth = config["text_cfg"]["layers"] if tower == "text" else config["vision_cfg"]["layers"]
    return [1, 2, 3, 4] if isinstance(depth, list) else list(range(depth))


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_features_are_the_input_of_the_numbered_block_and_embed_to_the_encoders_output(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    images, tokens = random_pairs(encoder)
    # CoCa normalises by default.
    sides: tuple[tuple[str, Tensor, Any, Any, Any], ...] = (
        ("image", images, encoder.image_at_layer, encoder.encode_image, encoder.model.encode_image),
        ("text", tokens, encoder.text_at_layer, encoder.encode_text, encoder.model.encode_text),
    )
    for kind, inputs, at_layer, encode, own_encode in sides:
        expected = own_encode(inputs, normalize=False)
        assert_same(encode(inputs), expected)
        for layer in layers_of(name, kind):
            tower, block = at_layer(layer), block_of(encoder, kind, layer)
            hidden = tower.features_before(inputs)
            own_hidden = block_input(block, partial(own_encode, inputs, normalize=False))
            assert_same(hidden, own_hidden[:, : hidden.shape[1]])
            assert_same(tower.embed_from(hidden, inputs), expected)
            assert (tower.layer, tower.block) == (layer, block)
            if kind == "image" and hidden.ndim == 4:
                assert (tower.prefix_tokens, tower.grid) == (0, hidden.shape[2:])
            elif kind == "image":
                assert hidden.shape[1] == tower.prefix_tokens + math.prod(tower.grid)


@torch.no_grad()
def test_the_grid_runs_from_left_to_right_and_top_to_bottom(encoder_of: Callable[[str], DualEncoder]) -> None:
    encoder = encoder_of("oblong_pooled_before_norm")
    images, _ = random_pairs(encoder)
    changed = images.clone()
    changed[:, :, 8:16, 40:48] = 0  # second row, last column
    tower = encoder.image_at_layer(0)
    assert tower.grid == (4, 6)
    differing = (tower.features_before(changed) != tower.features_before(images)).any(dim=2)[0].nonzero().flatten()
    assert differing.tolist() == [tower.prefix_tokens + 1 * 6 + 5]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_path_embeds_every_mixture_of_reference_and_input(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    images, tokens = random_pairs(encoder)
    generator = torch.Generator().manual_seed(2)
    towers: list[tuple[TowerAtLayer, Tensor]] = [(encoder.image_at_layer(), images), (encoder.text_at_layer(), tokens)]
    for (tower, inputs), references in product(towers, (1, 3)):
        hidden = tower.features_before(inputs)
        reference = torch.randn(references, *hidden.shape[1:], generator=generator).double()
        count = hidden[0, 0].numel() if hidden.ndim == 4 else hidden.shape[1]
        alpha = torch.rand(3, 2, count, generator=generator).double()
        embeddings = tower.path(hidden, reference, inputs)(alpha)
        for point in range(2):
            weight = alpha[:, point]
            weight = weight.reshape(3, 1, *tower.grid) if hidden.ndim == 4 else weight.unsqueeze(2)
            assert_same(embeddings[:, point], tower.embed_from(reference + weight * (hidden - reference), inputs))


@torch.no_grad()
def test_the_order_of_axes_is_read_from_the_tower(tmp_path: Path) -> None:
    encoder = encoder_from(ARCHITECTURES["vit"], tmp_path)
    if not hasattr(encoder.model.visual.transformer, "batch_first"):
        pytest.skip("open_clip 4 knows one order only")
    images, tokens = random_pairs(encoder)
    expected_image, expected_text = encoder.model.encode_image(images), encoder.model.encode_text(tokens)
    model: Any = encoder.model
    for transformer in (model.visual.transformer, model.transformer):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False

    image, text = encoder.image_at_layer(1), encoder.text_at_layer(1)
    assert_same(image.embed_from(image.features_before(images)), expected_image)
    assert_same(text.embed_from(text.features_before(tokens), tokens), expected_text)
    assert_same(encoder.encode_text(tokens), expected_text)
    own_hidden = block_input(block_of(encoder, "image", 1), lambda: model.encode_image(images))
    assert own_hidden.shape[1] == len(images)
    assert_same(image.captured(own_hidden), image.features_before(images))


def test_text_without_positions_to_read_says_what_is_missing(encoder_of: Callable[[str], DualEncoder]) -> None:
    tower = encoder_of("vit").text_at_layer()
    with pytest.raises(ValueError, match="token ids"):
        tower.embed_from(tower.features_before(random_pairs(encoder_of("vit"))[1]))


@pytest.mark.parametrize(
    ("name", "accepted", "refused", "range_shown"),
    [
        ("vit", {0: 0, 2: 2, 3: 3, -1: 2, -3: 0}, [4, -4], "layers 0 to 2"),
        ("resnet", {1: 1, 4: 4, 5: 5, -1: 4, -4: 1}, [0, 6, -5], "layers 1 to 4"),
    ],
)
def test_layers_count_as_open_clip_counts_and_from_the_end(
    name: str,
    accepted: dict[int, int],
    refused: list[int],
    range_shown: str,
    encoder_of: Callable[[str], DualEncoder],
) -> None:
    encoder = encoder_of(name)
    for layer, resolved in accepted.items():
        assert encoder.image_at_layer(layer).layer == resolved
    for layer in refused:
        with pytest.raises(ValueError, match=rf"image tower has {range_shown} .*got layer {layer}$"):
            encoder.image_at_layer(layer)
    with pytest.raises(ValueError, match=r"text tower has layers 0 to 2 \(or -3 to -1\); got layer 3"):
        encoder.text_at_layer(3)


@pytest.mark.parametrize("name", ALL)
def test_the_reading_layer_is_the_last_block_but_where_patches_are_pooled(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder, vision = encoder_of(name), ALL[name]["vision_cfg"]
    pools = isinstance(vision["layers"], list) or vision.get("attentional_pool") or vision.get("pool_type") == "avg"
    for layer in encoder.image_at_layer().layers:
        image = encoder.image_at_layer(layer)
        assert image.reading_layer == image.layers[-1] + bool(pools)
    text = encoder.text_at_layer()
    assert text.reading_layer == text.layers[-1]


@pytest.mark.parametrize("name", ["vit", "siglips_text", "text_read_at_its_end_without_causal_mask"])
def test_a_point_of_the_path_to_a_texts_one_position_costs_a_fraction_of_a_pass(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tokens = encoder.tokenizer.encode(["a dog"])
    tower, whole = encoder.text_at_layer(), encoder.text_at_layer(0)
    with differentiable(encoder), torch.no_grad():
        hidden = tower.features_before(tokens)
        alpha = torch.ones(1, 6, hidden.shape[1]).double()
        path = tower.path(hidden, torch.zeros_like(hidden), tokens, directions=100)
        path(alpha)  # what all points share is computed at the first one
        point = flops(lambda: path(alpha)) / 6
        tower_pass = flops(lambda: whole.embed_from(whole.features_before(tokens, hidden.shape[1]), tokens))
    assert point < 0.1 * tower_pass


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ALL)
def test_visible_tokens_are_those_that_the_embedding_changes_with(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tokens = encoder.tokenizer.encode(list(CAPTIONS))
    tokens[0, 3] = 0  # what pads stands amid a caption, too: it is an exclamation mark
    encode = partial(encoder.model.encode_text, normalize=False)
    block = block_of(encoder, "text", 0)
    hidden = block_input(block, lambda: encode(tokens)).detach().requires_grad_()
    embedding = replacing(block, hidden, lambda: encode(tokens))
    mixture = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2)).double()
    (gradient,) = torch.autograd.grad((embedding * mixture).sum(), hidden)
    changes = gradient.abs().sum(dim=2) > 1e-12
    tower = encoder.text_at_layer(0)
    assert torch.equal(tower.visible(tokens), changes[:, : tokens.shape[1]])
    # What `features_before` leaves out, the embedding does not see.
    assert not changes[:, tower.features_before(tokens).shape[1] :].any()


@pytest.mark.parametrize("name", ["siglips_text", "sine_positions_text_read_first", "coca", *MASKS])
@pytest.mark.parametrize("layer", [0, 1])
def test_attributions_agree_with_equation_10_taken_literally(
    name: str, layer: int, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    images, tokens = random_pairs(encoder)
    result = FeaturePairAttribution(encoder, text_layer=layer, steps=2).attribute(images[:1], tokens[:1])
    reference = torch.zeros_like(tokens[:1])
    reference[0, 0], reference[0, 2] = 49406, 49407
    expected = equation_10(
        Side(
            block_of(encoder, "text", layer), partial(encoder.model.encode_text, normalize=False), tokens[:1], reference
        ),
        Side(block_of(encoder, "image", 2), encoder.encode_image, images[:1], torch.zeros_like(images[:1])),
        steps=2,
    )
    own = sharing_padding(
        expected[: tokens.shape[1]], tokens[0].argmax()
    )  # CoCa's class token is no part of the caption
    torch.testing.assert_close(result.interactions[0].flatten(1), own[:, 1:], rtol=1e-8, atol=1e-12)
    assert result.interactions.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["siglips_text", "coca", *MASKS])
def test_attributions_sum_to_the_change_of_similarity(name: str, encoder_of: Callable[[str], DualEncoder]) -> None:
    encoder = encoder_of(name)
    images, tokens = random_pairs(encoder)
    attribution = FeaturePairAttribution(encoder, 1, 1, steps=32, rule="gauss_legendre")
    result = attribution.attribute(images, tokens)
    assert result.completeness_error.abs().max() < 1e-9
    assert result.interactions.abs().max() > 1e-4


def test_text_that_is_not_pooled_has_no_layers(tmp_path: Path) -> None:
    text = TEXT | {"pool_type": "none", "proj_type": "none", "no_causal_mask": True}
    encoder = encoder_from({"embed_dim": 32, "vision_cfg": VIT, "text_cfg": text}, tmp_path)
    _, tokens = random_pairs(encoder)
    assert_same(encoder.encode_text(tokens), encoder.model.encode_text(tokens))
    with pytest.raises(UnsupportedTowerError, match="pooled by 'none'"):
        encoder.text_at_layer()


def global_state(module: nn.Module) -> tuple[object, ...]:
    """All that `differentiable` sets, as one comparable value; the last is the attention kernel that it needs."""
    kernels: Any = torch.backends.cuda
    return (
        [child.training for child in module.modules()],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mha.get_fastpath_enabled(),
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.cudnn_sdp_enabled(),
        kernels.math_sdp_enabled(),
    )


@pytest.mark.parametrize("raising", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_differentiable_switches_everything_and_restores_it_after_an_exception(
    context: Callable[[], Any], raising: bool, tmp_path: Path
) -> None:
    model: Any = encoder_from(ARCHITECTURES["vit"], tmp_path).model
    model.train()
    model.visual.conv1.eval()  # a part that is frozen in evaluation mode stays so

    def enter() -> None:
        with differentiable(model):
            inside = global_state(model)
            assert inside == ([False] * len(list(model.modules())), True, False, False, *[False] * 4, True)
            if raising:
                raise KeyboardInterrupt

    with context(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = global_state(model)
        if raising:
            with pytest.raises(KeyboardInterrupt):
                enter()
        else:
            enter()
        assert global_state(model) == before
    assert model.training
    assert not model.visual.conv1.training


def test_differentiable_allows_forward_and_reverse_derivatives_in_inference_mode(
    encoder_of: Callable[[str], DualEncoder],
) -> None:
    encoder = encoder_of("vit")
    with torch.inference_mode():
        hidden = encoder.image_at_layer(1).features_before(random_pairs(encoder)[0])
        with differentiable(encoder.model):
            point = as_constant(hidden).requires_grad_()
            embed = encoder.image_at_layer(1).embed_from
            (gradient,) = torch.autograd.grad(embed(point).sum(), point)
            direction = torch.randn(point.shape, generator=torch.Generator().manual_seed(3)).double()
            slope = torch.func.jvp(embed, (point.detach(),), (direction,))[1]
    assert_same(slope.sum(), (gradient * direction).sum())


def test_a_constant_shares_memory_unless_it_was_made_in_inference_mode() -> None:
    leaf = torch.ones(2, requires_grad=True)
    constant = as_constant(leaf * 1)
    assert not constant.requires_grad
    assert as_constant(leaf).data_ptr() == leaf.data_ptr()
    with torch.inference_mode():
        made_inside = torch.ones(2)
        assert not as_constant(made_inside).is_inference()
    assert not as_constant(made_inside).is_inference()
    assert torch.equal(as_constant(made_inside), made_inside)
