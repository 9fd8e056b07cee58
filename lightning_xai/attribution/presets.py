"""Presets of feature-pair attribution: which layers are attributed to, by which quadrature rule, with how many points.

| preset   | layers                         | rule         | points |
|----------|--------------------------------|--------------|--------|
| `paper`  | input of both last blocks      | right        | 10     |
| `fast`   | where each tower is read from  | midpoint     | 5      |
| `inputs` | inputs of both towers (0, 0)   | midpoint     | 3      |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_xai.attribution.path_integral import Rule
from lightning_xai.models.at_layer import TowerAtLayer, UnsupportedTowerError

Preset = Literal["paper", "fast", "inputs"]


@dataclass(frozen=True)
class PresetSetting:
    """What a preset stands for.

    Attributes:
        rule: of quadrature.
        steps: number of integration points.
        layer: a tower's last block -> the number of the layer that is attributed to.
    """

    rule: Rule
    steps: int
    layer: Callable[[TowerAtLayer], int]

    def points(self, rule: Rule | None, steps: int | None) -> tuple[Rule, int]:
        """The rule and the number of points: those that are given, else its own."""
        return self.rule if rule is None else rule, self.steps if steps is None else steps


def _last_block(tower: TowerAtLayer) -> int:
    return -1


def _reading_layer(tower: TowerAtLayer) -> int:
    return -1 if tower.reading_layer == tower.layers[-1] else tower.reading_layer


def _input(tower: TowerAtLayer) -> int:
    if tower.layers[0] != 0:
        raise UnsupportedTowerError(
            f"the preset 'inputs' attributes to layer 0, but this tower's layers begin with {tower.layers[0]}: take "
            f"the preset 'paper' or 'fast', or image_layer={tower.layers[0]}"
        )
    return 0


PRESETS: dict[Preset, PresetSetting] = {
    "paper": PresetSetting("right", 10, _last_block),
    "fast": PresetSetting("midpoint", 5, _reading_layer),
    "inputs": PresetSetting("midpoint", 3, _input),
}
"""The presets by name."""


def preset_setting(preset: Preset) -> PresetSetting:
    """Return what a preset stands for.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(get_args(Preset))}")
    return PRESETS[preset]
