"""Small models under names that timm's registry, and so open_clip's configurations, can ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import register_model
from torch import nn

_SOURCES = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Options of every model of timm that say where weights come from; the constructors do not take them."""


def register(models: Mapping[str, Callable[..., nn.Module]]) -> None:
    """Enter models by name: each is built with the options that open_clip gives, and without weights."""
    for name, make in models.items():
        _enter(name, make)


def _enter(name: str, make: Callable[..., nn.Module]) -> None:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        assert not pretrained
        model: Any = make(**{key: value for key, value in options.items() if key not in _SOURCES})
        model.default_cfg = {}
        built: nn.Module = model
        return built

    entry.__name__ = name
    register_model(entry)
