"""The command line: Lightning's verbs through LightningCLI, everything else from `commands`."""

from __future__ import annotations

import inspect
import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Loading torch takes seconds, which a help text or a mistyped command is not worth.
    from lightning.pytorch.cli import LightningCLI

__all__ = ["build_cli", "main"]

_OVERVIEW = """\
lightning_xai trains CLIP-like models and shows which words they match with which parts of an image.

usage: python -m lightning_xai COMMAND ...

Training and evaluation (Lightning's Trainer; every option can stand in a YAML file given with --config):
  fit         train, and measure grounding (gamma, rho) before training and after each epoch; with --run=FOLDER it
              goes on where it was stopped
  validate    measure a model on the validation shards
  test        measure a model on the test shards
  predict     write the embeddings of a split's images and captions

Data and models:
  prepare     convert a data set to shards: `prepare shapes` (made here, no download), or coco, flickr30k, hnc,
              conceptual-captions, ms-cxr, roco, rsicd as their publishers ship them
  verify      see whether prepared shards are whole, every byte and every image
  export      turn a checkpoint into weights that open_clip loads

Explanations:
  explain       draw which patches of an image and which words of a caption make their similarity
  sanity-check  see whether heat maps change while the model's weights are randomised, layer by layer
  roar          see whether heat maps find what a model learns from: remove it, retrain, measure (ROAR+)
  report        put what runs have found on one page, with the tables and figures of the papers

Start here (3 minutes on a laptop, no download):
  python -m lightning_xai fit --config configs/demo.yaml

`python -m lightning_xai COMMAND --help` lists the options of a command; `fit --print_config` all settings as YAML.
"""


_FLAGS = ("--prepare", "--list_cells", "--gather", "--quick")  # given without a value, where the parser wants one
_COMMANDS = ("prepare", "verify", "export", "explain", "sanity-check", "roar", "report")
# Commands that take any number of things by their place, which `auto_cli` does not offer: field, type, help.
_SEVERAL: dict[str, tuple[str, type, str]] = {
    "report": ("runs", Path, "folder of a finished run; several are compared"),
    "verify": ("sets", str, "folder of shards, folder of such folders, or address as the data module takes it"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; `python -m lightning_xai --help` lists them."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_OVERVIEW)  # noqa: T201
        return
    # Some libraries still call it when they are imported; whoever reads this can do nothing about it.
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    try:
        if arguments[0] in _COMMANDS:
            with _ended_in_order():
                _run_command(arguments[0], arguments[1:])
        else:
            build_cli(args)
    except Exception as error:
        told = _meant_for_the_user(error) or _lost_process(error)
        if told is None:
            raise
        text = f"lightning_xai {arguments[0]}: {told}"
        status = getattr(told, "code", None)
        if status is None:
            sys.exit(text)
        print(text, file=sys.stderr)  # noqa: T201 - a run that a signal has stopped has a status of its own
        sys.exit(status)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM (preemption, `scancel`) ends the process as an error would: what is half written is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield  # nobody else may handle signals
        return

    def end(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build_cli(args: Sequence[str] | None = None, run: bool = True) -> LightningCLI:
    """The LightningCLI behind `fit`, `validate`, `test` and `predict`.

    Args:
        args: the verb and its options; None for those of the command line.
        run: False makes trainer, model and data of a config without running anything; `args` then has no verb.
    """
    from lightning.pytorch import LightningDataModule, LightningModule

    from lightning_xai.commands.training import TrainingCLI

    # What is logged in evaluation has been reduced over the ranks by its metric; Lightning cannot know.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
    # Configs and the command line may use the bare names of classes that are loaded.
    for classes in ("data.datamodule", "evaluation", "training"):
        import_module(f"lightning_xai.{classes}")
    return TrainingCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"inference_mode": False},
        seed_everything_default=0,
        parser_kwargs={"prog": "lightning_xai", "description": "Train and evaluate dual encoders."},
        args=None if args is None else list(args),
        run=run,
    )


def _command(name: str) -> Any:
    """The function, the functions by their names, or the class of options behind a command."""
    if name == "prepare":
        from lightning_xai.commands.prepare import SOURCES

        return SOURCES
    if name == "export":
        from lightning_xai.commands.export import export

        return export
    if name == "explain":
        from lightning_xai.commands.explain import Explain

        return Explain
    if name == "roar":
        from lightning_xai.commands.roar import Roar

        return Roar
    if name == "report":
        from lightning_xai.commands.report import Report

        return Report
    if name == "verify":
        from lightning_xai.commands.verify import Verify

        return Verify
    from lightning_xai.commands.sanity_check import SanityCheck

    return SanityCheck


def _run_command(name: str, arguments: list[str]) -> None:
    from jsonargparse import DefaultHelpFormatter, auto_cli

    class KeepsLines(DefaultHelpFormatter):
        """Shows the examples of a description as they are written."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

    command = _command(name)
    if isinstance(command, Mapping):
        chosen = arguments[0].replace("_", "-") if arguments else ""  # `prepare ms_cxr` is `prepare ms-cxr`
        arguments = [chosen, *arguments[1:]] if arguments else arguments
        # The others are not even loaded: a broken plug-in must not stop them all.
        command = {chosen: command[chosen]} if chosen in command else dict(command)
    more: dict[str, Any] = {}
    if isinstance(command, type):
        # Parsers show the first line of a docstring alone.
        description = (inspect.getdoc(command) or "").partition("\nAttributes:")[0]
        more = {"description": description, "formatter_class": KeepsLines}
    if name in _SEVERAL:
        _run_on_several(name, command, arguments, more)
        return
    result = auto_cli(
        command,
        args=_as_parsed(arguments),
        prog=f"lightning_xai {name}",
        as_positional=name == "export",
        **more,
    )
    if isinstance(command, type):
        result()  # more settings than a function should take: the parser has made the object that holds them


def _run_on_several(name: str, command: type, arguments: list[str], more: dict[str, Any]) -> None:
    from jsonargparse import ArgumentParser

    field, kind, text = _SEVERAL[name]
    one = field.removesuffix("s")
    parser = ArgumentParser(prog=f"lightning_xai {name}", **more)
    parser.add_argument(one, nargs="+", type=kind, help=text)
    parser.add_class_arguments(command, skip={field}, as_group=False)
    given = parser.parse_args(_as_parsed(arguments))
    command(given.pop(one), **given.as_dict())()


def _as_parsed(arguments: Sequence[str]) -> list[str]:
    """Options as the parser takes them.

    `--other-image` becomes `--other_image`. Of options two levels down, such as `--options.rise.seed 1`, the parser
    would keep only the last, so that those of one method are given to it as one.

    >>> _as_parsed(["--a-b=c-d", "--options.rise.seed", "1", "--options.rise.cells=2", "--list-cells"])
    ['--a_b=c-d', '--list_cells=true', '--options.rise={"seed": "1", "cells": "2"}']
    """
    parsed: list[str] = []
    nested: dict[str, dict[str, str]] = {}
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if not option.startswith("--"):
            parsed.append(argument)
            continue
        option = "--" + option[2:].replace("-", "_")
        if option in _FLAGS and not equals:
            equals, value = "=", "true"
        if option.startswith("--options.") and option.count(".") == 2:
            group, _, key = option.rpartition(".")
            nested.setdefault(group, {})[key] = value if equals else next(rest, "")
        else:
            parsed.append(option + equals + value)
    return parsed + [f"{group}={json.dumps(values)}" for group, values in nested.items()]


def _lost_process(error: BaseException) -> str | None:
    """What to do where a process waits in vain for another one, if that is what an error means.

    Example:
        >>> _lost_process(RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection closed by peer"))[:41]
        'lost another process of the same run, or '
    """
    kinds = {"DistBackendError", "DistNetworkError", "DistCacheError"}
    text = str(error).partition("\n")[0]
    if type(error).__name__ in kinds or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)):
        return (
            "lost another process of the same run, or waited for it in vain: its own message, on its node, says why. "
            f"Start the same command again to go on from the last checkpoint ({text[:200]})"
        )
    return None


def _meant_for_the_user(error: BaseException | None) -> BaseException | None:
    """The error that says what to mend, where there is one: raised by this package itself, or about a file.

    A trace of our own code would bury it. Parsers wrap it, so it may be the cause of what arrives here.
    """
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        ours = trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("lightning_xai.")
        deliberate = isinstance(error, (ValueError, RuntimeError, ImportError)) and ours
        if deliberate or isinstance(error, (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)):
            return error
        error = error.__cause__
    return None
