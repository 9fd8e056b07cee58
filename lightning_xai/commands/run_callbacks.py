"""The callbacks and plugins that every run of Lightning's verbs has."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar

from lightning_xai.commands.run_start import RunStart
from lightning_xai.commands.training_options import refuse_finders
from lightning_xai.training import (
    DataFaults,
    FiniteSteps,
    MeasuredModel,
    PredictionWriter,
    Preflight,
    ProgressLog,
    Resume,
)
from lightning_xai.training.preflight import started_by_srun
from lightning_xai.training.run_folder import RunFolder

__all__ = ["cluster", "progress", "with_own"]


def with_own(callbacks: list[Callback], verb: str | None, options: Any, start: RunStart, keeps: bool) -> list[Callback]:
    """A run's callbacks and those that every run has.

    Args:
        callbacks: that the config gives.
        verb: None where nothing is run.
        options: of the verb.
        start: what it begins with.
        keeps: whether it writes checkpoints.

    Raises:
        ValueError: an option would do nothing next to one of the callbacks.
    """
    refuse_finders(callbacks)
    callbacks += list(_missing(callbacks, verb, options))
    if start.measured is not None:
        callbacks.append(MeasuredModel(start.measured))
    if verb in (None, "predict") or not keeps:
        return callbacks
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        callbacks.append(ModelCheckpoint(enable_version_counter=False))  # as Lightning would if there were none
    if verb == "fit" and (start.folder is not None or start.shares_folder):
        # Lightning would name a folder after the logger, which may be another one when the run goes on.
        folder = start.folder or RunFolder(Path(options.trainer.default_root_dir))
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder.models)
    # Last, so that its checkpoints hold the state of all other callbacks after a step.
    return [
        *callbacks,
        Resume(
            start.folder,
            minutes=options.save_every_minutes,
            settings=start.settings,
            chosen=None if start.checkpoint is None else start.checkpoint.name,
            measure_last=options.measure_last,
        ),
    ]


def _missing(callbacks: list[Callback], verb: str | None, options: Any) -> Iterator[Callback]:
    """What every run has, and these callbacks lack."""
    own: list[Callback] = [DataFaults(), Preflight()]
    if verb == "predict":
        run = options.run
        # A folder that is the same when it is started again, so that it goes on.
        folder = None if run is None else run / "predict" / "predictions"
        own.append(PredictionWriter(folder, maps=options.maps))
    if verb == "fit":
        own.append(FiniteSteps(options.on_nonfinite))
    for each in own:
        if not any(isinstance(given, type(each)) for given in callbacks):
            yield each
        elif option := _option_of(each, options):
            raise ValueError(
                f"--{option} does nothing next to a {type(each).__name__} among the callbacks: give it to that one"
            )


def _option_of(callback: Callback, options: Any) -> str | None:
    """The option of the command line that was given for a callback that every run has."""
    if isinstance(callback, PredictionWriter) and options.maps is not None:
        return "maps"
    if isinstance(callback, FiniteSteps) and options.on_nonfinite != "stop":
        return "on_nonfinite"
    return None


def cluster(plugins: list[Any]) -> list[ClusterEnvironment]:
    """Slurm's processes in a step of srun, where no other environment is given.

    Lightning would ignore srun in an interactive allocation: each task would train by itself, as rank 0.
    """
    if not started_by_srun() or any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        return [SLURMEnvironment()]


def progress(callbacks: list[Any]) -> dict[str, Any]:
    """Show progress as lines where the output is no terminal: adds them to the callbacks; returns trainer options."""
    if sys.stdout.isatty():
        return {}
    if not any(isinstance(callback, ProgressLog) for callback in callbacks):
        callbacks.append(ProgressLog())
    # All that a log would get of a bar is its last state.
    return {} if any(isinstance(callback, ProgressBar) for callback in callbacks) else {"enable_progress_bar": False}
