"""End a training at the step whose loss or gradient is not finite, or leave the step out."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_xai.training.resume import Resume

__all__ = ["FiniteSteps", "NonFiniteLossError"]

_SHOWN = 8
_MOST_IN_A_ROW = 20  # left-out steps in a row, of which no run recovers


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the step was not taken.

    Attributes:
        on_all_ranks: raised on every rank, so that one message is enough.
    """

    on_all_ranks = True


class _TrainedBatch(NamedTuple):
    """A batch of the step that is being made.

    Attributes:
        number: in its epoch.
        keys: of its B samples.
        loss: a number, still on the device.
        suspects: [B] bool, rows whose embeddings are not finite; None where the module does not tell.
    """

    number: int
    keys: list[str]
    loss: Tensor
    suspects: Tensor | None


class FiniteSteps(Callback):
    """Checks, before each step of the optimizer, that the loss of its batches and the gradient are finite on all ranks.

    Otherwise the step is not taken: the run ends there with an error on all ranks, or goes on without the step. The
    check waits for the device once a step. Under a gradient scaler (precision 16-mixed) an infinite gradient is the
    scaler's business, and only the loss counts.

    A step that is left out changes neither weights nor optimizer nor batch statistics; the number of steps and the
    learning rate go on. `train/skipped_steps` is logged: how many there were so far.

    Args:
        on_nonfinite: "stop" ends the run; "skip" leaves the step out.

    Attributes:
        skipped: the steps that were left out, counted from 1.

    Raises:
        NonFiniteLossError: in a step, on all ranks. It names the step, the rank, the samples and the last checkpoint.
            With "skip" only where the weights themselves are not finite, or where 20 steps in a row were not.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"] = "stop") -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite has to be stop or skip; got {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.skipped: list[int] = []
        self._batches: list[_TrainedBatch] = []
        self._current: tuple[int, list[str]] = (0, [])
        self._buffers: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget a step that an earlier run did not complete."""
        self._batches = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note whose batch it is, and keep the batch statistics from before the step."""
        self._current = (batch_idx, list(getattr(batch, "keys", None) or []))
        if not self._batches:
            self._buffers = [buffer.clone() for buffer in pl_module.buffers()]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss, without waiting for it."""
        suspects = getattr(pl_module, "suspects", None)
        self._batches.append(_TrainedBatch(*self._current, loss.detach(), suspects))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Refuse the step, or leave it out, if it is not finite on any rank."""
        batches, self._batches = self._batches, []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [_local(each.grad) for each in pl_module.parameters() if each.grad is not None]
        largest = [batch.loss.abs().max() for batch in batches]
        if gradients:
            largest.append(_largest(gradients))
        bad = not bool(torch.stack([number.float() for number in largest]).isfinite().all()) if largest else False
        if trainer.strategy.reduce_boolean_decision(bad, all=False):
            optimizer.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
            for buffer, before in zip(pl_module.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
            self._refuse(trainer, pl_module, batches)
        if self.on_nonfinite == "skip":
            pl_module.log("train/skipped_steps", float(len(self.skipped)))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how many steps were left out."""
        if self.skipped:
            rank_zero_info(
                f"{len(self.skipped)} of {trainer.global_step} steps were left out, because their loss or gradient was "
                f"not finite: {_listed(self.skipped)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The steps that were left out so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = list(state_dict["skipped"])

    def _refuse(self, trainer: L.Trainer, module: L.LightningModule, batches: list[_TrainedBatch]) -> None:
        """Raise the error, or count the step as left out."""
        step = trainer.global_step + 1
        what = f"in step {step} (epoch {trainer.current_epoch}) {_blame(trainer, batches)}"
        weights = next((name for name, each in module.named_parameters() if not _local(each).isfinite().all()), None)
        spoiled = trainer.strategy.reduce_boolean_decision(weights is not None, all=False)
        in_a_row = self.skipped[1 - _MOST_IN_A_ROW :] == list(range(step - _MOST_IN_A_ROW + 1, step))
        if self.on_nonfinite == "skip" and not spoiled and not in_a_row:
            self.skipped.append(step)
            rank_zero_warn(f"{what}; the step is left out, number {len(self.skipped)} of this run")
            return
        if spoiled:
            advice = f"The weights are not finite ({weights or 'on another rank'}): start from other weights"
        elif self.on_nonfinite == "skip":
            advice = f"So were the {_MOST_IN_A_ROW - 1} steps before, which is no accident"
        else:
            advice = "Look at these samples, lower the learning rate, or leave such steps out with --on_nonfinite=skip"
        resume = next((each for each in trainer.checkpoint_callbacks if isinstance(each, Resume)), None)
        last = trainer.strategy.broadcast(resume.last_saved() if resume and trainer.is_global_zero else "")
        raise NonFiniteLossError(f"{what}; the step was not taken, and training ends. {last}{advice}")


def _largest(gradients: list[Tensor]) -> Tensor:
    """The largest number, NaN where one is; infinite at either end."""
    if gradients[0].device.type != "cpu":
        return get_total_norm(gradients, math.inf)  # one kernel for many gradients
    # On the CPU the norm above reads one number at a time. A rank's part of a small parameter may be empty.
    found = [torch.stack(each.aminmax()).abs().max().float() for each in gradients if each.numel()]
    return torch.stack(found).max() if found else torch.zeros(())


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks; other tensors as they are."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def _blame(trainer: L.Trainer, batches: list[_TrainedBatch]) -> str:
    """What is not finite, on which rank, in which samples; all ranks have to call this."""
    own: list[tuple[int, int, str, list[str], bool]] = []
    for batch in batches:
        rows = [] if batch.suspects is None else batch.suspects.nonzero().flatten().tolist()
        loss = batch.loss.item()
        if rows or not math.isfinite(loss):
            keys = [batch.keys[row] for row in rows] if rows else batch.keys
            own.append((trainer.global_rank, batch.number, str(loss), keys, bool(rows)))
    found: list[Any] = [own]
    if trainer.world_size > 1:
        found = [None] * trainer.world_size
        dist.all_gather_object(found, own)
    every = [each for of_rank in found for each in of_rank]
    if not every:  # a loss that is finite, with a gradient that is not
        numbers = sorted({batch.number for batch in batches})
        keys = [key for batch in batches for key in batch.keys]
        return f"the gradient is not finite (batches {_listed(numbers)}, samples {_listed(keys)})"
    # The loss is of all ranks together: the rank to blame is the one whose own embeddings are not finite.
    blamed = [each for each in every if each[-1]] or every
    parts = [f"rank {rank}, batch {number}, samples {_listed(keys)}" for rank, number, _, keys, _ in blamed]
    return f"the loss is {blamed[0][2]} ({'; '.join(parts[:_SHOWN])})"


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
