from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import random_pairs

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.attribution.method_options import at_layers, choose_method
from lightning_xai.attribution.presets import PRESETS
from lightning_xai.models import DualEncoder
from lightning_xai.models.at_layer import UnsupportedTowerError
from lightning_xai.training import GroundingCallback

MakeEncoder = Callable[..., DualEncoder]


@pytest.mark.parametrize(
    ("name", "preset", "image_layer", "text_layer"),
    [
        ("vit", "paper", 2, 2),
        ("vit", "fast", 2, 2),
        ("vit", "inputs", 0, 0),
        ("vit_average_pool", "paper", 1, 2),
        ("vit_average_pool", "fast", 2, 2),
        ("resnet", "paper", 4, 2),
        ("resnet", "fast", 5, 2),
    ],
)
def test_a_preset_is_its_layers_rule_and_steps_given_by_hand(
    make_encoder: MakeEncoder, name: str, preset: Any, image_layer: int, text_layer: int
) -> None:
    encoder = make_encoder(name, torch.float64)
    images, tokens = random_pairs(encoder)
    chosen = PRESETS[preset]
    by_hand = FeaturePairAttribution(encoder, image_layer, text_layer, chosen.steps, rule=chosen.rule)
    method = FeaturePairAttribution(encoder, preset=preset)
    assert (method.image.layer, method.text.layer) == (image_layer, text_layer)
    result, expected = (each.attribute(images, tokens) for each in (method, by_hand))
    assert torch.equal(result.interactions, expected.interactions)
    assert torch.equal(result.completeness_error, expected.completeness_error)


def test_the_papers_preset_is_the_papers() -> None:
    assert (PRESETS["paper"].rule, PRESETS["paper"].steps) == ("right", 10)


def test_options_that_are_given_win_over_the_presets_and_all_are_recorded(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("resnet")
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"preset": "paper"}, {"image_layer": -1, "text_layer": -1, "rule": "right", "steps": 10}),
        ({"preset": "fast"}, {"image_layer": 5, "text_layer": -1, "rule": "midpoint", "steps": 5}),
        (
            {"preset": "fast", "steps": 7, "image_layer": 2},
            {"image_layer": 2, "text_layer": -1, "rule": "midpoint", "steps": 7},
        ),
    ]
    for given, used in cases:
        chosen = choose_method(encoder, "feature_pair", given)
        assert chosen.options.items() >= (used | {"preset": given["preset"]}).items()
        assert isinstance(chosen.method, FeaturePairAttribution)
        assert len(chosen.method._points) == used["steps"]
    cam = choose_method(encoder, "similarity_grad_cam", {})
    assert cam.options == {"image_layer": None, "text_layer": None, "internal_batch_size": None}


def test_explain_reads_the_inputs_as_exactly_with_any_preset(make_encoder: MakeEncoder) -> None:
    for preset in ("paper", "fast"):
        given = {"preset": preset}
        inputs, last = at_layers(
            choose_method(make_encoder("vit_average_pool"), "feature_pair", given), given, at_inputs=True
        )
        assert inputs.options.items() >= {"preset": "inputs", "rule": "midpoint", "steps": 10}.items()
        assert inputs.layers == (0, 0)
        assert last.where == ("last blocks (1, 2)" if preset == "paper" else "reading layers (2, 2)")
    given = {"preset": "inputs"}
    (only,) = at_layers(choose_method(make_encoder(), "feature_pair", given), given, at_inputs=True)
    assert only.layers == (0, 0)


def test_a_preset_that_does_not_exist_or_that_a_tower_cannot_have_is_an_error_that_names_others(
    make_encoder: MakeEncoder,
) -> None:
    unknown: Any = "papers"
    with pytest.raises(ValueError, match="unknown preset 'papers'; there are paper, fast, inputs"):
        FeaturePairAttribution(make_encoder(), preset=unknown)
    with pytest.raises(ValueError, match="unknown preset 'papers'"):
        GroundingCallback(preset=unknown)
    with pytest.raises(UnsupportedTowerError, match="layers begin with 1: take the preset 'paper' or 'fast'"):
        FeaturePairAttribution(make_encoder("resnet"), preset="inputs")
