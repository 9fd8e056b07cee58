"""Metrics by name: their options, a broken contract, and their scores over batches and processes."""

from __future__ import annotations

import dataclasses
import math
import pickle
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics import METRICS, PhraseTargets
from lightning_xai.metrics.base import ScoreMetric, check_spec, no_targets
from lightning_xai.metrics.grounding import SPEC
from lightning_xai.metrics.registry import ChosenMetric, _check_names_differ, choose_metric, choose_metrics
from lightning_xai.registry import PluginError
from lightning_xai.results.record import Score

WORD: Any = "word"


def random_values(count: int) -> dict[str, Tensor]:
    """Gamma and rho as a validation pass has them, some of them missing."""
    generator = torch.Generator().manual_seed(3)
    gamma = torch.rand(count, generator=generator, dtype=torch.float64)
    gamma[torch.rand(count, generator=generator) < 0.1] = math.nan
    return {"gamma": gamma, "rho": (gamma > 0.6).double().masked_fill(gamma.isnan(), math.nan)}


def grounding_of(values: Mapping[str, Tensor], *parts: Any) -> ScoreMetric:
    """The metric after an update with each part of the values."""
    metric = ScoreMetric(SPEC)
    for part in parts:
        metric.update(**{name: column[part] for name, column in values.items()})
    return metric


def scores_of_own_share(values: Mapping[str, Tensor]) -> list[str]:
    """A third of the targets in one piece here, the others one by one there; all on the last rank; none at all."""
    rank, third = dist.get_rank(), len(values["gamma"]) // 3
    own = [slice(third)] if rank == 0 else [[row] for row in reversed(range(third, 3 * third))] if rank == 1 else []
    everything = [slice(None)] if rank == dist.get_world_size() - 1 else []
    # repr: floats in full, and NaN equals itself.
    return [repr(grounding_of(values, *parts).compute()) for parts in (own, everything, [slice(0)])]


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
        (lambda maps: {"gamma": maps, "rho": maps[:, 0, 0]}, r"gamma as a tensor.*, \[3\]; got \[3, 2, 2\]"),
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
        (replace(SPEC, kind=WORD), "kind has to be one of phrase, phrase_pair, negative, caption, collage; got 'word'"),
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


def test_scores_agree_with_plain_python_over_the_targets_that_have_a_value() -> None:
    values = random_values(300)
    there = [value for value in values["gamma"].tolist() if not math.isnan(value)]
    found = grounding_of(values, slice(100), slice(100, None)).compute()
    assert 200 < len(there) < 300
    assert found["gamma_mean"] == pytest.approx(statistics.fmean(there), abs=1e-12)
    assert found["gamma_std"] == pytest.approx(statistics.stdev(there), abs=1e-12)
    assert found["gamma_above_50"] == sum(value > 0.5 for value in there) / len(there)
    assert found["gamma_above_80"] == sum(value > 0.8 for value in there) / len(there)
    assert found["rho"] == sum(value > 0.6 for value in there) / len(there)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("grounding", {"gamma": [0.5, 0.8], "rho": [1, 0]}, {"gamma_above_50": 0.5, "gamma_above_80": 0, "rho": 0.5}),
        ("grounding", {"gamma": [0.3] * 1000, "rho": [1] * 1000}, {"gamma_std": 0}),
        ("other_objects", {"own": [0.0, 1e-30], "other": [-0.0, -1e-30]}, {"own_positive": 0.5, "other_negative": 0.5}),
        ("hard_negatives", {"delta": [0.0, -0.0, -1e-30, 1.0]}, {"delta_negative": 0.25, "delta_mean": 0.25}),
        ("localization", {"iou": [0.25, math.nan, 0.75]}, {"localization_iou": 0.5}),
        ("localization", {"iou": []}, {"localization_iou": math.nan}),
    ],
)
def test_scores_of_known_values(name: str, values: dict[str, list[float]], expected: dict[str, float]) -> None:
    metric = ScoreMetric(METRICS[name])
    metric.update(**{key: torch.tensor(column, dtype=torch.float64) for key, column in values.items()})
    found = metric.compute()
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_what_a_metric_computes_can_be_added_as_it_is() -> None:
    spec = METRICS["confidence"]
    metric = ScoreMetric(spec)
    metric.update(**{value: torch.tensor([0.5]) for value in spec.values})
    assert set(metric.compute().values()) == {0.5}


@pytest.mark.parametrize(
    "values",
    [
        {"gamma": torch.rand(2)},
        {"gamma": torch.rand(2), "rho": torch.rand(2), "hit": torch.rand(2)},
        {"gamma": torch.rand(2), "rho": torch.rand(1)},
        {"gamma": torch.rand(2, 1), "rho": torch.rand(2, 1)},
        {"gamma": torch.tensor([0.5, math.inf]), "rho": torch.rand(2)},
    ],
)
def test_values_that_make_no_sense_are_refused_and_nothing_is_added(values: dict[str, Tensor]) -> None:
    metric = grounding_of(random_values(5), slice(None))
    expected = metric.compute()
    with pytest.raises(ValueError, match=r"expected .*gamma, rho"):
        metric.update(**values)
    assert metric.compute() == expected


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_scores_of_one_to_the_last_bit_also_without_updates(size: int) -> None:
    values = random_values(120)
    expected = [repr(grounding_of(values, part).compute()) for part in (slice(None), slice(None), slice(0))]
    assert run_distributed(scores_of_own_share, values, world_size=size) == [expected] * size


def test_a_reset_forgets_everything_and_a_pickle_nothing() -> None:
    metric = grounding_of(random_values(50), slice(None))
    expected = metric.compute()
    assert pickle.loads(pickle.dumps(metric)).compute() == expected
    metric.reset()
    metric.update(gamma=torch.zeros(0), rho=torch.zeros(0))
    assert math.isnan(metric.compute()["gamma_mean"])
    metric.update(**random_values(50))
    assert metric.compute() == expected


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_and_gradient_modes_do_not_reach_the_values(mode: Any, dtype: torch.dtype) -> None:
    values, model = random_values(50), torch.nn.Module()
    with mode():
        model.metric = metric = grounding_of(values, slice(25))
    model.to(dtype)
    metric.set_dtype(dtype)
    metric.update(**{name: column[25:] for name, column in values.items()})
    assert metric.compute() == grounding_of(values, slice(None)).compute()


def test_two_metrics_that_write_values_of_one_name_are_refused() -> None:
    twin = dataclasses.replace(SPEC, name="twin")
    metrics = {"grounding": SPEC, "twin": twin}
    origins = {"grounding": "lightning_xai", "twin": "twins 1.0"}
    chosen = [ChosenMetric(spec, {}, origins[name]) for name, spec in metrics.items()]
    with pytest.raises(PluginError, match=r"twins 1\.0, entry 'twin' .* is taken by grounding"):
        _check_names_differ(chosen)
