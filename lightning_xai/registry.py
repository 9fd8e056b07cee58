"""Named entries that other packages can add to: methods, metrics, data sets and commands.

A built-in entry is written as `"module:attribute"`, so that listing the names imports nothing. An installed package
adds entries through Python's entry points:

    [project.entry-points."lightning_xai.methods"]
    my_method = "my_package.my_method:MyMethod"
"""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["BUILTIN", "PluginError", "Registry", "resolve_options"]

BUILTIN = "lightning_xai"
"""Origin of the entries that this package brings."""

T = TypeVar("T")


class PluginError(ValueError):
    """An entry that an installed package adds breaks the contract; the message names package, entry and rule."""


class Registry(Mapping[str, T]):
    """Entries by name, imported when they are first looked up.

    Args:
        kind: what an entry is, in messages: "attribution method".
        builtin: name -> `"module:attribute"`.
        group: entry-point group in which other packages add entries; None: the registry is closed.
        check: raises a ValueError that states the rule which an entry breaks; called for entries of other packages.

    Raises:
        PluginError: (on first use) an entry point takes the name of another entry; on lookup: it cannot be imported or
            breaks the contract.
        KeyError: on lookup: there is no such entry.

    Example:
        >>> names = Registry("container", {"dict": "builtins:dict", "list": "builtins:list"})
        >>> list(names), names["dict"]
        (['dict', 'list'], <class 'dict'>)
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, str],
        group: str | None = None,
        check: Callable[[str, Any], None] = lambda name, entry: None,
    ) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._check = check
        self._loaded: dict[str, T] = {}

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group) if self.group is not None else ():
            taken_by = BUILTIN if point.name in self._builtin else None
            if point.name in found and found[point.name] != point:
                taken_by = _package(found[point.name])
            if taken_by is not None:
                raise PluginError(
                    f"{_where(point, self.group)}: the {self.kind} {point.name!r} is taken by {taken_by}; "
                    "rename or uninstall one of them"
                )
            found[point.name] = point
        return found

    def __getitem__(self, name: str) -> T:
        if name not in self._loaded:
            if name in self._builtin:
                module, _, attribute = self._builtin[name].partition(":")
                self._loaded[name] = getattr(import_module(module), attribute)
            else:
                self._loaded[name] = self._load(self._plugins[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        yield from self._plugins

    def __len__(self) -> int:
        return len(self._builtin) + len(self._plugins)

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._plugins

    def __repr__(self) -> str:
        """Each name on its line; of the built-in entries with the first sentence of what they are."""
        described = {name: _sentence(self[name]) for name in self._builtin} | {
            name: self.origin(name) for name in self._plugins
        }
        return "\n".join([f"{self.kind}s:", *(f"  {name:22} {text}".rstrip() for name, text in described.items())])

    def origin(self, name: str) -> str:
        """The package that an entry comes from, with its version where it is known: "my_package 1.2"."""
        return BUILTIN if name in self._builtin else _package(self._plugins[name])

    def _load(self, point: EntryPoint) -> T:
        where = _where(point, self.group)
        try:
            entry: T = point.load()
        except Exception as error:
            raise PluginError(f"{where}: {point.value} cannot be imported ({error})") from error
        try:
            self._check(point.name, entry)
        except ValueError as error:
            raise PluginError(f"{where}: {error}") from error
        return entry


def _sentence(entry: object) -> str:
    """The first line of an entry's docstring, without the full stop."""
    return (inspect.getdoc(entry) or "").partition("\n")[0].removesuffix(".")


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def _where(point: EntryPoint, group: str | None) -> str:
    return f"plug-in {_package(point)}, entry {point.name!r} of {group}"


def resolve_options(parser: ArgumentParser, options: Mapping[str, Any], owner: str, where: str) -> dict[str, Any]:
    """Return all options of an entry, those left at their defaults included, with values of the right types.

    Args:
        parser: made from the entry's signature; does not exit on errors.
        options: given by the user.
        owner: the entry, in messages: "rise".
        where: the place where its options are given: "--options of rise".

    Raises:
        ValueError: an unknown option, or a value of another type.
    """
    known = list(parser.get_defaults().as_dict())
    if unknown := options.keys() - set(known):
        raise ValueError(
            f"{owner} has no option {', '.join(sorted(map(str, unknown)))}; it has {', '.join(known) or 'none'}"
        )
    try:
        values: dict[str, Any] = parser.parse_object(dict(options)).as_dict()
    except ArgumentError as error:
        reason = " ".join(str(error).split()).removeprefix("Parser key ")
        raise ValueError(f"{where}: {_EXPECTED.sub(_in_plain_words, reason)}") from error
    return values


_EXPECTED = re.compile(
    r"Expected a (.*)\. Got value: |"
    r"Does not validate against any of the Union subtypes.*? Errors: - (.*) Given value type: .* Given value: "
)


def _in_plain_words(found: re.Match[str]) -> str:
    """Say which values an option takes, then which types, of one or of several.

    >>> _EXPECTED.sub(_in_plain_words, "Expected a typing.Literal['mean', 'max']. Got value: min")
    "expected one of 'mean', 'max'; got min"
    """
    kinds = re.sub(r"Expected (a )?", "", found[1] or found[2]).split(" - ")
    # None stands for the option left out; an object, which has an import path, cannot be spelled on a command line.
    unsaid = (
        "NoneType",
        "<class 'NoneType'>",
        "dot import path string",
        "Not a valid subclass",
        "a class path",
        "a dict ",
    )
    given = [kind for kind in kinds if not kind.startswith(unsaid)]
    values = [kind[len("typing.Literal[") : -1] for kind in given if kind.startswith("typing.Literal[")]
    types = [re.sub(r"<class '([^']*)'>", r"\1", kind) for kind in given if not kind.startswith("typing.Literal[")]
    if values:
        types.insert(0, f"one of {', '.join(values)}")
    return f"expected {' or '.join(types or kinds)}; got "
