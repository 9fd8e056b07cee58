"""Where in a training its steps, its validations and its end fall, where gradients are summed up over batches.

A step is made of as many batches as are accumulated; the last one of an epoch may have fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = [
    "Placement",
    "accumulated",
    "completes_step",
    "ends_training",
    "is_complete",
    "planned_steps",
    "remaining_steps",
    "steps_of_epochs",
    "validates_after",
]


def accumulated(trainer: L.Trainer, epoch: int) -> int:
    """Number of batches that make a step in an epoch, counted from 0."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # Lightning leaves it undeclared
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def planned_steps(trainer: L.Trainer) -> float:
    """Number of steps of the whole run; infinite where nothing bounds it but time, or the data's length is unknown.

    In place of Lightning's `estimated_stepping_batches`, which counts as if every epoch accumulated alike.
    """
    total = trainer.estimated_stepping_batches
    if total == -1:
        return math.inf
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs in (None, -1) or batches == math.inf:
        return total
    steps = steps_of_epochs(trainer, int(batches), range(max(epochs, 1)))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def steps_of_epochs(trainer: L.Trainer, batches: int, epochs: Iterable[int]) -> int:
    """Number of steps of some epochs, counted from 0, of so many batches each."""
    return sum(math.ceil(batches / accumulated(trainer, epoch)) for epoch in epochs)


def remaining_steps(trainer: L.Trainer) -> float:
    """Number of steps after the batch that has just been trained on; infinite where nothing bounds it but time."""
    left = math.inf if trainer.max_steps == -1 else float(trainer.max_steps - trainer.global_step)
    batches, epochs, epoch = trainer.num_training_batches, trainer.max_epochs, trainer.current_epoch
    if epochs in (None, -1) or batches == math.inf:
        return left
    rest = int(batches) - trainer.fit_loop.batch_idx - 1
    steps = math.ceil(rest / accumulated(trainer, epoch))
    return min(left, float(steps + steps_of_epochs(trainer, int(batches), range(epoch + 1, epochs))))


def completes_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """True if the optimizer steps after a batch of the current epoch, which is the one that is trained on."""
    return trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def validates_after(trainer: L.Trainer, batch_idx: int) -> bool:
    """True if a validation is scheduled after a batch that completes a step, or after an earlier one of that step."""
    first = batch_idx - batch_idx % trainer.accumulate_grad_batches
    return any(_scheduled(trainer, number) for number in range(first, batch_idx + 1))


def _scheduled(trainer: L.Trainer, batch_idx: int) -> bool:
    """Lightning's own rule for a batch of the current epoch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None or every == math.inf:
        return False
    if epochs is None:  # counted over epochs
        batch_idx += trainer.fit_loop.total_batch_idx - trainer.fit_loop.batch_idx
    elif (trainer.current_epoch + 1) % epochs:
        return False
    return bool((batch_idx + 1) % every == 0)


def is_complete(trainer: L.Trainer) -> bool:
    """True if the step just made is the last of `max_steps` or `max_epochs`."""
    epochs = trainer.max_epochs
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return epochs not in (None, -1) and trainer.current_epoch + trainer.is_last_batch >= epochs


def stops_early(trainer: L.Trainer) -> bool:
    """True if a callback has asked for the end (early stopping, `max_time`) and the least of steps is made."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def ends_training(trainer: L.Trainer) -> bool:
    """True if the step just made is the last one of this process."""
    return is_complete(trainer) or stops_early(trainer)


class Placement:
    """Moves a validation, or the wish to stop, out of an accumulated step to after it, or makes a validation.

    Lightning would validate, save and stop between the batches of a step, whose gradients are in no checkpoint. It
    decides right after `on_train_batch_end`, by attributes of the trainer that are set here and put back as soon as
    that is over.
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}
        self._stop_later = False

    def hold(self, trainer: L.Trainer) -> None:
        """Let neither a validation nor the end of training fall after the current batch."""
        self._stop_later |= trainer.should_stop
        trainer.should_stop = False
        self._set(trainer, val_check_batch=math.inf, _val_check_time_interval=None)

    def go_on(self, trainer: L.Trainer) -> None:
        """Let a wish to stop count again that came inside the step that is complete now."""
        trainer.should_stop |= self._stop_later
        self._stop_later = False

    def validate(self, trainer: L.Trainer) -> None:
        """Have a validation after the current batch, whatever is scheduled."""
        self._set(trainer, val_check_batch=1, check_val_every_n_epoch=1, _val_check_time_interval=None)

    def restore(self, trainer: L.Trainer) -> None:
        """Put the trainer's schedule back."""
        for name, value in self._before.items():
            setattr(trainer, name, value)
        self._before = {}

    def _set(self, trainer: L.Trainer, **values: Any) -> None:
        self.restore(trainer)
        for name, value in values.items():
            self._before[name] = getattr(trainer, name, None)
            setattr(trainer, name, value)
