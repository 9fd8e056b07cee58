from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from inputs import random_pairs
from scipy.stats import spearmanr
from torch import Tensor

from lightning_xai.attribution import (
    M2IB,
    Attribution,
    AttributionMethod,
    CentredGaussian,
    FeaturePairAttribution,
    GradCAM,
)
from lightning_xai.evaluation.sanity_check import ORIGINAL, SanityRow, cascading_randomisation, sanity_check
from lightning_xai.models import DualEncoder, load_dual_encoder

MakeEncoder = Callable[..., DualEncoder]
CONVNEXT = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    "text_cfg": TEXT,
}
TRANSFORMER = ["head", "block 2", "block 1", "block 0", "embedding"]


def state(encoder: DualEncoder) -> dict[str, Any]:
    """All that a sanity check might leave changed."""
    return {
        "weights": {key: value.clone() for key, value in encoder.state_dict().items()},
        "identities": {key: id(value) for key, value in encoder.named_parameters()},
        "requires_grad": {key: value.requires_grad for key, value in encoder.named_parameters()},
        "gradients": {key: value.grad for key, value in encoder.named_parameters()},
        "training": {key: module.training for key, module in encoder.named_modules()},
        "random": torch.get_rng_state().tolist(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in one["weights"].items():
        assert torch.equal(value, other["weights"][key]), key
    assert {k: v for k, v in one.items() if k != "weights"} == {k: v for k, v in other.items() if k != "weights"}


def changed_by(encoder: DualEncoder, randomise: Callable[[], None]) -> set[str]:
    before = {key: value.clone() for key, value in encoder.named_parameters()}
    randomise()
    return {key for key, value in encoder.named_parameters() if not torch.equal(value, before[key])}


def stage_of(name: str, depth: int) -> str | None:
    """Which stage open_clip's name of a parameter of a ViT belongs to, as a person reads it; None for no stage."""
    if "resblocks." in name:
        return f"block {name.split('resblocks.')[1].split('.')[0]}"
    if name.endswith("logit_scale"):
        return None
    embeddings = ("class_embedding", "positional_embedding", "conv1.weight", "token_embedding.weight")
    return "embedding" if name.endswith(embeddings) or "ln_pre" in name else "head"


def test_each_stage_randomises_its_own_layer_of_both_towers_and_no_other(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    expected: dict[str | None, set[str]] = {}
    for name, _ in encoder.named_parameters():
        expected.setdefault(stage_of(name, 3), set()).add(name)
    with cascading_randomisation(encoder) as stages:
        assert [stage.name for stage in stages] == TRANSFORMER
        for stage in stages:
            assert changed_by(encoder, stage.randomise) == expected[stage.name]


@pytest.mark.parametrize(("towers", "prefix"), [("image", "model.visual."), ("text", "")])
def test_one_tower_alone_leaves_the_other_as_it_is(make_encoder: MakeEncoder, towers: Any, prefix: str) -> None:
    encoder = make_encoder("vit")
    with cascading_randomisation(encoder, towers) as stages:
        changed = set().union(*(changed_by(encoder, stage.randomise) for stage in stages))
    visual = {name for name, _ in encoder.named_parameters() if name.startswith("model.visual.")}
    rest = {name for name, _ in encoder.named_parameters()} - visual - {"model.logit_scale"}
    assert changed == (visual if towers == "image" else rest)


def test_a_shorter_tower_is_done_earlier_and_a_resnets_stages_are_counted_as_open_clip_does(
    make_encoder: MakeEncoder,
) -> None:
    encoder = make_encoder("resnet")
    with cascading_randomisation(encoder) as stages:
        assert [stage.name for stage in stages] == [
            "head",
            "image block 4, text block 2",
            "image block 3, text block 1",
            "image block 2, text block 0",
            "image block 1, text embedding",
            "image embedding",
        ]
        assert changed_by(encoder, stages[0].randomise) >= {
            "model.visual.attnpool.q_proj.weight",
            "model.ln_final.bias",
        }
        assert "model.visual.layer4.0.conv1.weight" in changed_by(encoder, stages[1].randomise)
        assert "model.visual.conv1.weight" in changed_by(encoder, stages[5].randomise)


def test_random_weights_have_the_spread_of_an_initialisation_and_depend_on_the_seed(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    model: Any = encoder.model
    original = model.visual.proj.detach().clone()

    def randomised(seed: int) -> dict[str, Tensor]:
        with cascading_randomisation(encoder, seed=seed) as stages:
            for stage in stages:
                stage.randomise()
            return {key: value.clone() for key, value in encoder.state_dict().items()}

    first, again, other = randomised(0), randomised(0), randomised(1)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["model.visual.proj"], other["model.visual.proj"])
    torch.testing.assert_close(first["model.visual.proj"].std(), original.std(), rtol=0.2, atol=0)
    # Layer norms reset to ones and zeros; their learned values are gone.
    assert torch.equal(first["model.visual.ln_post.weight"], torch.ones(32))
    assert not first["model.visual.ln_post.bias"].any()
    # Two blocks are not made alike.
    blocks = [first[f"model.visual.transformer.resblocks.{i}.mlp.c_fc.weight"] for i in range(2)]
    assert not torch.equal(*blocks)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_as_before_afterwards_also_after_an_exception(
    make_encoder: MakeEncoder, name: str, failing: bool
) -> None:
    encoder = make_encoder(name).train()
    model: Any = encoder.model
    model.visual.eval()
    model.visual.conv1.weight.requires_grad_(False)
    images, tokens = random_pairs(encoder)

    class Failing(GradCAM):
        calls = 0

        def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
            self.calls += 1
            if failing and self.calls == 4:
                assert not torch.equal(encoder.state_dict()["model.visual.conv1.weight"], before["weights"]["x"])
                raise KeyboardInterrupt
            return super()._attribute(images, tokens)

    before = state(encoder)
    before["weights"]["x"] = torch.zeros(())
    methods: dict[str, AttributionMethod] = {"grad_cam": Failing(encoder)}
    if failing:
        with pytest.raises(KeyboardInterrupt):
            sanity_check(methods, images, tokens)
    else:
        sanity_check(methods, images, tokens)
    del before["weights"]["x"]
    assert_same_state(before, state(encoder))


def test_methods_that_explain_the_model_change_and_a_centred_gaussian_does_not(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    images, tokens = random_pairs(encoder)
    methods = {
        "feature_pair": FeaturePairAttribution(encoder, steps=3),
        "grad_cam": GradCAM(encoder),
        "m2ib": M2IB(encoder, steps=3, samples=2),
        "gaussian": CentredGaussian(encoder),
    }
    result = sanity_check(methods, images, tokens)
    assert result.stages == [ORIGINAL, *TRANSFORMER]
    assert [(row.stage, row.method, row.modality) for row in result.rows] == [
        (stage, method, modality) for stage in TRANSFORMER for method in methods for modality in ("image", "text")
    ]
    pictures = {(row.method, row.stage): row for row in result.rows if row.modality == "image"}
    for stage in TRANSFORMER:
        assert pictures["gaussian", stage].spearman == 1.0
        assert pictures["gaussian", stage].ssim == pytest.approx(1.0)
    for method in ("feature_pair", "grad_cam", "m2ib"):
        assert abs(pictures[method, "embedding"].spearman) < 0.6
        assert pictures[method, "embedding"].ssim < 0.6
        assert pictures[method, "head"].pairs == 3


def test_rows_are_means_over_pairs_of_the_maps_that_are_given_back(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    method = FeaturePairAttribution(encoder, steps=2)
    result = sanity_check({"m": method}, images, tokens, seed=3)
    (original, *later) = result.maps["m"]
    torch.testing.assert_close(original.image, method.attribute(images, tokens).image)
    own = encoder.tokenizer.content_mask(tokens)
    for number, (stage, given) in enumerate(zip(result.stages[1:], later, strict=True)):
        picture, text = result.rows[2 * number : 2 * number + 2]
        assert (picture.stage, picture.modality, text.stage, text.modality) == (stage, "image", stage, "text")
        ranks = [
            spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(original.image, given.image, strict=True)
        ]
        assert picture.spearman == pytest.approx(sum(ranks) / 3)
        words = zip(original.text, given.text, own, strict=True)
        assert text.spearman == pytest.approx(sum(spearmanr(a[o], b[o]).statistic for a, b, o in words) / 3)
        assert math.isnan(text.ssim)
        assert picture.pairs == text.pairs == 3


def test_batches_change_nothing_and_progress_is_reported(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    told: list[tuple[int, int]] = []
    methods = {"grad_cam": GradCAM(encoder, internal_batch_size=2), "gaussian": CentredGaussian(encoder)}
    whole = sanity_check(methods, images, tokens, on_progress=lambda *numbers: told.append(numbers))
    assert told == [(done, 12) for done in range(1, 13)]
    parts = sanity_check(methods, images, tokens, batch_size=1)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one.spearman == pytest.approx(other.spearman, nan_ok=True)
        assert one.ssim == pytest.approx(other.ssim, nan_ok=True)


class Constant(AttributionMethod):
    """Maps without a pattern for the first pair, and the same for all others."""

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        image = torch.arange(16.0).reshape(1, 4, 4).repeat(len(images), 1, 1)
        image[0] = 1.0
        return Attribution(image, torch.ones(tokens.shape), self.encoder.own_similarity(images, tokens))


@pytest.mark.filterwarnings("error")
def test_constant_maps_are_counted_and_never_compared(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("vit")
    rows = sanity_check({"c": Constant(encoder)}, *random_pairs(encoder)).rows
    assert {(row.modality, row.pairs, row.constant) for row in rows} == {("image", 2, 1), ("text", 0, 3)}
    assert all(row.spearman == 1.0 for row in rows if row.modality == "image")
    assert all(math.isnan(row.spearman) for row in rows if row.modality == "text")


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_every_kind_of_tower_can_be_checked(make_encoder: MakeEncoder, name: str, tmp_path: Path) -> None:
    if name == "convnext":
        (tmp_path / "model.json").write_text(json.dumps(CONVNEXT))
        torch.manual_seed(0)
        encoder = load_dual_encoder(tmp_path / "model.json").eval()
    else:
        encoder = make_encoder(name)
    images, tokens = random_pairs(encoder)
    result = sanity_check({"grad_cam": GradCAM(encoder)}, images, tokens)
    last: SanityRow = result.rows[-2]
    assert "embedding" in last.stage
    assert last.pairs + last.constant == 3
    with cascading_randomisation(encoder) as stages:
        changed = set().union(*(changed_by(encoder, stage.randomise) for stage in stages))
    weights = {name for name, parameter in encoder.named_parameters() if parameter.ndim > 1}
    assert changed >= weights, "every matrix is random in the end"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(make_encoder: MakeEncoder, mode: Callable[[], Any]) -> None:
    encoder = make_encoder("vit", torch.float64)
    images, tokens = random_pairs(encoder)
    expected = sanity_check({"grad_cam": GradCAM(encoder)}, images, tokens).rows
    before = state(encoder)
    with mode():
        inside = sanity_check({"grad_cam": GradCAM(encoder)}, images, tokens).rows
    assert_same_state(before, state(encoder))
    assert [row.spearman for row in inside] == pytest.approx([row.spearman for row in expected], nan_ok=True)


def test_wrong_settings_are_errors_in_words(make_encoder: MakeEncoder) -> None:
    encoder, other = make_encoder("vit"), make_encoder("vit")
    images, tokens = random_pairs(encoder)
    gaussian = CentredGaussian(encoder)
    wrong: Any = "audio"
    with pytest.raises(ValueError, match="towers is 'both', 'image' or 'text'; got 'audio'"):
        sanity_check({"g": gaussian}, images, tokens, towers=wrong)
    with pytest.raises(ValueError, match="2 methods of 2 encoders"):
        sanity_check({"g": gaussian, "h": CentredGaussian(other)}, images, tokens)
    with pytest.raises(ValueError, match="0 methods of 0 encoders"):
        sanity_check({}, images, tokens)
    with pytest.raises(ValueError, match="batch_size has to be at least 1; got 0"):
        sanity_check({"g": gaussian}, images, tokens, batch_size=0)
    with pytest.raises(ValueError, match="one caption an image"):
        sanity_check({"g": gaussian}, images, tokens[:2])
