"""NaFlex towers of timm, which take images of any size; their layers are tested among those of `test_block_list`."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TEXT, randomised
from equation_10 import assert_same
from torch import Tensor

from lightning_xai.attribution import METHODS, FeaturePairAttribution
from lightning_xai.models import DualEncoder, load_dual_encoder, save_open_clip

PATCH, SIZE = 16, (64, 96)
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "pos_embed_grid_size": (5, 5)}
VISION = {
    "timm_model_name": "naflexvit_base_patch16_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": [*SIZE],
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm make its towers small."""
    create: Any = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **{**options, **SMALL}))


def config(folder: Path, **vision: Any) -> Path:
    path = folder / "naflex.json"
    text = TEXT | {"width": 16, "heads": 2, "layers": 2}
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION | vision, "text_cfg": text}))
    return path


@cache
def images_of(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height)).double()


def in_patches(encoder: DualEncoder, images: Tensor, padding: int) -> Tensor:
    """Embeddings by the tower's other way: a sequence of patches with their places, and padding at the end."""
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, 3, rows, columns, y, x]
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(len(images), rows * columns, -1)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    batch = {
        "patches": torch.nn.functional.pad(patches, (0, 0, 0, padding), value=9.0),
        "patch_coord": torch.nn.functional.pad(places, (0, 0, 0, padding)).expand(len(images), -1, -1),
        "patch_valid": (torch.arange(rows * columns + padding) < rows * columns).expand(len(images), -1),
    }
    visual: Any = encoder.model.visual
    embedding: Tensor = visual.head(visual.trunk(batch))
    return embedding


@pytest.mark.parametrize("size", [SIZE, (32, 128), (80, 80)])
@torch.no_grad()
def test_weights_embed_and_are_explained_on_the_grid_of_any_size_of_images(
    size: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trained = randomised(load_dual_encoder(config(tmp_path)))
    save_open_clip(trained, tmp_path / "trained.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is interpolated but what the tower itself does
        warnings.filterwarnings("ignore", "neither")
        loaded = load_dual_encoder(tmp_path / "naflex.json", tmp_path / "trained.safetensors", image_size=size)
    encoder = loaded.double().eval()
    grid = (size[0] // PATCH, size[1] // PATCH)
    assert (encoder.image_shape, encoder.image_at_layer(0).grid) == ((3, *size), grid)
    images, tokens = images_of(*size), encoder.tokenizer.encode(["a red dog", "cats"])
    assert_same(encoder.encode_image(images), in_patches(trained.double().eval(), images, padding=3))
    result = FeaturePairAttribution(encoder, 0, steps=48, rule="gauss_legendre").attribute(images, tokens)
    assert result.image.shape == (2, *grid)
    assert result.image.abs().max() > 1e-4
    assert result.completeness_error.abs().max() < 1e-8


def test_every_method_explains_it_without_batch_or_order_mattering(tmp_path: Path) -> None:
    encoder = randomised(load_dual_encoder(config(tmp_path))).double().eval()
    images, tokens = images_of(*SIZE), encoder.tokenizer.encode(["a red dog", "cats"])
    options: dict[str, dict[str, Any]] = {"kernel_shap": {"image_samples": 32}, "rise": {"image_masks": 8}}
    for name, method in METHODS.items():
        made: Any = method
        whole = made(encoder, **options.get(name, {})).attribute(images, tokens)
        alone = made(encoder, **options.get(name, {})).attribute(images[1:], tokens[1:])
        assert whole.image.shape == (2, 4, 6)
        torch.testing.assert_close(alone.image[0], whole.image[1], rtol=1e-6, atol=1e-9)


def test_images_that_are_no_whole_number_of_patches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size has to be a multiple of the patches' \(16, 16\); got \(64, 90\)"):
        load_dual_encoder(config(tmp_path, image_size=[64, 90]))
    with pytest.raises(ValueError, match=r"multiple of the patches' \(16, 16\); got \(50, 50\)"):
        load_dual_encoder(config(tmp_path), image_size=50)
