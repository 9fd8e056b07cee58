"""Metrics by their names, with the options that settings give; what they return is checked against their contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_xai.metrics.base import MetricSpec, check_spec, no_targets
from lightning_xai.registry import BUILTIN, PluginError, Registry, resolve_options

__all__ = ["METRICS", "ChosenMetric", "choose_metric", "choose_metrics"]

METRICS: Registry[MetricSpec] = Registry(
    "metric",
    {
        name: f"lightning_xai.metrics.{name}:SPEC"
        for name in ("grounding", "other_objects", "hard_negatives", "confidence", "localization")
    },
    group="lightning_xai.metrics",
    check=check_spec,
)
"""Every metric by the name that configs and results use. A new one is one file and one entry."""


@dataclass(frozen=True)
class ChosenMetric:
    """A metric with all of its options.

    Attributes:
        spec: the metric.
        options: every option and its value, those left at their defaults included.
        origin: the package that it comes from.
    """

    spec: MetricSpec
    options: dict[str, Any]
    origin: str

    def measure(self, targets: Any) -> dict[str, list[float]]:
        """Compute the metric's values, each a number for each target; NaN where it has none.

        Raises:
            PluginError: `compute` broke its contract.
        """
        try:
            found = self.spec.compute(targets, **self.options)
        except Exception as error:
            # What is wrong with options or maps is for the user; all else is the plug-in's own fault.
            if self.origin == BUILTIN or isinstance(error, ValueError):
                raise
            raise self.error(f"compute failed on {len(targets)} targets ({type(error).__name__}: {error})") from error
        names, wants = ", ".join(self.spec.values), "compute has to return"
        if not isinstance(found, Mapping):
            raise self.error(f"{wants} a mapping from each of {names} to a tensor; got {type(found)}")
        if found.keys() != set(self.spec.values):
            raise self.error(f"{wants} the values {names}; got {', '.join(map(str, found))}")
        for name, value in found.items():
            if not isinstance(value, Tensor) or value.shape != (len(targets),):
                got = list(value.shape) if isinstance(value, Tensor) else type(value)
                raise self.error(f"{wants} {name} as a tensor, a number for each target, [{len(targets)}]; got {got}")
            if value.is_complex() or value.isinf().any():
                raise self.error(f"{wants} {name} as finite numbers, or NaN without one; got {value.tolist()}")
        # Whole columns at a time: a read for each number would wait for the device as often.
        return {name: found[name].detach().cpu().to(torch.float64).tolist() for name in self.spec.values}

    def error(self, rule: str) -> PluginError:
        """Make the error that names package, entry and the rule that is broken."""
        name = self.spec.name
        return PluginError(f"plug-in {self.origin}, entry {name!r} of lightning_xai.metrics: {rule}")


def choose_metrics(
    names: Iterable[str] | None, options: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, ChosenMetric]:
    """Return metrics by name, in the order of the registry.

    Args:
        names: of the metrics; None: all.
        options: name -> options of a metric.

    Raises:
        ValueError: see `choose_metric`; options of a metric that is not measured.
    """
    wanted = list(METRICS if names is None else dict.fromkeys(names))
    for name in (*wanted, *options):
        _check_name(name)
    if unused := [name for name in options if name not in wanted]:
        raise ValueError(f"metric_options has options of {', '.join(unused)}, which is not among the metrics {wanted}")
    chosen = {name: choose_metric(name, options.get(name) or {}) for name in METRICS if name in wanted}
    _check_names_differ(chosen.values())
    return chosen


def _check_names_differ(metrics: Iterable[ChosenMetric]) -> None:
    """Raise a PluginError where two metrics write values, or are summed up in scores, of one name."""
    taken: dict[str, str] = {}
    for metric in metrics:
        for name in {*metric.spec.values, *(score.name for score in metric.spec.scores)}:
            other = taken.setdefault(name, metric.spec.name)
            if other != metric.spec.name:
                raise metric.error(
                    f"its values and scores need names that no other metric has; {name!r} is taken by {other}"
                )


def choose_metric(name: str, options: Mapping[str, Any]) -> ChosenMetric:
    """Return a metric with its options, tried out on no targets at all.

    Raises:
        ValueError: an unknown metric or option, or a value of another type or outside its range.
        PluginError: the metric breaks its contract.
    """
    _check_name(name)
    spec = METRICS[name]
    parser = ArgumentParser(exit_on_error=False)
    # The first parameter takes the targets.
    parser.add_function_arguments(spec.compute, skip={1})
    values = resolve_options(parser, options, f"the metric {name}", f"metric_options of {name}")
    chosen = ChosenMetric(spec, values, METRICS.origin(name))
    try:
        chosen.measure(no_targets(spec.kind))
    except PluginError:
        raise
    except ValueError as error:
        raise ValueError(f"metric_options of {name}: {error}") from error
    return chosen


def _check_name(name: str) -> None:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; there are {', '.join(METRICS)}")
