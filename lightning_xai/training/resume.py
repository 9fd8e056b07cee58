"""Stop a training run at any moment and resume it exactly: checkpoints within epochs, signals, requeueing."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.sample import stable_hash
from lightning_xai.training.elastic import go_on_elastically
from lightning_xai.training.preflight import slurm_job
from lightning_xai.training.run_folder import CHECKPOINT_KEY, RunFolder, RunFolderError, RunRecord
from lightning_xai.training.run_loggers import log_measured, logger_ids, outlast
from lightning_xai.training.schedule import (
    Placement,
    accumulated,
    completes_step,
    ends_training,
    is_complete,
    planned_steps,
    validates_after,
)

__all__ = ["Resume", "RunStoppedError"]

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_KEPT = 2  # the newest, and one more in case a disk damages it


class RunStoppedError(RuntimeError):
    """A signal has stopped the run at the end of a batch; the message says how to resume it.

    Attributes:
        code: the process's exit status.
        on_all_ranks: raised on every rank, so that one message is enough.
    """

    on_all_ranks = True

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Resume(Checkpoint):
    """Lets a training run be stopped at any moment and end with the weights and numbers of an uninterrupted one.

    Checkpoints are written into the run's folder at the end of a batch: every `minutes`, before the last batch of an
    epoch, after each validation and epoch, and when the process has to stop. A checkpoint whose writing is interrupted
    is never visible, see `RunFolder`. On SIGUSR1, which Slurm sends before the time limit, the run saves, puts the job
    back into the queue, and ends. On SIGTERM (preemption, `scancel`, `kill`) and SIGINT (Ctrl-C; a second one ends at
    once) it saves and ends. All ranks do so at the same batch, no matter which of them got the signal. In evaluation a
    signal ends the run between two batches; nothing is saved, since evaluations store results that can be resumed
    themselves.

    So that a resumed run repeats what it would have done, the random numbers of each training batch depend only on the
    seed, the epoch, the batch and the rank. A checkpoint gets its name only when all that was logged before is on disk.

    Args:
        folder: of the run; None: that of the trainer's logger.
        minutes: most time between two checkpoints, above 0.
        settings: all that decides the run's numbers; recorded, and compared when the run is resumed.
        chosen: file name of the checkpoint that this process starts from; all ranks have to agree.
        measure_last: validate after the last step, wherever in the trainer's schedule it falls. Where `max_time` ends
            the run before its time, that chooses no best model and stops no run early: the run goes on later.

    Raises:
        ValueError: `minutes` is not positive.
        RunFolderError: in `setup`: the folder is in use or cannot be written to, or ranks would start differently.
    """

    def __init__(
        self,
        folder: RunFolder | None = None,
        *,
        minutes: float = 10.0,
        settings: Mapping[str, Any] | None = None,
        chosen: str | None = None,
        measure_last: bool = True,
    ) -> None:
        if not minutes > 0:
            raise ValueError(f"minutes has to be positive; got {minutes}")
        self.minutes = minutes
        self.measure_last = measure_last
        self._folder = folder
        self._named = folder is not None
        self._settings = settings or {}
        self._chosen = chosen
        self._record: RunRecord | None = None
        self._seed = 0
        self._received: set[int] = set()
        self._group: Any = None
        self._saved_at = 0.0
        self._pending: int | None = None
        self._stopping: int | None = None
        self._placement = Placement()
        self._interrupted = False
        self._complete = False
        self._moved = False
        self._aside: list[Callback] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lock the run's folder, and check that all ranks start from the same checkpoint."""
        self._received.clear()
        self._pending = self._stopping = None
        self._interrupted = self._complete = False
        outlast(trainer.loggers, lambda: bool(self._received))
        log_measured(trainer.loggers)
        if dist.is_available() and dist.is_initialized() and dist.get_backend() != "gloo":
            # Ranks agree on stopping by numbers in the host's memory, so that no step has to wait for its device.
            self._group = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        if isinstance(data := getattr(trainer, "datamodule", None), ShardDataModule):
            data.elastic = True
        _make_absolute(_model_checkpoints(trainer))
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        if self._folder is None:
            self._folder = RunFolder(Path(trainer.log_dir or trainer.default_root_dir))
        failure: str | None = None
        if trainer.is_global_zero:
            try:
                self._record = self._enter(self._folder, trainer)
            except RunFolderError as error:
                failure = str(error)
        failure, self._record, first = trainer.strategy.broadcast((failure, self._record, self._chosen))
        if failure is not None:
            raise RunFolderError(failure)
        if first != self._chosen:
            raise RunFolderError(
                f"rank {trainer.global_rank} would start from {self._chosen or 'the beginning'}, rank 0 from "
                f"{first or 'the beginning'}: {self._folder.path} does not show all nodes the same files; use a folder "
                "on a shared file system, and start the same command again"
            )

    def _enter(self, folder: RunFolder, trainer: L.Trainer) -> RunRecord:
        """Lock the folder, and record what is new: the run, more epochs, the loggers' ids."""
        folder.lock()
        record = folder.read() if self._chosen is not None else None
        record = record or folder.begin(self._settings)
        if self._settings and self._chosen is not None:
            record = folder.extend(record, self._settings, self._chosen)
        return folder.note_loggers(record, logger_ids(trainer.loggers))

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle signals in place of Lightning, which has set its own handlers by now."""
        self._listen()

    on_test_start = on_sanity_check_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock for checkpoints, and accumulate as in the epoch that a resumed run goes on in.

        Let the learning rate of a run that trains for longer follow.
        """
        self._listen()
        # Lightning's scheduler of accumulation asks only at the start of an epoch.
        trainer.accumulate_grad_batches = accumulated(trainer, trainer.current_epoch)
        if trainer.fit_loop.epoch_loop.restarted_on_last and not trainer.is_last_batch:
            # Saved after a validation. Lightning takes the batch for complete only if it expects one there.
            self._placement.validate(trainer)
        longer = self._record is not None and self._record.longer
        if longer or self._moved:
            text = _follow_schedule(trainer)
            begins = longer and longer[-1].startswith(f"from {self._chosen} on")
            if begins and trainer.is_global_zero:
                print(text, flush=True)  # noqa: T201 - the schedule bends here
        self._saved_at = time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the checkpoint of the previous batch."""
        self._listen()
        self._placement.restore(trainer)
        self._commit(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the checkpoint of the previous epoch."""
        self._settle(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Complete the checkpoint of the previous batch, stop there if a signal asked for it, else seed this batch."""
        self._placement.restore(trainer)
        self._settle(trainer)
        seed = stable_hash("batch", self._seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to or a signal has come; where a validation follows, only after it."""
        if not completes_step(trainer, batch_idx):
            self._placement.hold(trainer)  # gradients that are still being summed up are in no checkpoint
            return
        self._placement.go_on(trainer)
        due, signum = self._agree(trainer)
        due |= self._costly_follows(trainer, batch_idx)
        last, scheduled, ends = trainer.is_last_batch, validates_after(trainer, batch_idx), ends_training(trainer)
        self._complete = is_complete(trainer)
        interrupted = ends and not self._complete and _out_of_time(trainer)
        validates = trainer.enable_validation and (scheduled or (ends and self.measure_last))
        if validates:
            self._placement.validate(trainer)
        if interrupted and not last:
            # Lightning ends the epoch here as if it were over; we resume within it.
            self._interrupted = True
            if not scheduled:
                self._stopping = signum
                self._save(trainer)
        if interrupted and not scheduled:
            self._set_choosers_aside(trainer)
        elif last or validates:
            self._stop(trainer, signum)
        elif due or signum is not None or ends:
            self._stopping = signum
            self._save(trainer)

    def _costly_follows(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """True if the next step ends an epoch or the run, or a validation follows it.

        A stop inside that validation then costs that step only.
        """
        following = batch_idx + trainer.accumulate_grad_batches
        ends = following + 1 >= trainer.num_training_batches or trainer.global_step + 1 == trainer.max_steps
        return ends or validates_after(trainer, following)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop between two batches."""
        self._stop(trainer, self._agree(trainer)[1])

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation within an epoch; after one at its end, `on_train_epoch_end` saves."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if trainer.is_last_batch:
            self._take_choosers_back(trainer)
        elif not self._aside:
            self._save(trainer)
            if self._interrupted:  # the epoch, which is not over, is ended next
                self._set_choosers_aside(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if the epoch is over; in one that ends before its last batch, that has been done after the last one."""
        if trainer.is_last_batch:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the last checkpoint."""
        self._take_choosers_back(trainer)
        self._commit(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the run is finished."""
        if self._folder is None or self._record is None or not trainer.is_global_zero:
            return
        if _out_of_time(trainer) and not self._complete:
            rank_zero_warn(
                f"max_time is over, the run in {self._folder.path} is not finished: --run={self._folder.path} with a "
                "longer max_time resumes it"
            )
            return
        self._folder.finish(self._record)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Release the folder, and end the processes that Lightning has started, which it would leave running."""
        self.teardown(trainer, pl_module, "fit")
        kill = getattr(trainer.strategy.launcher, "kill", None)
        if kill is not None and not isinstance(exception, RunStoppedError):
            kill(signal.SIGTERM)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the folder."""
        if self._folder is not None:
            self._folder.release()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the run's id into every checkpoint."""
        if self._record is not None:
            assert self._folder is not None, "it has been entered with the record"
            checkpoint[CHECKPOINT_KEY] = {"id": self._record.id, "folder": os.path.realpath(self._folder.path)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let checkpoint callbacks remember their best models, and go on with another number of processes.

        Lightning forgets best models where its path of the folder is not the same text, as when it has been moved.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for kept in _model_checkpoints(trainer):
            state = checkpoint.get("callbacks", {}).get(kept.state_key)
            if state is None or kept.dirpath is None or state.get("dirpath") in (None, kept.dirpath):
                continue
            before, state["dirpath"] = state["dirpath"], str(kept.dirpath)
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[name] = _moved(state.get(name), before, state["dirpath"])
            scores = state.get("best_k_models") or {}
            state["best_k_models"] = {_moved(path, before, state["dirpath"]): each for path, each in scores.items()}
        text = go_on_elastically(trainer, checkpoint)
        self._moved = text is not None
        if text is not None and trainer.is_global_zero:
            print(text, flush=True)  # noqa: T201 - it changes what a step is
            if self._folder is not None and self._record is not None:
                self._record = self._folder.note(self._record, f"after step {checkpoint['global_step']}: {text}")

    def last_saved(self) -> str:
        """A sentence on the newest checkpoint, for messages of rank 0."""
        newest = self._folder.newest(self._record) if self._folder is not None and self._record is not None else None
        if newest is None:
            return "There is no checkpoint yet. "
        return f"The last finite checkpoint is {newest}; {self._command()} to go on from there. "

    def _listen(self) -> None:
        # Lightning has kept the handlers from before, and restores them in its teardown.
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in self._received:
            raise KeyboardInterrupt
        # Only noted: a collective operation may be under way, so nothing else is safe here.
        self._received.add(signum)

    def _agree(self, trainer: L.Trainer) -> tuple[bool, int | None]:
        """Decide whether to save and by which signal to stop, the same on all ranks."""
        due = trainer.is_global_zero and time.monotonic() - self._saved_at > 60 * self.minutes
        wishes = [due, *(signum in self._received for signum in _SIGNALS)]
        if trainer.world_size > 1:
            shared = torch.tensor(wishes, dtype=torch.int32)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
            wishes = [bool(wish) for wish in shared.tolist()]
        return wishes[0], next((signum for signum, wish in zip(_SIGNALS, wishes[1:], strict=True) if wish), None)

    def _set_choosers_aside(self, trainer: L.Trainer) -> None:
        """Hide the callbacks that choose a best model or stop early from a measurement that only an interruption made.

        The run goes on later and does not have it there, so it must not replace the best model so far.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not self._aside:
            self._aside = callbacks
            choosers = [
                each for each in callbacks if isinstance(each, (Checkpoint, EarlyStopping)) and each is not self
            ]
            trainer.callbacks = [each for each in callbacks if each not in choosers]  # type: ignore[attr-defined]

    def _take_choosers_back(self, trainer: L.Trainer) -> None:
        if self._aside:
            trainer.callbacks, self._aside = self._aside, []  # type: ignore[attr-defined]

    def _save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint under a temporary name, until all that was logged before is on disk."""
        if self._folder is None or self._record is None:
            return  # a dry run (fast_dev_run) leaves no files
        self._commit(trainer)
        step = trainer.global_step
        trainer.save_checkpoint(self._folder.pending(step), weights_only=False)
        self._pending = step
        self._saved_at = time.monotonic()

    def _commit(self, trainer: L.Trainer) -> None:
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        if trainer.is_global_zero:
            assert self._folder is not None
            for logger in trainer.loggers:
                logger.save()
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.flush()
            self._folder.commit(step, _KEPT)

    def _settle(self, trainer: L.Trainer) -> None:
        self._commit(trainer)
        self._stop(trainer, self._stopping)

    def _stop(self, trainer: L.Trainer, signum: int | None) -> None:
        if signum is None:
            return
        name = signal.Signals(signum).name
        step = f"stopped by {name} after step {trainer.global_step}"
        if signum == signal.SIGUSR1 and (job := slurm_job()) is not None and _may_requeue(trainer):
            requeued = _requeue(job) if trainer.is_global_zero else ""
            requeued = trainer.strategy.broadcast(requeued)
            if not requeued:
                raise RunStoppedError(f"{step}; the job is back in the queue and will resume from there", 0)
            raise RunStoppedError(f"{step}, but the job could not be requeued ({requeued}): submit it again", 1)
        raise RunStoppedError(f"{step}; {self._command()} to resume", 128 + signum)

    def _command(self) -> str:
        how = "" if self._named or self._folder is None else f" with --run={self._folder.path}"
        return f"start the same command again{how}"


def _follow_schedule(trainer: L.Trainer) -> str:
    """Set the learning rates to what the schedules of the longer run say now; returns a sentence for each."""
    total = planned_steps(trainer)
    lines = []
    for config in trainer.lr_scheduler_configs:
        scheduler, name = config.scheduler, type(config.scheduler).__name__
        by_step = config.interval == "step"
        steps = scheduler.last_epoch if by_step and hasattr(scheduler, "last_epoch") else trainer.global_step
        group = scheduler.optimizer.param_groups[0]
        if not isinstance(scheduler, LambdaLR):
            lines.append(f"{name} goes on with its own settings from step {steps} on, at {group['lr']:.3g}.")
            continue
        # The checkpoint holds the rate of the shorter run's schedule, which would be taken for one more step.
        before = group["lr"]
        for each, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            each["lr"] = base * factor(scheduler.last_epoch)
        scheduler._last_lr = [each["lr"] for each in scheduler.optimizer.param_groups]
        end = "" if math.isinf(total) or not by_step else f" of {int(total):,} steps"
        last = (
            "" if not end else f", and ends with {scheduler.base_lrs[0] * scheduler.lr_lambdas[0](int(total) - 1):.3g}"
        )
        lines.append(
            f"The learning rate follows the schedule{end} from step {steps:,} on: it was {before:.3g}, goes on with "
            f"{group['lr']:.3g}{last}."
        )
    return "\n".join(lines)


def _model_checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]


def _make_absolute(kept: Sequence[ModelCheckpoint]) -> None:
    """Make folders of checkpoints known again from another working directory."""
    for each in kept:
        if each.dirpath and "://" not in str(each.dirpath):
            each.dirpath = os.path.realpath(each.dirpath)


def _moved(path: str | None, before: str, now: str) -> str:
    """A file's path in the folder that is now elsewhere; one that is not there stays where it was."""
    if not path or "://" in path:
        return path or ""
    candidate = os.path.normpath(os.path.join(now, os.path.relpath(path, before)))
    return candidate if os.path.exists(candidate) else path


def _out_of_time(trainer: L.Trainer) -> bool:
    """True if the trainer's `max_time` has stopped it."""
    timers = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)


def _may_requeue(trainer: L.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    # A strategy of one process has no environment.
    return environment.auto_requeue if isinstance(environment, SLURMEnvironment) else environment is None


def _requeue(job: str) -> str:
    """Put this job back into Slurm's queue; returns why that failed, or an empty text."""
    try:
        # Nothing here comes from a user: the job's number is Slurm's own.
        result = subprocess.run(  # noqa: S603
            ["scontrol", "requeue", job],  # noqa: S607 - its folder depends on the cluster
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if result.returncode == 0 else result.stderr.strip() or f"scontrol ended with {result.returncode}"
