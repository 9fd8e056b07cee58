"""Lines of progress for logs, where no bar can be drawn."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_xai.training.schedule import remaining_steps

__all__ = ["ProgressLog"]


class ProgressLog(Callback):
    """Prints a line for each epoch, and in between whenever `minutes` have passed since the last line.

    A line of training has the epoch, the step, the loss of the last batch, the samples of all processes a second since
    the previous line (validation does not count), and the time left, validations included. A line of an evaluation has
    the batch and the time left. `fit` and the other verbs add this callback where their output is no terminal, in place
    of the progress bar; add it to a config's callbacks to choose the minutes.

    Args:
        minutes: most time between two lines, above 0; each is printed at the end of a batch.

    Raises:
        ValueError: `minutes` is not positive.
    """

    def __init__(self, minutes: float = 2.0) -> None:
        if not minutes > 0:
            raise ValueError(f"minutes has to be positive; got {minutes}")
        self.minutes = minutes
        self._start = (0.0, 0)  # of this process's training: the time, and the step that it goes on from
        self._evaluation = 0.0  # start of the current one
        self._line = 0.0  # time of the last line
        self._trained = (0, 0.0)  # since then: batches, and the time that their clock was set to

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._line = now = time.monotonic()
        self._start, self._trained = (now, trainer.global_step), (0, now)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Print a line if it is time to; after the last batch, that of the epoch follows."""
        self._trained = (self._trained[0] + 1, self._trained[1])
        if not trainer.is_last_batch and self._due():
            self._print_training(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the epoch."""
        self._print_training(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of an evaluation."""
        self._evaluation = time.monotonic()
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            self._line = self._evaluation

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if it is time to."""
        if not self._due():
            return
        stage = trainer.state.stage
        assert stage is not None
        totals = {
            "sanity_check": trainer.num_sanity_val_batches,
            "validate": trainer.num_val_batches,
            "test": trainer.num_test_batches,
            "predict": trainer.num_predict_batches,
        }
        total, done = totals[stage.value][dataloader_idx], batch_idx + 1
        left = (time.monotonic() - self._evaluation) / done * (total - done)
        what = "validation before training" if trainer.sanity_checking else stage.value
        self._print(trainer, [f"{what}: batch {done:,}/{total:,}", _left(left)])

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the time of a validation out of the speed of training."""
        self._trained = (self._trained[0], self._trained[1] + time.monotonic() - self._evaluation)

    def _due(self) -> bool:
        return time.monotonic() - self._line > 60 * self.minutes

    def _print_training(self, trainer: L.Trainer) -> None:
        now, step, rest = time.monotonic(), trainer.global_step, remaining_steps(trainer)
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        parts = [f"epoch {trainer.current_epoch + 1}{epochs}, step {step:,}"]
        if rest != math.inf:
            parts[0] += f"/{int(step + rest):,}"
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            parts.append(f"loss {float(loss):.4f}")
        batches, since = self._trained
        size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        if isinstance(size, int) and batches and now > since:
            parts.append(f"{batches * size * trainer.world_size / (now - since):,.0f} samples/s")
        began, first = self._start
        timers = (each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer))  # type: ignore[attr-defined]
        left = [seconds for seconds in timers if seconds is not None]
        if rest != math.inf and step > first:
            left.append((now - began) / (step - first) * rest)
        parts += [_left(min(left))] if left else []
        self._print(trainer, parts)
        self._trained = (0, now)

    def _print(self, trainer: L.Trainer, parts: list[str]) -> None:
        self._line = time.monotonic()
        if trainer.is_global_zero:
            print(", ".join(parts), flush=True)  # noqa: T201 - a log without lines looks like a run that hangs


def _left(seconds: float) -> str:
    """Time left, as `1:02:03 left`.

    Example:
        >>> _left(3723.4)
        '1:02:03 left'
    """
    return f"{timedelta(seconds=max(round(seconds), 0))} left"
