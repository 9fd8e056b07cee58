"""Metrics by their names, with the options that settings give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jsonargparse import ArgumentParser

from lightning_xai.metrics.base import ChosenMetric, MetricSpec, check_spec, no_targets
from lightning_xai.registry import PluginError, Registry, resolve_options

__all__ = ["METRICS", "ChosenMetric", "choose_metric", "choose_metrics"]

METRICS: Registry[MetricSpec] = Registry(
    "metric",
    {
        name: f"lightning_xai.metrics.{name}:SPEC"
        for name in (
            "grounding",
            "other_objects",
            "hard_negatives",
            "confidence",
            "localization",
            "faithfulness",
            "insertion_deletion",
            "pair_insertion_deletion",
            "pointing_game",
            "infidelity",
            "max_sensitivity",
            "road",
            "prefix_share",
            "mask_grounding",
            "mask_localization",
            "completeness",
            "agreement",
        )
    },
    group="lightning_xai.metrics",
    check=check_spec,
)
"""Every metric by the name that configs and results use. A new one is one file and one entry."""


def choose_metrics(
    names: Iterable[str] | None, options: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, ChosenMetric]:
    """Return metrics by name, in the order of the registry.

    Args:
        names: of the metrics; None: all that are measured by default.
        options: name -> options of a metric.

    Raises:
        ValueError: see `choose_metric`; options of a metric that is not measured.
    """
    wanted = [name for name in METRICS if METRICS[name].by_default] if names is None else list(dict.fromkeys(names))
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
