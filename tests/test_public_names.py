"""Every package lists its public names, and everything that is registered is among them."""

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


def test_methods_and_their_base_are_public() -> None:
    package = import_module("lightning_xai.attribution")
    classes = {method.__name__ for method in METHODS.values() if method.__module__.startswith("lightning_xai.")}
    assert {*classes, "METHODS", "Attribution", "AttributionMethod"} <= set(package.__all__)


def test_metrics_are_in_modules_of_their_names_and_the_kinds_of_targets_are_public() -> None:
    package = import_module("lightning_xai.metrics")
    targets = {"CaptionTargets", "NegativeTargets", "PhrasePairTargets", "PhraseTargets"}
    assert {*targets, "METRICS", "MetricSpec"} <= set(package.__all__)
    assert [name for name, spec in METRICS.items() if spec.name != name] == []
