"""What feature-pair attribution costs on each kind of tower, in multiplications and calls of blocks, never in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from small_timm import register
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.models import DualEncoder, load_dual_encoder

VIT: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4}
CAPTION = "a brown dog is lying on a red mat"
TEXT_CFG = TEXT | {"context_length": 77, "width": 64, "heads": 4, "layers": 6}
SEES_PADDING = TEXT_CFG | {"no_causal_mask": True}


_Mode: Any = TorchDispatchMode


class Multiplications(_Mode):  # type: ignore[misc]
    """Counts by PyTorch's formulas; its own counter also follows modules, which fails within forward derivatives."""

    total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def multiplications(run: Callable[[], object]) -> int:
    counted = Multiplications()
    with counted:
        run()
    return int(counted.total)


register(
    {
        "cost_siglip": partial(VisionTransformer, **VIT, class_token=False, global_pool="map"),
        "cost_perception": partial(Eva, **VIT, use_rot_pos_emb=True, attn_pool_num_heads=4, global_pool="map"),
    }
)


def timm(name: str, pool: str, proj: str | None, size: int = 64) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}


OWN = {"image_size": 64, "layers": 6, "width": 64, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 2, 2, 1], "width": 16, "head_width": 64}
# Image tower, text tower, and how many forward passes of a pair a span map and full interactions may cost.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], float, float]] = {
    "own": (OWN, TEXT_CFG, 0.08, 0.2),
    "siglip": (timm("cost_siglip", "map", "none"), SEES_PADDING | {"pool_type": "last"}, 0.09, 0.28),
    "perception_encoder": (timm("cost_perception", "map", "linear"), TEXT_CFG, 0.05, 0.2),
    "fastvit": (timm("fastvit_t8", "avg", None, 96), SEES_PADDING, 0.15, 0.28),
    "resnet": (RESNET, TEXT_CFG, 0.27, 1.4),
    "convnext": (timm("convnext_atto", "", "linear", 64), TEXT_CFG, 0.04, 0.1),
}


def build(name: str, folder: Path) -> DualEncoder:
    vision, text, _, _ = KINDS[name]
    path = folder / "model.json"
    config = {"embed_dim": 64, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    return load_dual_encoder(path).eval()


@pytest.mark.parametrize("name", KINDS)
def test_the_fast_preset_costs_a_part_of_a_forward_pass_and_calls_no_block_again(name: str, tmp_path: Path) -> None:
    encoder = build(name, tmp_path)
    images, tokens = torch.randn(1, *encoder.image_shape), encoder.tokenizer.encode([CAPTION])
    method = FeaturePairAttribution(encoder, preset="fast")
    states, references = method.hidden_states(images, tokens), method.references(tokens.shape[1])
    row, span = torch.zeros(1, dtype=torch.int64), torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 2:4] = True
    calls = []
    for tower in (method.image, method.text):
        tower.last_block.register_forward_hook(lambda *_: calls.append(1))
    model: Any = encoder.model
    forward = multiplications(lambda: (model.encode_image(images), model.encode_text(tokens)))
    assert len(calls) == 2
    _, _, most_span, most_full = KINDS[name]
    cost = multiplications(lambda: method.span_maps_of(states, row, row, span, references)) / forward
    full = multiplications(lambda: method.attribute_states(states, references)) / forward
    assert len(calls) == 2, "paths read weights, and call no block"
    assert 0 < cost < most_span
    assert cost < full < most_full


def test_attributing_a_pair_runs_each_tower_once(tmp_path: Path) -> None:
    encoder = build("siglip", tmp_path)
    images, tokens = torch.randn(2, *encoder.image_shape), encoder.tokenizer.encode([CAPTION] * 2)
    inputs: list[int] = []

    def count(_: nn.Module, given: tuple[Tensor, ...], *__: object) -> None:
        inputs.append(len(given[0]))

    model: Any = encoder.model
    for block in (model.visual.trunk.blocks[0], model.text.transformer.resblocks[0]):
        block.register_forward_pre_hook(count)
    method = FeaturePairAttribution(encoder, preset="fast")
    inputs.clear()  # of what checks the towers
    method.attribute(images, tokens)
    assert sorted(inputs) == [1, 1, 2, 2], "the pass of the pairs, and that of the two references"
