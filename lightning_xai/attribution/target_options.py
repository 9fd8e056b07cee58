"""Targets by their names, made with the options that the command line gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from lightning_xai.attribution.base import UnsupportedTargetError, unsupported_target
from lightning_xai.attribution.registry import ALL, METHODS
from lightning_xai.attribution.targets import TARGETS, Target
from lightning_xai.registry import resolve_options

__all__ = ["ChosenTarget", "check_serves", "choose_target"]


@dataclass(frozen=True)
class ChosenTarget:
    """A kind of target that compares captions, which are given later.

    Attributes:
        name: as the command line knows it.
        options: every option but the captions, and its value.
    """

    name: str
    options: dict[str, Any]

    @property
    def kind(self) -> type[Target]:
        """The target's class."""
        return TARGETS[self.name]

    def of(self, others: Sequence[Sequence[str]]) -> Target:
        """The target that compares the other captions of each pair with its own."""
        made: Any = self.kind
        target: Target = made(others, **self.options)
        return target


def choose_target(name: str, options: Mapping[str, Any]) -> ChosenTarget:
    """Choose a target by its name.

    Args:
        name: of the target.
        options: of the target, but for its captions.

    Raises:
        ValueError: an unknown target, one that compares no captions, an unknown option, or a value of another type.
    """
    comparing = [each for each in TARGETS if inspect.signature(TARGETS[each]).parameters]
    if name not in comparing:
        raise ValueError(f"--target is what captions are compared by: {', '.join(comparing)}; got {name!r}")
    captions, *_ = inspect.signature(TARGETS[name]).parameters
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TARGETS[name], skip={captions}, sub_configs=False)
    return ChosenTarget(name, resolve_options(parser, options, name, f"--target_options of {name}"))


def check_serves(method: str, target: ChosenTarget) -> None:
    """Raise an UnsupportedTargetError that lists the methods that explain a target, where the named one does not."""
    if method == ALL or METHODS[method].serves(target.kind):
        return
    able = ", ".join(name for name, each in METHODS.items() if each.serves(target.kind))
    raise UnsupportedTargetError(f"{unsupported_target(method, target.kind)}; methods that explain it: {able}")
