"""Image towers of timm, small and on oblong images, at every block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, randomised
from equation_10 import Side, assert_same, block_input, equation_10
from small_timm import register
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.levit import Levit
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.models import DualEncoder, UnsupportedTowerError, load_dual_encoder
from lightning_xai.models.at_layer import TowerAtLayer

SIZE = (32, 48)
VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

NAFLEX = {key: value for key, value in VIT.items() if key != "img_size"}


class Stem(nn.Module):
    """Feature maps at a quarter of the resolution, as the convolutional stems of hybrids make them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, kernel_size=4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.conv(images)
        return hidden


class Counting(VisionTransformer):
    """Its blocks count by their number, so that none of them can be left out."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for number, block in enumerate(self.blocks):
            x = block(x).roll(number, dims=2)
        normalised: Tensor = self.norm(x)
        return normalised


# timm's own classes, in a size that float64 is quick in. What a factory is not told, open_clip's configuration says.
SMALL: dict[str, Callable[..., nn.Module]] = {
    "small_vit": partial(VisionTransformer, **VIT),
    "small_vit_registers": partial(VisionTransformer, **VIT, reg_tokens=3),
    "small_vit_average": partial(VisionTransformer, **VIT, class_token=False, global_pool="avg"),
    "small_siglip": partial(VisionTransformer, **VIT, class_token=False, global_pool="map"),
    "small_hybrid": lambda **options: VisionTransformer(
        **VIT | {"patch_size": 2}, embed_layer=partial(HybridEmbed, Stem()), **options
    ),
    "small_eva": partial(Eva, **VIT, use_rot_pos_emb=True, num_reg_tokens=2, qkv_fused=False, swiglu_mlp=True),
    "small_swin": partial(
        SwinTransformer, img_size=SIZE, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4
    ),
    # It is given no size, and interpolates its 16 x 16 positions to the grid of each image.
    "small_naflex": partial(NaFlexVit, **NAFLEX, pos_embed_interp_mode="bilinear"),
    "small_naflex_average": partial(NaFlexVit, **NAFLEX, reg_tokens=2, pos_embed_ar_preserving=True),
    "small_naflex_factors": partial(NaFlexVit, **NAFLEX, class_token=True, pos_embed="factorized"),
    # Class tokens join after its blocks, where timm counts them as a prefix.
    "small_cait": partial(Cait, **VIT | {"img_size": 32}),
    "small_counting": lambda **options: Counting(**VIT, **options),
    # Its stages take tokens, though it says nothing of a prefix.
    "small_levit": partial(Levit, img_size=64, embed_dim=(16, 16), depth=(1, 1), num_heads=(2, 2), key_dim=8),
}


register(SMALL)


@dataclass(frozen=True)
class Tower:
    """What is expected of a tower: its blocks' place, and for each layer the grid, by name and from timm's papers.

    Attributes:
        grids: rows and columns at each layer, the last of which is the head.
        maps: whether it passes on feature maps.
        pools: whether the head pools patches, instead of reading CLS.
        prefix: tokens before the grid.
        width_axis: the axis of a block's input that is no place.
        smooth: whether quadrature converges fast.
    """

    vision_cfg: dict[str, Any]
    blocks: str
    grids: list[tuple[int, int]]
    maps: bool = False
    prefix: int = 0
    width_axis: int = -1
    smooth: bool = True
    embed_dim: int = 6
    pools: bool = True

    @property
    def depth(self) -> int:
        return len(self.grids) - 1


def timm_tower(name: str, pool: str = "", proj: str = "linear", size: tuple[int, int] = SIZE) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": list(size)}


TOWERS = {
    "vit": Tower(timm_tower("small_vit"), "blocks", [(4, 6)] * 3, prefix=1, pools=False),
    "vit_registers": Tower(timm_tower("small_vit_registers"), "blocks", [(4, 6)] * 3, prefix=4, pools=False),
    "vit_average": Tower(timm_tower("small_vit_average", "avg", "mlp"), "blocks", [(4, 6)] * 3),
    "siglip": Tower(timm_tower("small_siglip", "map", "none"), "blocks", [(4, 6)] * 3, embed_dim=16),
    "hybrid": Tower(timm_tower("small_hybrid"), "blocks", [(4, 6)] * 3, prefix=1, pools=False),
    "eva": Tower(timm_tower("small_eva"), "blocks", [(4, 6)] * 3, prefix=3),
    "naflex": Tower(timm_tower("small_naflex", "map", "none"), "blocks", [(4, 6)] * 3, embed_dim=16),
    "naflex_average": Tower(timm_tower("small_naflex_average", "avg"), "blocks", [(4, 6)] * 3, prefix=2),
    "naflex_factors": Tower(timm_tower("small_naflex_factors", "token"), "blocks", [(4, 6)] * 3, prefix=1, pools=False),
    "swin": Tower(timm_tower("small_swin", "avg"), "layers", [(8, 12), (8, 12), (4, 6)], maps=True),
    "convnext": Tower(
        timm_tower("test_convnext", size=(32, 64)),
        "stages",
        [(8, 16), (8, 16), (4, 8), (2, 4), (1, 2)],
        True,
        width_axis=1,
    ),
    "efficientnet": Tower(
        timm_tower("test_efficientnet", size=(32, 64)),
        "blocks",
        [(16, 32), (16, 32), (8, 16), (4, 8), (2, 4), (1, 2)],
        maps=True,
        width_axis=1,
        smooth=False,
    ),
}


def build(vision_cfg: dict[str, Any], folder: Path, embed_dim: int = 6) -> DualEncoder:
    path = folder / "model.json"
    text = TEXT | {"width": 16, "heads": 2, "layers": 2}
    path.write_text(json.dumps({"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text}))
    torch.manual_seed(0)
    encoder = load_dual_encoder(path)
    with torch.no_grad():
        for weight in encoder.model.visual.parameters():
            if weight.ndim > 1:  # timm's are so small that hidden states hardly differ from what enters the tower
                weight.normal_(std=weight[0].numel() ** -0.5)
    return randomised(encoder).double().eval()


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DualEncoder]:
    """Encoders in float64 that the tests of this file share, so they must not change them."""
    return cache(lambda name: build(TOWERS[name].vision_cfg, tmp_path_factory.mktemp(name), TOWERS[name].embed_dim))


def images_of(encoder: DualEncoder, count: int = 2) -> Tensor:
    height, width = encoder.image_transform.size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


def blocks_of(encoder: DualEncoder, name: str) -> Any:
    model: Any = encoder.model
    return getattr(model.visual.trunk, TOWERS[name].blocks)


def channels_second(hidden: Tensor, name: str) -> Tensor:
    """A block's own input in the form of `features_before`."""
    return hidden.permute(0, 3, 1, 2) if hidden.ndim == 4 and TOWERS[name].width_axis == -1 else hidden


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_features_are_the_input_of_the_numbered_block_and_embed_to_the_encoders_output(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder, expected = encoder_of(name), TOWERS[name]
    images, blocks, visual = images_of(encoder), blocks_of(encoder, name), encoder.model.visual
    assert_same(encoder.encode_image(images), visual(images))
    for layer, (rows, columns) in enumerate(expected.grids):
        tower = encoder.image_at_layer(layer)
        hidden = tower.features_before(images)
        assert_same(tower.embed_from(hidden), visual(images))
        assert (tower.layer, tower.grid, tower.prefix_tokens) == (layer, (rows, columns), expected.prefix)
        assert tower.count(hidden) == expected.prefix + rows * columns
        if layer == expected.depth:
            assert tower.block is None
        else:
            assert tower.block is blocks[layer]
            own = block_input(blocks[layer], lambda: visual(images))
            assert_same(hidden, channels_second(own, name))
            assert_same(tower.captured(own), hidden)


def test_layers_count_from_the_end_too_and_stop_there(encoder_of: Callable[[str], DualEncoder]) -> None:
    for name in TOWERS:
        encoder, tower = encoder_of(name), TOWERS[name]
        assert encoder.image_at_layer(-1).layer == tower.depth - 1
        assert encoder.image_at_layer(-tower.depth).layer == 0
        for layer in (len(tower.grids), -tower.depth - 1):
            with pytest.raises(ValueError, match=rf"tower has layers 0 to {tower.depth - 1} .*got layer {layer}$"):
                encoder.image_at_layer(layer)


@pytest.mark.parametrize("name", TOWERS)
def test_the_reading_layer_is_the_last_block_or_a_head_that_pools(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    tower, depth = TOWERS[name], TOWERS[name].depth
    for layer in (0, depth - 1, depth):
        assert encoder_of(name).image_at_layer(layer).reading_layer == (depth if tower.pools else depth - 1)
    reads = nullcontext() if tower.pools else pytest.raises(ValueError, match=f"take image_layer={depth - 1},")
    with reads:
        encoder_of(name).image_at_layer(depth).check_patches_read()


@pytest.mark.parametrize("name", [name for name, tower in TOWERS.items() if not tower.maps])
@torch.no_grad()
def test_the_grid_runs_from_left_to_right_and_top_to_bottom(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    tower, images = encoder.image_at_layer(0), images_of(encoder, 1)
    changed = images.clone()
    changed[:, :, 8:16, 40:48] = 0  # second row, last column
    differing = (tower.features_before(changed) != tower.features_before(images)).any(dim=2)[0]
    assert tower.on_grid(differing).nonzero().tolist() == [[1, 5]]
    assert differing.sum() == 1, "no prefix token sees the image before the first block"


@pytest.mark.parametrize("name", [name for name, tower in TOWERS.items() if tower.maps])
@torch.no_grad()
def test_feature_maps_lie_on_the_grid_as_the_image_does(name: str, encoder_of: Callable[[str], DualEncoder]) -> None:
    encoder = encoder_of(name)
    tower, images = encoder.image_at_layer(0), images_of(encoder, 1)
    height, width = images.shape[2:]
    changed = images.clone()
    changed[:, :, : height // 4, -width // 4 :] = 0
    differing = (tower.features_before(changed) != tower.features_before(images)).any(dim=1)[0]
    rows, columns = tower.grid
    flat = differing.flatten()[None]  # positions as attributions count them
    assert torch.equal(tower.on_grid(flat)[0], differing)
    where = differing.nonzero()
    assert differing[0, -1]
    assert where[:, 0].max() <= rows // 4 + 1, "convolutions see a little more than the region"
    assert where[:, 1].min() >= columns * 3 // 4 - 1


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_path_embeds_every_mixture_of_reference_and_input(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder = encoder_of(name)
    generator = torch.Generator().manual_seed(2)
    tower = encoder.image_at_layer()
    hidden = tower.features_before(images_of(encoder))
    reference = torch.randn(1, *hidden.shape[1:], generator=generator).double()
    alpha = torch.rand(2, 3, tower.count(hidden), generator=generator).double()
    embeddings = tower.path(hidden, reference)(alpha)
    for point in range(3):
        weight = alpha[:, point]
        weight = weight.reshape(2, 1, *tower.grid) if hidden.ndim == 4 else weight.unsqueeze(2)
        assert_same(embeddings[:, point], tower.embed_from(reference + weight * (hidden - reference)))


@pytest.mark.parametrize("name", [name for name, tower in TOWERS.items() if min(tower.grids[: tower.depth])[0] <= 4])
def test_attributions_agree_with_equation_10_taken_literally(
    name: str, encoder_of: Callable[[str], DualEncoder]
) -> None:
    encoder, model, tower = encoder_of(name), encoder_of(name).model, TOWERS[name]
    images, tokens = images_of(encoder, 1), encoder.tokenizer.encode(["a red dog"])
    reference = torch.zeros_like(tokens)
    reference[0, 0], reference[0, 2] = 49406, 49407
    for layer, block in enumerate(blocks_of(encoder, name)):
        if tower.grids[layer][0] > 4:
            continue  # a literal Jacobian of a larger feature map takes long
        result = FeaturePairAttribution(encoder, layer, steps=2).attribute(images, tokens)
        expected = equation_10(
            Side(model.transformer.resblocks[-1], model.encode_text, tokens, reference),
            Side(block, model.encode_image, images, torch.zeros_like(images), tower.width_axis),
            steps=2,
        )
        own, prefix = result.interactions[0].flatten(1), result.prefix[0]
        torch.testing.assert_close(own, expected[:, tower.prefix :], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(prefix, expected[:, : tower.prefix].sum(dim=1), rtol=1e-8, atol=1e-12)
        assert result.interactions.abs().max() > 1e-4


@pytest.mark.parametrize("name", TOWERS)
def test_attributions_sum_to_the_change_of_similarity(name: str, encoder_of: Callable[[str], DualEncoder]) -> None:
    encoder = encoder_of(name)
    images, tokens = images_of(encoder), encoder.tokenizer.encode(["a red dog", "cats"])
    for layer in (-1, TOWERS[name].depth) if TOWERS[name].pools else (-1,):
        attribution = FeaturePairAttribution(encoder, layer, steps=24, rule="gauss_legendre")
        result = attribution.attribute(images, tokens)
        # ReLUs and their like leave kinks, on which quadrature converges slowly.
        tolerance = 1e-9 if TOWERS[name].smooth else 1e-3
        assert result.completeness_error.abs().max() < tolerance
        assert result.image.abs().max() > 1e-4


class BrokenError(Exception):
    """Raised by a tower in the middle of its forward pass."""


@pytest.fixture
def broken(
    encoder_of: Callable[[str], DualEncoder], request: pytest.FixtureRequest
) -> Iterator[tuple[DualEncoder, TowerAtLayer]]:
    """An encoder whose last block raises, and its image tower; the test leaves it as it was."""
    encoder = encoder_of(request.param)
    tower = encoder.image_at_layer(0)  # before, since a check would already fail
    blocks = blocks_of(encoder, request.param)

    def fail(*ignored: Any) -> None:
        raise BrokenError

    handle = blocks[-1].register_forward_pre_hook(fail)
    yield encoder, tower
    handle.remove()


@pytest.mark.parametrize("broken", ["vit", "convnext", "swin"], indirect=True)
def test_hooks_and_blocks_are_as_they_were_also_after_an_exception(broken: tuple[DualEncoder, TowerAtLayer]) -> None:
    encoder, tower = broken
    trunk: Any = encoder.model.visual.trunk
    name = next(name for name in ("blocks", "stages", "layers") if hasattr(trunk, name))
    blocks, modules = getattr(trunk, name), list(encoder.modules())
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules]
    images = images_of(encoder, 1)
    hidden = tower.features_before(images)
    with pytest.raises(BrokenError):
        tower.embed_from(hidden)
    with pytest.raises(BrokenError):
        tower.path(hidden, torch.zeros_like(hidden))(torch.ones(1, 1, tower.count(hidden)).double())
    with pytest.raises(RuntimeError):
        tower.features_before(images[:, :2])
    assert getattr(trunk, name) is blocks
    assert list(encoder.modules()) == modules
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules] == hooks


def test_nothing_is_left_of_a_cut_behind_the_last_block(encoder_of: Callable[[str], DualEncoder]) -> None:
    encoder = encoder_of("convnext")
    blocks, keys = blocks_of(encoder, "convnext"), list(encoder.state_dict())
    tower = encoder.image_at_layer(4)
    tower.embed_from(tower.features_before(images_of(encoder)))
    assert blocks_of(encoder, "convnext") is blocks
    assert list(encoder.state_dict()) == keys


@pytest.mark.parametrize(
    ("vision_cfg", "message"),
    [
        (timm_tower("test_resnet", "avg", size=(32, 32)), "type ResNet is not supported: it has no list of blocks"),
        (timm_tower("small_cait", size=(32, 32)), "passes on 16 tokens at layer 1, not 1 and a grid of 4 x 4"),
        (
            timm_tower("small_levit", "avg", size=(64, 64)),
            r"Levit hands hidden states of shape \[1, 16, 16\] to its stages",
        ),
    ],
)
def test_an_unsupported_tower_still_embeds_and_says_why(
    vision_cfg: dict[str, Any], message: str, tmp_path: Path
) -> None:
    encoder = build(vision_cfg, tmp_path)
    images = images_of(encoder)
    assert_same(encoder.encode_image(images), encoder.model.visual(images))
    with pytest.raises(UnsupportedTowerError, match=message):
        encoder.image_at_layer()


@torch.no_grad()
def test_a_tower_whose_blocks_need_more_than_hidden_states_is_cut_where_none_is_left_out(tmp_path: Path) -> None:
    encoder = build(timm_tower("small_counting"), tmp_path)
    images = images_of(encoder)
    tower = encoder.image_at_layer(0)
    assert_same(tower.embed_from(tower.features_before(images)), encoder.model.visual(images))
    with pytest.raises(
        UnsupportedTowerError,
        match=r"embed_from\(features_before\(x\)\) .* at layer 1; .*that layer cannot be explained",
    ):
        encoder.image_at_layer(1)


def test_towers_that_end_in_spaces_of_different_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image tower ends in a space of width 16, but the model's embed_dim is 6"):
        build(timm_tower("small_siglip", "map", "none"), tmp_path)
    # Also where the tower is not supported.
    with pytest.raises(ValueError, match=r"image tower ends in a space of width \d+, but the model's embed_dim is 6"):
        build(timm_tower("test_resnet", "avg", "none", size=(32, 32)), tmp_path)
