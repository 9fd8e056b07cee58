"""Every package lists its public names, and what plug-ins need is among them."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest

import lightning_xai
from lightning_xai.attribution import METHODS
from lightning_xai.metrics import METRICS

PACKAGES = [
    "lightning_xai",
    *(module.name for module in pkgutil.walk_packages(lightning_xai.__path__, "lightning_xai.") if module.ispkg),
]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_lists_its_public_names_and_has_them(name: str) -> None:
    package = import_module(name)
    listed = package.__all__
    assert len(set(listed)) == len(listed)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert [public for public in listed if public not in modules and not hasattr(package, public)] == []


def test_what_a_method_of_another_package_needs_is_public() -> None:
    package = import_module("lightning_xai.attribution")
    assert {"METHODS", "Attribution", "AttributionMethod", "PairwiseMethod"} <= set(package.__all__)
    assert all(issubclass(method, package.AttributionMethod) for method in METHODS.values())


def test_metrics_are_in_modules_of_their_names_and_the_kinds_of_targets_are_public() -> None:
    package = import_module("lightning_xai.metrics")
    targets = {"CaptionTargets", "NegativeTargets", "PhrasePairTargets", "PhraseTargets"}
    assert {*targets, "METRICS", "MetricSpec"} <= set(package.__all__)
    assert [name for name, spec in METRICS.items() if spec.name != name] == []
