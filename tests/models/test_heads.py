"""Heads that pool tokens, read along a path without making any token: against the tower's own head at each point."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, randomised
from equation_10 import Side, equation_10
from small_timm import register
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.attribution.path_integral import integrated_vjp, quadrature
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.models.at_layer import TowerAtLayer, constant, differentiable

SIZE = (64, 96)
VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
TIMM: dict[str, Callable[..., nn.Module]] = {
    "head_siglip": partial(VisionTransformer, **VIT, class_token=False, global_pool="map"),
    # As the perception encoders of timm: CLS, rotary positions, and a pool that is given all tokens.
    "head_eva": partial(Eva, **VIT, use_rot_pos_emb=True, attn_pool_num_heads=4, global_pool="map"),
    "head_registers": partial(VisionTransformer, **VIT, class_token=False, reg_tokens=2, global_pool="map"),
    "head_pool_of_all": partial(VisionTransformer, **VIT, reg_tokens=2, pool_include_prefix=True, global_pool="map"),
    "head_average": partial(VisionTransformer, **VIT, fc_norm=False, global_pool="avg"),
    "head_average_first": partial(VisionTransformer, **VIT, class_token=False, fc_norm=True, global_pool="avg"),
}


register(TIMM)


@dataclass(frozen=True)
class Kind:
    """A tower, the width of its embeddings, and the forward passes that three points of its path may cost."""

    vision_cfg: dict[str, Any]
    width: int = 12
    cost: float = 0.05


def timm_tower(name: str, pool: str, proj: str = "linear") -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": list(SIZE)}


OWN = {"image_size": list(SIZE), "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
COCA = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 4}
KINDS = {
    "siglip": Kind(timm_tower("head_siglip", "map", "none"), width=16),
    "perception_encoder": Kind(timm_tower("head_eva", "map")),
    "registers_the_pool_is_not_given": Kind(timm_tower("head_registers", "map", "mlp")),
    "registers_the_pool_is_given": Kind(timm_tower("head_pool_of_all", "map")),
    "average": Kind(timm_tower("head_average", "avg"), cost=0.01),
    "average_before_the_norm": Kind(timm_tower("head_average_first", "avg"), cost=0.01),
    "coca": Kind(OWN | COCA),
    "coca_of_one_width": Kind(OWN | COCA | {"width": 12, "head_width": 6}),
    "own_average": Kind(OWN | {"pool_type": "avg"}, cost=0.01),
    "own_average_before_the_norm": Kind(OWN | {"pool_type": "avg", "final_ln_after_pool": True}, cost=0.01),
    "resnet": Kind({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}, cost=0.3),
}


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DualEncoder]:
    """Encoders in float64 that the tests of this file share, so they must not change them."""
    return cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


def build(name: str, folder: Path) -> DualEncoder:
    kind, path = KINDS[name], folder / "model.json"
    text = TEXT | {"width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": kind.width, "vision_cfg": kind.vision_cfg, "text_cfg": text}))
    torch.manual_seed(0)
    encoder = load_dual_encoder(path)
    with torch.no_grad():
        for weight in encoder.model.visual.parameters():
            if weight.ndim > 1:  # so that attention is not the same for all tokens
                weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
    return randomised(encoder).double().eval()


def at_head(encoder: DualEncoder) -> TowerAtLayer:
    tower = encoder.image_at_layer(encoder.image_at_layer().layers.stop)
    assert tower.layer == tower.reading_layer
    return tower


def states(encoder: DualEncoder, tower: TowerAtLayer, references: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of two images, a reference of each or of both, and three points of the path for each token."""
    generator = torch.Generator().manual_seed(1)
    height, width = encoder.image_transform.size
    with torch.no_grad():
        hidden = tower.features_before(torch.randn(2, 3, height, width, generator=generator).double())
        reference = tower.features_before(torch.randn(references, 3, height, width, generator=generator).double())
    return hidden, reference, torch.rand(2, 3, tower.count(hidden), generator=generator).double()


def generic(tower: TowerAtLayer, hidden: Tensor, reference: Tensor) -> Callable[[Tensor], Tensor]:
    """The path by the tower's own head, at each point."""
    return TowerAtLayer.path(tower, hidden, reference)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * float(expected.detach().abs().max()))


def derivative(path: Callable[[Tensor], Tensor], alpha: Tensor, tangent: Tensor) -> Tensor:
    along: Tensor = torch.func.jvp(path, (alpha,), (tangent,))[1]
    return along


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_values_and_both_derivatives_are_those_of_the_towers_own_head(
    name: str, references: int, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tower = at_head(encoder)
    hidden, reference, alpha = states(encoder, tower, references)
    assert not tower.calls_blocks
    with differentiable(encoder):
        path, own = tower.path(hidden, reference), generic(tower, hidden, reference)
        tangent = torch.randn(alpha.shape, generator=torch.Generator().manual_seed(2)).double()
        along, own_along = derivative(path, alpha, tangent), derivative(own, alpha, tangent)
        assert_close(along, own_along)
        assert own_along.abs().max() > 1e-3
        leaf = alpha.requires_grad_()
        values, own_values = path(leaf), own(leaf)
        assert_close(values, own_values)
        cotangent = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)).double()
        (back,) = torch.autograd.grad(values, leaf, cotangent)
        (own_back,) = torch.autograd.grad(own_values, leaf, cotangent)
        assert_close(back, own_back)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_by_the_weights_are_those_of_the_towers_own_head(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tower = at_head(encoder)
    hidden, reference, _ = states(encoder, tower)
    points, weights = quadrature("midpoint", 2)
    cotangent = torch.randn(2, 1, encoder.embedding_width, generator=torch.Generator().manual_seed(3)).double()
    trained = dict(encoder.model.visual.named_parameters())
    found = []
    with differentiable(encoder):
        for path in (tower.path(hidden, reference), generic(tower, hidden, reference)):
            matrix = integrated_vjp(path, points, weights, cotangent, tower.count(hidden), create_graph=True)
            gradients = torch.autograd.grad(matrix.square().sum(), list(trained.values()), allow_unused=True)
            found.append(
                [torch.zeros_like(w) if g is None else g for w, g in zip(trained.values(), gradients, strict=True)]
            )
    size = max(float(gradient.abs().max()) for gradient in found[1])
    for parameter, gradient, own in zip(trained, *found, strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-9, atol=1e-12 * size, msg=parameter)


# The module that hidden states enter after the last block.
ENTRANCES = {"siglip": "trunk.norm", "perception_encoder": "trunk.norm", "coca": "attn_pool", "resnet": "attnpool"}


@pytest.mark.parametrize("name", ENTRANCES)
def test_attributions_at_the_head_agree_with_equation_10_taken_literally(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder, model = encoder_of(name), encoder_of(name).model
    height, width = encoder.image_transform.size
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(5)).double()
    tokens, empty = encoder.tokenizer.encode(["a red dog"]), torch.zeros(1, 16, dtype=torch.long)
    empty[0, 0], empty[0, 2] = 49406, 49407
    tower = at_head(encoder)
    entrance = model.visual.get_submodule(ENTRANCES[name])
    result = FeaturePairAttribution(encoder, tower.layer, steps=2, rule="right").attribute(images, tokens)
    expected = equation_10(
        Side(model.transformer.resblocks[-1], model.encode_text, tokens, empty),
        Side(entrance, model.encode_image, images, torch.zeros_like(images), 1 if tower.is_feature_map else -1),
        steps=2,
    )
    own = result.interactions[0].flatten(1)
    torch.testing.assert_close(own, expected[:, tower.prefix_tokens :], rtol=1e-8, atol=1e-12)
    assert own.abs().max() > 1e-4


class Doubled(nn.Module):
    """A parametrization, as low-rank adapters are."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_weights_are_those_that_the_head_has_when_a_path_is_made(tmp_path: Path) -> None:
    encoder = build("siglip", tmp_path)
    tower = at_head(encoder)
    pool: Any = encoder.model.visual.trunk.attn_pool
    hidden, reference, alpha = states(encoder, tower)
    register_parametrization(pool.kv, "weight", Doubled())
    before = encoder.encode_image(torch.ones(1, 3, *SIZE).double())
    for at in (tower, at_head(encoder)):
        assert not at.calls_blocks
        with differentiable(encoder), torch.no_grad():
            assert_close(at.path(hidden, reference)(alpha), generic(at, hidden, reference)(alpha))
    with torch.no_grad():
        pool.latent.mul_(3)
    assert (encoder.encode_image(torch.ones(1, 3, *SIZE).double()) - before).abs().max() > 1e-3
    with differentiable(encoder), torch.no_grad():
        assert_close(tower.path(hidden, reference)(alpha), generic(tower, hidden, reference)(alpha))


def _more_queries(pool: Any) -> None:
    pool.latent_len, pool.latent = 2, nn.Parameter(torch.cat([pool.latent.detach()] * 2, dim=1))


def _positions(pool: Any) -> None:
    pool.pos_embed = nn.Parameter(torch.randn(96, 16).double())


def _normed_keys(pool: Any) -> None:
    pool.k_norm = nn.LayerNorm(8).double()


def _another_norm(pool: Any) -> None:
    pool.kv = nn.Sequential(nn.LayerNorm(16), pool.kv).double()


def _hook(pool: Any) -> None:
    pool.kv.register_forward_hook(lambda _, __, output: output.tanh())


@pytest.mark.parametrize("change", [_more_queries, _positions, _normed_keys, _another_norm, _hook])
def test_a_head_with_anything_else_in_it_is_run_as_it_is(change: Callable[[Any], None], tmp_path: Path) -> None:
    encoder = build("siglip", tmp_path)
    change(encoder.model.visual.trunk.attn_pool)
    tower = at_head(encoder)
    assert tower.calls_blocks
    with torch.no_grad():
        images = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(4)).double()
        hidden = tower.features_before(images)
        ends = tower.path(hidden, torch.zeros_like(hidden))(torch.ones(1, 1, 96).double())
        assert_close(ends[:, 0], encoder.model.visual(images))


@pytest.mark.parametrize("name", KINDS)
def test_a_path_there_and_back_costs_a_fraction_of_a_forward_pass(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tower = at_head(encoder)
    hidden, reference, _ = states(encoder, tower)
    cotangents = torch.ones(1, 1, encoder.embedding_width).double()

    def read() -> None:
        path = tower.path(hidden[:1], reference)
        integrated_vjp(path, *quadrature("midpoint", 3), cotangents, tower.count(hidden))

    with differentiable(encoder), constant(encoder):
        own = flops(lambda: encoder.model.visual(torch.zeros(1, *encoder.image_shape).double()))
        assert flops(read) < KINDS[name].cost * own


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
