"""Options of Lightning's verbs that would do nothing, or something else than they say: refused, or put right."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import Optimizer

from lightning_xai.training.contrastive import ContrastiveModule
from lightning_xai.training.schedule import planned_steps

__all__ = ["check_optimizer", "lists_replaced", "refuse_finders", "with_scheduler"]

# The trainer's options that are lists of objects.
_LISTS = ("callbacks", "logger", "plugins")
# Options of the model that --optimizer has options of its own for, and those that it has none for.
_REPLACED = ("initial_lr", "final_lr", "weight_decay", "betas")
_LOST = (
    "schedule", "warmup_steps", "image_lr_factor", "text_lr_factor", "layer_decay", "decay_norms_and_biases",
)  # fmt: skip


def lists_replaced(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a list of callbacks, loggers or plugins takes the place of an earlier one as a whole.

    The parser merges lists of the same length by position, so that an object would get options that an earlier config
    gave to another one at its place. Where the earlier list is set to null in between, there is nothing to merge with.

    >>> lists_replaced(["fit", "--trainer.callbacks=[{class_path: EarlyStopping}]"])
    ['fit', '--trainer.callbacks=null', '--trainer.callbacks=[{class_path: EarlyStopping}]']
    """
    replaced: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        replaced += [f"--trainer.{name}=null" for name in _lists_in(option, value if equals else following)]
        replaced.append(argument)
    return replaced


def _lists_in(option: str, value: str) -> Iterator[str]:
    """The trainer's lists that an option gives: `--config FILE`, `--trainer FILE`, `--trainer.callbacks [...]`."""
    keys = [] if option in ("--config", "-c") else option.removeprefix("--").split(".")
    if keys[:1] not in ([], ["trainer"]):
        return
    try:
        text = Path(value).read_text()
    except (OSError, ValueError):
        text = value
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return  # the parser says what is wrong
    for key in reversed(keys):
        content = {key: content}
    trainer = content.get("trainer") if isinstance(content, dict) else None
    if isinstance(trainer, dict):
        yield from (name for name in _LISTS if isinstance(trainer.get(name), list))


def check_optimizer(config: Any) -> list[str]:
    """Look for options of the optimizer that would do nothing.

    Args:
        config: of one verb.

    Returns:
        Names of the model's options that were given, and that the options of `--optimizer` replace.

    Raises:
        ValueError: a scheduler without an optimizer, or options of the model that an optimizer takes away.
    """
    if not config.get("optimizer"):
        if config.get("lr_scheduler"):
            raise ValueError(
                "--lr_scheduler does nothing without --optimizer: give --optimizer, too (as --optimizer=AdamW "
                "--optimizer.lr=1e-5), or leave it out and choose --model.init_args.schedule"
            )
        return []
    given = (config.get("model") or {}).get("init_args") or {}
    defaults = inspect.signature(ContrastiveModule.__init__).parameters
    changed = [name for name in (*_REPLACED, *_LOST) if name in given and _differs(given[name], defaults[name].default)]
    lost = [name for name in changed if name in _LOST]
    if lost:
        raise ValueError(
            f"--optimizer takes the place of the model's own optimizer, so that {', '.join(lost)} would do nothing: "
            "leave --optimizer out, or leave them out and give --lr_scheduler"
        )
    return changed


def refuse_finders(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that look for a setting by training on trial.

    Raises:
        ValueError: there is one.
    """
    for callback in callbacks:
        if isinstance(callback, LearningRateFinder):
            raise ValueError(
                "LearningRateFinder looks for one rate, by a loss that falls while the rate rises; here the rate goes "
                "from initial_lr to final_lr by a schedule, so what it finds has no place: leave it out, and compare "
                "short runs (--trainer.max_steps) with several --model.init_args.initial_lr and final_lr"
            )
        if isinstance(callback, BatchSizeFinder):
            raise ValueError(
                "BatchSizeFinder changes the batch, whose pairs are each other's negatives, so that it would change "
                "what is trained: leave it out, set --data.init_args.batch_size, and where memory is short "
                "--model.init_args.chunk_size"
            )


def with_scheduler(module: LightningModule, optimizer: Optimizer, scheduler: Any) -> Any:
    """Return what `configure_optimizers` does: the scheduler is stepped as the built-in one is, at every step."""
    if scheduler is None:
        return optimizer
    name, entry = type(scheduler).__name__, {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        entry |= {"interval": "epoch", "monitor": scheduler.monitor}
        text = f"{name} looks at {scheduler.monitor} once an epoch"
    else:
        steps = planned_steps(module.trainer)
        text = f"{name} moves on after every step, not every epoch: its options count steps"
        text += "" if steps == math.inf else f", of which there are {int(steps)}"
    _print(text)
    return {"optimizer": optimizer, "lr_scheduler": entry}


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - shown before hours of computing


def _differs(value: Any, default: Any) -> bool:
    return (list(value) if isinstance(value, tuple) else value) != (
        list(default) if isinstance(default, tuple) else default
    )
