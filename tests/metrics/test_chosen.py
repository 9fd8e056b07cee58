"""Metrics by name: their options, and what happens where one breaks the contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics import METRICS, PhraseTargets
from lightning_xai.metrics.base import check_spec, no_targets
from lightning_xai.metrics.chosen import ChosenMetric, choose_metric, choose_metrics
from lightning_xai.metrics.grounding import SPEC
from lightning_xai.registry import PluginError
from lightning_xai.results.record import Score

WORD: Any = "word"


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_keeps_the_contract_and_takes_no_targets_at_all(name: str) -> None:
    check_spec(name, METRICS[name])
    chosen = choose_metric(name, {})
    assert chosen.measure(no_targets(chosen.spec.kind)) == {value: [] for value in chosen.spec.values}
    assert {score.value for score in chosen.spec.scores} <= set(chosen.spec.values)


def test_options_are_those_of_the_signature_with_their_defaults() -> None:
    assert choose_metric("grounding", {}).options == {}
    assert choose_metric("confidence", {"keep_pixels": 0.25}).options == {
        "keep_tokens": 0.5,
        "keep_pixels": 0.25,
        "hidden_image": "zeros",
    }


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["nonsense"], {}, "unknown metric 'nonsense'; there are grounding, "),
        (None, {"nonsense": {}}, "unknown metric 'nonsense'"),
        (["grounding"], {"confidence": {}}, "options of confidence, which is not among the metrics"),
        (None, {"confidence": {"colour": 1}}, "confidence has no option colour; it has keep_tokens, keep_pixels"),
        (None, {"grounding": {"colour": 1}}, "grounding has no option colour; it has none"),
        (None, {"confidence": {"keep_tokens": "many"}}, "metric_options of confidence: .*keep_tokens"),
        (None, {"confidence": {"hidden_image": "pink"}}, "metric_options of confidence: .*hidden_image"),
        (None, {"confidence": {"keep_tokens": 1.5}}, r"confidence: keep_tokens has to be in \[0, 1\]; got 1.5"),
        (None, {"localization": {"quantile": -1}}, r"localization: quantile has to be in \[0, 1\]; got -1"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_computed(
    names: list[str] | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_metrics(names, options)


@pytest.mark.parametrize(
    ("returned", "rule"),
    [
        (lambda maps: maps, "a mapping from each of gamma, rho"),
        (lambda maps: {"gamma": maps[:, 0, 0]}, "the values gamma, rho; got gamma$"),
        (lambda maps: {"gamma": maps, "rho": maps, "more": maps}, "the values gamma, rho; got gamma, rho, more"),
        (lambda maps: {"gamma": maps, "rho": maps[:, 0, 0]}, r"gamma as a tensor .*, \[3\]; got \[3, 2, 2\]"),
        (lambda maps: {"gamma": 1.0, "rho": maps[:, 0, 0]}, "gamma as a tensor"),
        (lambda maps: {"gamma": maps[:, 0, 0] / 0, "rho": maps[:, 0, 0]}, "gamma as finite numbers, or NaN"),
    ],
)
def test_a_metric_that_breaks_the_contract_is_named_with_package_entry_and_rule(returned: Any, rule: str) -> None:
    def compute(targets: PhraseTargets) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = returned(targets.maps)
        return found

    chosen = ChosenMetric(replace(SPEC, compute=compute), {}, "my_package 1.2")
    with pytest.raises(PluginError, match=rf"(?s)plug-in my_package 1.2, entry 'grounding' .*return {rule}"):
        chosen.measure(PhraseTargets(torch.ones(3, 2, 2), torch.ones(3, 2, 2).bool(), signed=True))


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (dict, "has to be a MetricSpec; got type"),
        (replace(SPEC, name="other"), "has to be that of its entry; got 'other'"),
        (replace(SPEC, kind=WORD), "kind has to be one of phrase, phrase_pair, negative, caption; got 'word'"),
        (replace(SPEC, scores=()), "at least one"),
        (replace(SPEC, scores=(Score(name="x", value="delta", heading="x"),)), r"got \['delta'\]"),
        (replace(SPEC, empty={"delta": Exclusion.NO_BOX}), r"got \['delta'\]"),
    ],
)
def test_an_entry_that_is_no_metric_is_refused_with_the_rule(entry: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        check_spec("grounding", entry)


def test_values_are_exact_and_missing_ones_are_nan() -> None:
    maps = torch.tensor([[[0.1, 0.2]], [[-1.0, 0.0]]], dtype=torch.float32)
    found = choose_metric("grounding", {}).measure(PhraseTargets(maps, maps > 0.15, signed=True))
    share = maps[0].double()[0, 1] / maps[0].double().sum()
    assert found["gamma"][0] == share.item()
    assert found["rho"][0] == 1
    assert math.isnan(found["gamma"][1])
    assert math.isnan(found["rho"][1])
