"""What attributions at the inputs of both towers cost, in floating-point operations of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encoder_from
from inputs import random_pairs
from torch.utils.flop_counter import FlopCounterMode

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.models import DualEncoder
from lightning_xai.models.at_layer import TowerAtLayer, differentiable

CAPTION = "a red ring and a blue star"
POINTS = 3
VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "siglips_text": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}
# The derivative of attention, of which both factors move, is twice the attention: a few per cent at these widths.
MARGIN = 1.08


def operations(encoder: DualEncoder, run: Callable[[], object]) -> int:
    with differentiable(encoder), FlopCounterMode(display=False) as counter:
        run()
    total: int = counter.get_total_flops()
    return total


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DualEncoder, FeaturePairAttribution, Any, Any]:
    encoder = encoder_from(MODELS[request.param], tmp_path, torch.float64).requires_grad_(False)
    images, tokens = random_pairs(encoder, [CAPTION])
    return encoder, FeaturePairAttribution(encoder, 0, 0, POINTS, rule="midpoint"), images, tokens


def passes(case: tuple[DualEncoder, FeaturePairAttribution, Any, Any]) -> tuple[int, int]:
    """Operations of each tower from the inputs on: of the image, and of the tokens of the caption that are run."""
    encoder, method, images, tokens = case
    towers: list[tuple[TowerAtLayer, Any]] = [(method.image, images), (method.text, tokens)]
    found = []
    for tower, inputs in towers:
        hidden = tower.features_before(inputs)
        found.append(operations(encoder, lambda at=tower, x=hidden, y=inputs: at.embed_from(x, y)))  # type: ignore[misc]
    return found[0], found[1]


def test_a_phrase_costs_two_passes_a_point_and_one_for_the_norm(case: Any) -> None:
    encoder, method, images, tokens = case
    states, references = method.hidden_states(images, tokens), method.references()
    span, row = torch.zeros_like(tokens, dtype=torch.bool), torch.arange(1)
    span[:, 2:4] = True
    counted = operations(encoder, lambda: method.span_maps_of(states, row, row, span, references))
    assert counted <= MARGIN * (2 * POINTS + 1) * sum(passes(case))


def test_a_phrase_after_the_models_own_pass_of_the_image_runs_its_tower_at_the_points_alone(case: Any) -> None:
    encoder, method, images, tokens = case
    references, row = method.references(), torch.arange(1)
    span = torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 2:4] = True
    with method.capturing() as captured, torch.no_grad():
        encoder.encode_image(images)
    states, alone = method.hidden_states(images, tokens, captured), method.hidden_states(images, tokens)
    counted = operations(encoder, lambda: method.span_maps_of(states, row, row, span, references))
    image, text = passes(case)
    assert counted <= MARGIN * (2 * POINTS * (image + text) + text)
    maps = method.span_maps_of(states, row, row, span, references)
    torch.testing.assert_close(maps, method.span_maps_of(alone, row, row, span, references), rtol=1e-12, atol=1e-15)


def test_full_interactions_cost_a_pass_a_point_for_each_token_that_differs_from_the_reference(case: Any) -> None:
    encoder, method, images, tokens = case
    states, references = method.hidden_states(images, tokens), method.references()
    moving = int((states.text != references.text[:, : states.text.shape[1]]).any(dim=2).sum())
    assert moving == len(CAPTION.split()) + 1  # and the token that ends the caption
    counted = operations(encoder, lambda: method.attribute_states(states, references))
    # The points and each token's derivative at them, and the embeddings of input and reference.
    assert counted <= MARGIN * (POINTS * (1 + moving) + 2) * sum(passes(case))


def test_tokens_that_are_the_references_own_have_no_part_and_the_others_all_of_it(case: Any) -> None:
    _, method, images, tokens = case
    result = method.attribute(images, tokens)
    assert not result.interactions[:, 0].any()
    assert not result.interactions[:, len(CAPTION.split()) + 2 :].any()
    whole = method.span_map(images, tokens, method.text.visible(tokens))
    torch.testing.assert_close(result.interactions.sum(dim=1), whole, rtol=1e-10, atol=1e-14)
    assert whole.abs().max() > 1e-4
