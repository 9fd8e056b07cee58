"""The data sets that `prepare` reads: one module each, which reads files as their publishers ship them.

A source is a function that yields `Sample`s:

    def read(*, images: Path, split: str, excluded: Counter[str]) -> Iterator[Sample]: ...

Its parameters are the options of `prepare NAME`. The first line of its docstring is the help of the command, `Args:`
holds that of the options. While it is iterated, it counts in `excluded`, by reason, what could not be used.

Other packages add theirs under the entry points `lightning_xai.sources`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

from lightning_xai.data.sample import Sample
from lightning_xai.registry import Registry

__all__ = ["SOURCES", "source_options"]

RESERVED = ("out", "samples_per_shard", "overwrite", "short_side", "jpeg_quality")
"""Options that `prepare` adds to those of every source."""


def source_options(read: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a source: its parameters but `excluded`, with evaluated types.

    Raises:
        ValueError: it breaks the contract; the message states the rule.
    """
    if not callable(read):
        raise ValueError(f"a source is a function read(*, ..., excluded) that yields Samples; got {read!r}")
    options = dict(inspect.signature(read).parameters)
    if options.pop("excluded", None) is None:
        raise ValueError("a source has a parameter `excluded: Counter[str]`, which it fills while it is iterated")
    try:
        types = typing.get_type_hints(read)
    except (NameError, TypeError) as error:
        raise ValueError(f"the types of a source's options have to exist at run time ({error})") from error
    for name, option in options.items():
        if option.kind not in (option.KEYWORD_ONLY, option.POSITIONAL_OR_KEYWORD):
            raise ValueError(f"options of a source are given by name; {name!r} cannot be")
        if name in RESERVED:
            raise ValueError(f"`prepare` has an option {name!r} for every source; give the source's own another name")
        if name not in types:
            raise ValueError(f"options of a source have types, from which the command line is made; {name!r} has none")
        options[name] = option.replace(annotation=types[name], kind=option.KEYWORD_ONLY)
    return options


def _check(name: str, read: Any) -> None:
    source_options(read)


SOURCES: Registry[Callable[..., Iterator[Sample]]] = Registry(
    "data set",
    {
        "coco": "lightning_xai.data.sources.coco:read_coco",
        "flickr30k": "lightning_xai.data.sources.flickr30k:read_flickr30k",
        "hnc": "lightning_xai.data.sources.hnc:read_hnc",
        "conceptual-captions": "lightning_xai.data.sources.conceptual_captions:read_conceptual_captions",
        "ms-cxr": "lightning_xai.data.sources.ms_cxr:read_ms_cxr",
        "roco": "lightning_xai.data.sources.roco:read_roco",
        "rsicd": "lightning_xai.data.sources.rsicd:read_rsicd",
        "sugarcrepe": "lightning_xai.data.sources.sugarcrepe:read_sugarcrepe",
        "aro": "lightning_xai.data.sources.aro:read_aro",
        "winoground": "lightning_xai.data.sources.winoground:read_winoground",
    },
    group="lightning_xai.sources",
    check=_check,
)
"""Name -> function that reads the data set."""
