"""The command line: Lightning's verbs through LightningCLI, everything else from `commands`."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_xai import __version__
from lightning_xai.commands import COMMANDS, summary
from lightning_xai.shipped import shipped

if TYPE_CHECKING:
    # Loading torch takes seconds, which a help text or a mistyped command is not worth.
    from lightning.pytorch.cli import LightningCLI

__all__ = ["build_cli", "main"]

_VERBS = ("fit", "validate", "test", "predict")
_OVERVIEW = """\
lightning_xai trains CLIP-like models and shows which words they match with which parts of an image.

usage: python -m lightning_xai COMMAND ...

Training and evaluation (Lightning's Trainer; every option can stand in a YAML file given with --config):
  fit           train, and measure grounding (gamma, rho) before training and after each epoch; with --run=FOLDER it
                goes on where it was stopped
  validate      measure a model on the validation shards
  test          measure a model on the test shards
  predict       write the embeddings of a split's images and captions, and their maps

Data, explanations and reports:
{commands}

Start here (3 minutes on a laptop, no download):
  python -m lightning_xai demo

The package brings the configurations of its repository: fit --config configs/demo.yaml works from any folder.

`python -m lightning_xai COMMAND --help` lists the options of a command; `fit --print_config` all settings as YAML.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; `python -m lightning_xai --help` lists them."""
    arguments = _with_shipped_configs(sys.argv[1:] if args is None else args)
    if args is None:
        sys.argv[1:] = arguments  # Lightning reads them there, and starts the other processes of a group with them
    else:
        args = arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:13} {summary(name).removesuffix('.')}" for name in COMMANDS)
        print(_OVERVIEW.format(commands=commands))  # noqa: T201
        return
    if arguments[0] == "--version":
        print(f"lightning_xai {__version__}")  # noqa: T201
        return
    if arguments[0] not in (*COMMANDS, *_VERBS) and not arguments[0].startswith("-"):
        near = get_close_matches(arguments[0], [*COMMANDS, *_VERBS], n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        print(  # noqa: T201
            f"usage: python -m lightning_xai {{{','.join((*_VERBS, *COMMANDS))}}} ...\n"
            f"lightning_xai: there is no command {arguments[0]!r}.{guess}",
            file=sys.stderr,
        )
        sys.exit(2)
    # Some libraries still call it when they are imported, which users cannot change.
    for known in ("`torch.jit.script` is deprecated", r"`isinstance\(treespec, LeafSpec\)` is deprecated"):
        warnings.filterwarnings("ignore", message=known)
    try:
        if arguments[0] in COMMANDS:
            with _ended_in_order():
                _run_command(arguments[0], arguments[1:])
        else:
            build_cli(args)
    except ArgumentError as error:
        _refuse(arguments, error)
    except Exception as error:
        _give_up(arguments[0], error)


def _with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """Arguments in which `--config configs/NAME.yaml` is the package's own file where there is no other."""
    found: list[str] = []
    for argument in arguments:
        option, _, value = argument.rpartition("=")
        follows = not option and bool(found) and found[-1] in ("--config", "-c")
        # Other values stay as they are: an address, or YAML itself, is no path.
        if value.startswith("configs/") and (option == "--config" or follows):
            argument = argument.removesuffix(value) + str(shipped(Path(value)))
        found.append(argument)
    return found


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM (preemption, `scancel`) ends the process as an error would: what is half written is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def end(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build_cli(args: Sequence[str] | None = None, run: bool = True) -> LightningCLI:
    """Make the LightningCLI of `fit`, `validate`, `test` and `predict`.

    Args:
        args: the verb and its options; None for those of the command line.
        run: False makes trainer, model and data of a config without running anything; `args` then has no verb.
    """
    from lightning.pytorch import LightningDataModule, LightningModule

    from lightning_xai.commands.training import TrainingCLI
    from lightning_xai.training.run_trainer import RunTrainer

    _silence_lightning()
    # Configs and the command line may use the bare names of classes that are loaded.
    for classes in ("data.datamodule", "evaluation", "training"):
        import_module(f"lightning_xai.{classes}")
    return TrainingCLI(
        LightningModule,
        LightningDataModule,
        trainer_class=RunTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"inference_mode": False},
        seed_everything_default=0,
        parser_kwargs={
            "prog": "lightning_xai",
            "description": "Train and evaluate dual encoders.",
            "exit_on_error": False,
        },
        args=None if args is None else list(args),
        run=run,
    )


def _silence_lightning() -> None:
    """Leave out what Lightning says that is wrong or of no use here."""
    # What is logged in evaluation has been reduced over the ranks by its metric, which Lightning cannot know.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
    import_module("lightning_utilities.core.rank_zero").log.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for advertising and for steps of Lightning's own start."""
    known = ("\U0001f4a1 Tip: For seamless cloud", "Loading `train_dataloader` to estimate", "TPU available: False")
    return not record.getMessage().startswith(known)


def _run_command(name: str, arguments: list[str]) -> None:
    """Make a command's parser from its signature, and run it; `commands` says what a command can be."""
    import inspect

    import jsonargparse

    auto_cli = partial(jsonargparse.auto_cli, exit_on_error=False)
    command, prog = COMMANDS[name], f"lightning_xai {name}"
    if isinstance(command, type):
        # Parsers show the first line of a docstring alone.
        description = (inspect.getdoc(command) or "").partition("\nAttributes:")[0]
        auto_cli(
            command,
            args=_as_parsed(arguments, command),
            prog=prog,
            as_positional=False,
            parser_class=_class_parser(),
            description=description,
        )()
    elif isinstance(command, Mapping):
        chosen = arguments[0] if arguments else ""
        chosen = chosen if chosen in command else chosen.replace("_", "-")  # `prepare ms_cxr` is `prepare ms-cxr`
        if chosen in command:
            # The others are not even loaded: a broken plug-in must not stop them all.
            command, arguments = {chosen: command[chosen]}, [chosen, *_as_parsed(arguments[1:], command[chosen])]
        auto_cli(dict(command), args=arguments, prog=prog, as_positional=False)
    else:
        auto_cli(command, args=_as_parsed(arguments, command), prog=prog)


def _class_parser() -> type[Any]:
    """A parser that keeps the lines of a description, and takes a list without a default by its place.

    An option for a list of numbers takes them one after the other: `--alpha 0 0.5 1`.
    """
    import inspect
    from dataclasses import fields
    from typing import get_args, get_type_hints

    from docstring_parser import parse
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class KeepsLines(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

    class ClassParser(ArgumentParser):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, formatter_class=KeepsLines, **kwargs)

        def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
            hints = get_type_hints(theclass)
            helps = {each.arg_name: each.description for each in parse(inspect.getdoc(theclass) or "").params}
            listed = {
                name
                for name, parameter in inspect.signature(theclass).parameters.items()
                if parameter.default is parameter.empty and str(parameter.annotation).startswith("list[")
            }
            for name in listed:
                (kind,) = get_args(hints[name])
                self.add_argument(name, nargs="+", type=kind, help=helps.get(name), metavar=name.removesuffix("s"))
            numbers = {each.name: each for each in fields(theclass) if each.type == "list[float]"}
            for name, each in numbers.items():
                assert callable(each.default_factory), "a list of numbers has a default"
                self.add_argument(
                    f"--{name}", nargs="+", type=float, default=each.default_factory(), help=helps.get(name)
                )
            added: list[str] = super().add_class_arguments(theclass, *args, skip=listed | {*numbers}, **kwargs)
            return [*listed, *numbers, *added]

    return ClassParser


def _as_parsed(arguments: Sequence[str], command: Any) -> list[str]:
    """Options as the parser takes them.

    `--other-image` becomes `--other_image`, and an option that is true or false needs no value. Of options two levels
    down, such as `--options.rise.seed 1`, the parser would keep only the last, so that those of one method are given to
    it as one. An option for a list of texts may be given several times.

    >>> def command(a_b: str, quick: bool = False): ...
    >>> _as_parsed(["--a-b=c-d", "--options.rise.seed", "1", "--options.rise.cells=2", "--quick"], command)
    ['--a_b=c-d', '--quick=true', '--options.rise={"seed": "1", "cells": "2"}']
    """
    import inspect

    parameters = inspect.signature(command).parameters if command is not None else {}
    flags = {f"--{name}" for name, parameter in parameters.items() if parameter.annotation in (bool, "bool")}
    parsed: list[str] = []
    repeated: dict[str, list[str]] = {
        f"--{name}": []
        for name, parameter in parameters.items()
        if parameter.annotation == "list[str]" and parameter.default is not parameter.empty
    }
    nested: dict[str, dict[str, str]] = {}
    rest = list(reversed(arguments))
    while rest:
        argument = rest.pop()
        option, equals, value = argument.partition("=")
        if not option.startswith("--"):
            parsed.append(argument)
            continue
        option = "--" + option[2:].replace("-", "_")
        if option in flags and not equals:
            given = rest and rest[-1].lower() in ("true", "false", "yes", "no")
            equals, value = "=", rest.pop() if given else "true"
        if option.startswith("--options.") and option.count(".") == 2:
            group, _, key = option.rpartition(".")
            nested.setdefault(group, {})[key] = value if equals or not rest else rest.pop()
        elif option in repeated and (equals or rest):
            repeated[option].append(value if equals else rest.pop())
        else:
            parsed.append(option + equals + value)
    joined = nested | {option: values for option, values in repeated.items() if values}
    return parsed + [f"{option}={json.dumps(values)}" for option, values in joined.items()]


def _give_up(command: str, error: Exception) -> NoReturn:
    """End with the message of an error that says what to do; other errors keep their traceback."""
    message = _meant_for_the_user(error) or _of_a_plugin(error) or _lost_process(error)
    if message is None:
        raise error
    status = getattr(message, "code", None)
    if getattr(message, "on_all_ranks", False):  # one message is enough
        from lightning_xai.commands.run_start import is_first

        if not is_first():
            sys.exit(status or 1)
    text = f"lightning_xai {command}: {message}"
    if status is None:
        sys.exit(text)
    print(text, file=sys.stderr)  # noqa: T201 - a run that a signal has stopped has its own status
    sys.exit(status)


def _refuse(arguments: Sequence[str], error: ArgumentError) -> NoReturn:
    """End with a parser's message alone: it would print all options before."""
    group = COMMANDS.get(arguments[0])
    below = list(group) if isinstance(group, Mapping) else []
    command = " ".join(["lightning_xai", arguments[0], *(name for name in arguments[1:2] if name in below)])
    text = f"{command}: {_sentence(str(error))} (`{command} --help` lists the options)"
    print(text, file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _sentence(message: str) -> str:
    """A parser's message on a value that fits none of an option's types, as one sentence; others on one line."""
    message = re.sub(r"<class '([^']*)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message)
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    option, rest = (f"--{key[1]}: ", message[key.end() :]) if key else ("", message)
    reasons = re.findall(r"^    - (.*(?:\n(?:      .*|(?=\n)))*)", rest, re.MULTILINE)
    for reason in reasons:
        problem, _, text = reason.partition(":\n")
        if problem.startswith("Problem with given class_path"):
            inner = _sentence(dedent(text))
            return f"{option[:-2]}.{inner[2:]}" if inner.startswith("--") else option + inner
    # That an option may also be left empty is no help.
    kinds = [each.removeprefix("Expected a ") for each in reasons if each != "Expected a NoneType"]
    given = re.search(r"^  Given value: (.*)", rest, re.MULTILINE | re.DOTALL)
    if kinds and given:
        rest = f"expected {' or '.join(kinds)}; got {given[1]}"
    unknown = re.search(r"dot import path string: (\w+)", rest)
    rest = _no_such_class(unknown[1]) if unknown else rest
    rest = re.sub(r"^Expected a (.*)\. Got value: ", r"expected \1; got ", " ".join(rest.split()))
    return option + rest


def _no_such_class(name: str) -> str:
    """What to write in place of a bare name that no loaded class has."""
    loaded = [module for key, module in sorted(sys.modules.items()) if key.startswith("lightning_xai.")]
    public = {each for module in loaded for each in getattr(module, "__all__", ())}
    near = get_close_matches(name, sorted(public), n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no class {name}{guess}: give the name of one that is loaded, or an import path as package.Class"


def _lost_process(error: BaseException) -> str | None:
    """Advice for a process that waits in vain for another one, if that is what an error means.

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
        deliberate = isinstance(error, (ValueError, RuntimeError, ImportError))
        raised_by = _raised_by(error)
        # Lightning's trainer checks its options itself.
        refused = isinstance(error, (TypeError, ValueError)) or type(error).__name__ == "MisconfigurationException"
        refused &= raised_by.startswith(("lightning.fabric.accelerators.", "lightning.pytorch.trainer.connectors."))
        if (
            (deliberate and raised_by.startswith("lightning_xai."))
            or refused
            or isinstance(error, (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError))
        ):
            return error
        error = error.__cause__
    return None


def _of_a_plugin(error: BaseException) -> str | None:
    """A ValueError that a plug-in raised, with the plug-in's name: a message to the user like those of this package."""
    package = _raised_by(error).partition(".")[0]
    for group in ("methods", "metrics", "sources", "targets") if isinstance(error, ValueError) else ():
        for point in entry_points(group=f"lightning_xai.{group}"):
            if point.value.partition(":")[0].partition(".")[0] == package:
                return f"plug-in {point.dist.name if point.dist else package}: {error}"
    return None


def _raised_by(error: BaseException) -> str:
    """Name of the module whose code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
