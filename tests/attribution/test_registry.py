"""METHODS: every built-in method keeps the contract that plug-ins are held to, and each rule refuses what breaks it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_xai.registry
from lightning_xai.attribution import METHODS, Attribution, AttributionMethod, InteractionAttribution, PairwiseMethod
from lightning_xai.attribution.method_options import check_method, choose_method
from lightning_xai.attribution.registry import check_method_class
from lightning_xai.models import DualEncoder
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.registry import PluginError, Registry

MakeEncoder = Callable[..., DualEncoder]
PLUGIN = "plug-in an unknown package, entry 'extra' of lightning_xai.methods"


class Flat(AttributionMethod):
    """A plug-in whose image map is the average of the image's channels over each patch."""

    signed = True

    def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
        maps = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), self.grid)
        return Attribution(maps, tokens.to(images), self.encoder.own_similarity(images, tokens))


class Pairs(PairwiseMethod):
    """A plug-in that implements no more than it has to."""

    signed = True

    def _attribute(self, images: Tensor, tokens: Tensor) -> InteractionAttribution:
        maps = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), self.grid)
        interactions = tokens.to(images)[:, :, None, None] * maps[:, None]
        return InteractionAttribution(
            image=interactions.sum(dim=1),
            text=interactions.sum(dim=(2, 3)),
            similarity=self.encoder.own_similarity(images, tokens),
            interactions=interactions,
            prefix=tokens.to(images),
        )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Registry[type[AttributionMethod]]]:
    """Make a class the entry point `extra`, as an installed package would, in a registry of its own."""

    def add(entry: Any) -> Registry[type[AttributionMethod]]:
        module = ModuleType("extra_methods")
        monkeypatch.setattr(module, "Entry", entry, raising=False)
        monkeypatch.setitem(sys.modules, "extra_methods", module)
        point = EntryPoint("extra", "extra_methods:Entry", "lightning_xai.methods")
        monkeypatch.setattr(lightning_xai.registry, "entry_points", lambda group: [point])
        registry: Registry[type[AttributionMethod]] = Registry(
            METHODS.kind, METHODS._builtin, METHODS.group, METHODS._check
        )
        for module_name in ("registry", "method_options"):
            monkeypatch.setattr(f"lightning_xai.attribution.{module_name}.METHODS", registry)
        return registry

    return add


def inputs(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    return torch.randn(2, *encoder.image_shape), encoder.tokenizer.encode(["a dog", "two cats"])


def test_every_built_in_method_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in METHODS:
        monkeypatch.setattr(METHODS[name], "origin", "")
        check_method_class(name, METHODS[name])


def test_a_plug_in_is_chosen_by_its_name_with_its_options(install: Any, make_encoder: MakeEncoder) -> None:
    class Extra(Flat):
        pass

    install(Extra)
    encoder = make_encoder()
    chosen = choose_method(encoder, "extra", {"internal_batch_size": 2})
    assert chosen.options == {"internal_batch_size": 2}
    assert chosen.method.attribute(*inputs(encoder)).image.shape == (2, 4, 4)
    with pytest.raises(ValueError, match=r"--span needs a method with token-patch attributions.*got --method extra"):
        check_method("extra", pairwise="--span")


def test_a_pairwise_plug_in_explains_phrases_with_nothing_but_interactions(
    install: Any, make_encoder: MakeEncoder
) -> None:
    class Extra(Pairs):
        pass

    install(Extra)
    encoder = make_encoder()
    check_method("extra", pairwise="--span")
    with pytest.raises(ValueError, match="--other-image needs a method that compares two images or two captions"):
        check_method("extra", intra_modal="--other-image")
    method, (images, tokens) = Extra(encoder, internal_batch_size=1), inputs(encoder)
    span = torch.zeros_like(tokens, dtype=torch.bool)
    span[:, 1:3] = True
    expected = method.attribute(images, tokens).interactions[:, 1:3].sum(dim=1)
    torch.testing.assert_close(method.span_map(images, tokens, span), expected)
    with method.capturing() as captured:
        encoder(images, tokens)
    states, rows = method.hidden_states(images, tokens, captured), torch.tensor([1, 0])
    one = method.span_maps_of(states, rows[:1], rows[1:], span[:1], method.references())
    torch.testing.assert_close(one, method.span_map(images[1:], tokens[:1], span[:1]))
    assert method.span_maps_of(states, rows[:0], rows[:0], span[:0], method.references()).shape == (0, 4, 4)
    with pytest.raises(ValueError, match=r"rows \[1\] of span_mask select no token"):
        method.span_map(images, tokens, span & torch.tensor([[True], [False]]))
    with pytest.raises(NotImplementedError, match=r"^Extra \(plug-in .*\) does not compare two images"):
        method.attribute_images(images, images)


class Positional(Flat):
    def __init__(self, encoder: TwoTowerEncoder, *radii: float) -> None:
        super().__init__(encoder)


class Required(Flat):
    def __init__(self, encoder: TwoTowerEncoder, *, radius: float) -> None:
        super().__init__(encoder)


class EncoderLast(Flat):
    def __init__(self, radius: float, encoder: TwoTowerEncoder) -> None:
        super().__init__(encoder)


class Seeded(Flat):
    def __init__(self, encoder: TwoTowerEncoder, *, seed: int = 0) -> None:
        super().__init__(encoder)


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (dict, "a method is a subclass of lightning_xai.attribution.AttributionMethod; got <class 'dict'>"),
        (AttributionMethod, "a method implements _attribute"),
        (type("Own", (Flat,), {"attribute": lambda *_: None}), "`attribute` checks what it returns"),
        (type("Odd", (Flat,), {"signed": "yes"}), "the flag `signed` is True or False; got 'yes'"),
        (type("Bare", (Flat,), {"pairwise": True}), "`pairwise` where it derives from .*PairwiseMethod"),
        (type("Both", (Pairs,), {"intra_modal": True}), "implements attribute_images and attribute_texts"),
        (type("Alone", (Flat,), {"compares_images": True}), "`compares_images` implements attribute_images"),
        (Positional, "the constructor takes its options by name; radii cannot"),
        (Required, "every option has a default; radius has none"),
        (EncoderLast, "the constructor takes `encoder` first"),
        (Seeded, "`stochastic` where its constructor has an option `seed`"),
        (type("Unseeded", (Flat,), {"stochastic": True}), "`stochastic` where its constructor has an option `seed`"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_plug_in_that_breaks_a_rule_is_refused_by_package_entry_and_rule(
    install: Any, entry: type, rule: str
) -> None:
    methods = install(entry)
    with pytest.raises(PluginError, match=f"^{PLUGIN}: .*{rule}"):
        methods["extra"]
    assert METHODS["rise"] is methods["rise"], "other methods work"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"image": torch.zeros(2, 16)}, r"`image` of an attribution has to be a tensor \[2, 4, 4\]; got \[2, 16\]"),
        ({"text": torch.zeros(2, 5)}, r"`text` .* \[2, 16\]; got \[2, 5\]"),
        ({"similarity": 0.5}, r"`similarity` .* \[2\]; got float"),
        ({"completeness_error": torch.zeros(())}, r"`completeness_error` .* \[2\]; got \[\]"),
        ({"interactions": torch.zeros(2, 16, 4)}, r"`interactions` .* \[2, 16, 4, 4\]; got \[2, 16, 4\]"),
        (None, "`_attribute` has to return an Attribution; got a NoneType"),
    ],
)
def test_a_result_of_another_shape_is_refused_by_package_entry_and_rule(
    install: Any, make_encoder: MakeEncoder, changes: dict[str, Any] | None, rule: str
) -> None:
    class Broken(Flat):
        def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
            result: Any = super()._attribute(images, tokens)
            return result if changes is None else Attribution(**{**vars(result), **changes})

    if changes is None:
        Broken._attribute = lambda *_: None  # type: ignore[method-assign,assignment]
    install(Broken)
    encoder = make_encoder()
    method = choose_method(encoder, "extra", {}).method
    with pytest.raises(PluginError, match=rf"^Broken \({PLUGIN}\): {rule}"):
        method.attribute(*inputs(encoder))


def test_a_pairwise_result_without_interactions_is_refused(make_encoder: MakeEncoder) -> None:
    class Broken(Pairs):
        def _attribute(self, images: Tensor, tokens: Tensor) -> InteractionAttribution:
            return Flat._attribute(self, images, tokens)  # type: ignore[arg-type,return-value]

    encoder = make_encoder()
    with pytest.raises(PluginError, match=r"^Broken: `_attribute` has to return an InteractionAttribution; got a Attr"):
        Broken(encoder).attribute(*inputs(encoder))


def test_a_name_that_options_cannot_spell_is_refused() -> None:
    cases: list[str] = ["all", "my.method", "two words"]
    for name in cases:
        with pytest.raises(ValueError, match="a method's name consists of letters, digits and underscores"):
            check_method_class(name, Flat)


def test_a_plug_in_whose_maps_are_negative_has_to_state_its_sign(install: Any, make_encoder: MakeEncoder) -> None:
    class Unsigned(Flat):
        signed = False

        def _attribute(self, images: Tensor, tokens: Tensor) -> Attribution:
            found = super()._attribute(images, tokens)
            return dataclasses.replace(found, image=-found.image.abs())

    encoder = make_encoder("vit")
    method = install(Unsigned)["extra"](encoder)
    with pytest.raises(PluginError, match=r"entry 'extra' .* negative values; state `signed = True`"):
        method.attribute(*inputs(encoder))
