"""Methods by the layers that they attribute to, and how far each agrees with a referee: group-bys of the long table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lightning_xai.results.method_ranks import rank_correlation
from lightning_xai.results.record import MethodRecord
from lightning_xai.results.runs import Measurement

__all__ = ["LAYER_SCORES", "GammaAgreement", "Sweep", "gamma_agreement", "layer_scores", "sweeps"]

LAYER_SCORES = {
    "gamma_mean": "grounding",
    "gamma_above_50": "grounding",
    "rho": "grounding",
    "completeness_error": "completeness",
    "prefix_share": "prefix_share",
    "spearman": "faithfulness",
    "agreement": "agreement",
}
"""What is shown of each pair of layers: score -> its metric."""


@dataclass(frozen=True)
class Sweep:
    """One method at several pairs of layers.

    Attributes:
        method: its label without layers.
        labels: (image layer, text layer) -> label, from the inputs on; -1 is the last.
    """

    method: str
    labels: Mapping[tuple[int, int], str]

    @property
    def axes(self) -> tuple[list[int], list[int]]:
        """The image layers and the text layers, from the inputs on."""
        image, text = (sorted(set(layers), key=_from_inputs) for layers in zip(*self.labels, strict=True))
        return image, text


@dataclass(frozen=True)
class GammaAgreement:
    """A method's gammas next to a referee's, of the phrases that both measured.

    Attributes:
        count: of the phrases.
        correlation: of ranks (Spearman; ties averaged); NaN where one side is constant, or there are fewer than two.
        difference: mean of the method's less the referee's; below 0 the method understates.
        error: standard error of `difference`, with phrases taken as independent; NaN below two.
        both_above_50: share of the phrases with a gamma above 0.5 on both sides.
    """

    count: int
    correlation: float
    difference: float
    error: float
    both_above_50: float


def sweeps(measurement: Measurement) -> list[Sweep]:
    """The methods that were measured at two or more pairs of image and text layer, with the same options otherwise."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for label, method in measurement.record.methods.items():
        layers = layers_of(method)
        if layers is not None:
            base = label.removesuffix(f",{layers[0]},{layers[1]}")
            found.setdefault(base, {})[layers] = label
    # By hand, layers may have labels of any kind.
    if all(len(labels) == 1 for labels in found.values()):
        by_name: dict[str, dict[tuple[int, int], str]] = {}
        for labels in found.values():
            for layers, label in labels.items():
                by_name.setdefault(measurement.record.methods[label].name, {}).setdefault(layers, label)
        found = by_name
    ordered = {base: sorted(labels, key=lambda pair: tuple(map(_from_inputs, pair))) for base, labels in found.items()}
    return [
        Sweep(base, {pair: found[base][pair] for pair in pairs}) for base, pairs in ordered.items() if len(pairs) > 1
    ]


def layers_of(method: MethodRecord) -> tuple[int, int] | None:
    """The image and text layer that a method attributes to; None where its options do not name one of each."""
    image, text = (method.options.get(name) for name in ("image_layer", "text_layer"))
    return (image, text) if isinstance(image, int) and isinstance(text, int) else None


def gamma_agreement(measurement: Measurement, label: str, referee: str) -> GammaAgreement:
    """Compare the gammas of a method's first seed with those of a referee's."""
    sides = []
    for each in (label, referee):
        rows = measurement.first_seed(each, ["gamma"])
        sides.append(rows[rows["excluded"] == ""].set_index("target")["value"])
    pairs = pd.concat(sides, axis="columns", join="inner", keys=["own", "referee"]).sort_index()
    differences = (pairs["own"] - pairs["referee"]).tolist()
    count = len(differences)
    if not count:
        return GammaAgreement(0, math.nan, math.nan, math.nan, math.nan)
    mean = math.fsum(differences) / count
    spread = math.fsum((each - mean) ** 2 for each in differences)
    error = math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan
    correlation, _ = rank_correlation(pairs["own"].to_dict(), pairs["referee"].to_dict())
    return GammaAgreement(count, correlation, mean, error, float((pairs > 0.5).all(axis="columns").mean()))


def layer_scores(measurement: Measurement, labels: Sequence[str]) -> pd.DataFrame:
    """Scores of `LAYER_SCORES` by label (rows), the means over seeds; NaN for what was not measured."""
    frame = pd.DataFrame(math.nan, index=list(labels), columns=list(LAYER_SCORES))
    for metric in dict.fromkeys(LAYER_SCORES.values()):
        if metric in measurement.record.metrics:
            for label, scores in measurement.estimates(metric).items():
                if label in frame.index:
                    own = {name: found.mean for name, found in scores.items() if LAYER_SCORES.get(name) == metric}
                    frame.loc[label, list(own)] = list(own.values())
    return frame


def _from_inputs(layer: int) -> tuple[bool, int]:
    """Sort layers from the inputs on; negative ones count from the end."""
    return layer < 0, layer
