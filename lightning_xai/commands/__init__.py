"""Commands of `python -m lightning_xai`, apart from Lightning's verbs: one module and one entry of `COMMANDS` each.

A command is one of

- a dataclass that can be called: its fields are options, a list without a default is given by its place;
- a function: its parameters are given by their place;
- functions by their names: the first argument chooses one, whose parameters are options.

The command's docstring is its help, the first line of its module its line in the overview. Torch is imported inside of
functions: it takes seconds, which a help text or a mistyped command is not worth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_xai.registry import Registry

__all__ = ["COMMANDS", "summary"]

COMMANDS: Registry[Any] = Registry(
    "command",
    {
        "demo": "lightning_xai.commands.demo:Demo",
        "prepare": "lightning_xai.commands.prepare:SOURCES",
        "verify": "lightning_xai.commands.verify:Verify",
        "evaluate": "lightning_xai.commands.evaluate:Evaluate",
        "export": "lightning_xai.commands.export:export",
        "merge": "lightning_xai.commands.merge:Merge",
        "explain": "lightning_xai.commands.explain:Explain",
        "sanity-check": "lightning_xai.commands.sanity_check:SanityCheck",
        "roar": "lightning_xai.commands.roar:Roar",
        "objectives": "lightning_xai.commands.objectives:Objectives",
        "report": "lightning_xai.commands.report:Report",
        "watch": "lightning_xai.commands.watch:watch",
    },
)


def summary(name: str) -> str:
    """A command in one sentence, from the first line of its module, which is read and not imported.

    >>> summary("export")
    'turn a checkpoint into weights that open_clip loads, or into a folder that transformers loads.'
    """
    with Path(__file__).with_name(f"{name.replace('-', '_')}.py").open(encoding="utf-8") as file:
        return file.readline().strip().strip('"').partition(": ")[2]
