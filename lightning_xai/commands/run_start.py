"""The folder that a start of Lightning's verbs belongs to, and what it begins with there."""

from __future__ import annotations

import itertools
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_xai.commands.run_settings import comparable
from lightning_xai.training.preflight import slurm_job
from lightning_xai.training.run_folder import RunFolder, RunModel, run_of
from lightning_xai.training.run_loggers import keep_rows, placed_loggers

__all__ = ["RunStart", "is_first", "new_folder", "refuse_foreign", "say"]

_NEW_FOLDER = "LIGHTNING_XAI_NEW_FOLDER"
"""Environment variable by which the first process names to those that it starts in which folder they write."""


@dataclass
class RunStart:
    """What a start of a verb begins with.

    Attributes:
        settings: of a training, all that decides its numbers.
        folder: of the run that is trained; None: another one for each start.
        checkpoint: that training goes on from.
        measured: the run's model that other verbs measure.
        shares_folder: whether no logger makes a folder for each start.
        logger_ids: of the loggers that training goes on with.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    folder: RunFolder | None = None
    checkpoint: Path | None = None
    measured: RunModel | None = None
    shares_folder: bool = False
    logger_ids: dict[str, dict[str, str]] = field(default_factory=dict)

    def enter(self, run: Path, trainer: Any) -> None:
        """Lock a run's folder, direct all output there, and find the checkpoint to resume from."""
        self.folder = RunFolder(run, comparable)
        if is_first():
            self.folder.lock()
        record = self.folder.read()
        if record is not None:
            self.checkpoint = self.folder.newest(record)
            for name, reason in self.folder.skipped.items():
                say(f"Skipped {name} in {self.folder.checkpoints}: {reason}")
            if self.checkpoint is None and not record.finished:
                self.folder.refuse_unreadable()
                say(f"The run in {run} was stopped before its first checkpoint; it starts over.")
            else:
                longer = self.folder.check(record, self.settings)
                if record.finished and not longer:
                    say(
                        f"The run in {run} is finished; more --trainer.max_epochs trains it for longer, "
                        "--run=ANOTHER_FOLDER starts a new one."
                    )
                    raise SystemExit(0)
                if self.checkpoint is None:
                    self.folder.refuse_lost()
                if longer:
                    say(f"Training the run in {run} for longer: {', '.join(longer)}")
                say(f"Resuming the run in {run} from {self.checkpoint}")
                self.logger_ids = record.loggers
        if is_first():
            keep_rows(run, self.checkpoint)
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # its table is kept
        _write_into(trainer, run, version="")

    def take_model(self, config: Any, verb: str, named: bool) -> None:
        """Choose the model of a run that is to be measured, and direct all output into the run's folder."""
        if not named:  # a config.yaml speaks for the folder that it lies in, wherever that has been moved to
            runs = [run_of(Path(str(path))) for path in config.config or [] if Path(str(path)).name == "config.yaml"]
            config.run = next((run.path for run in runs if run is not None), config.run)
        if config.run is None:
            if config.ckpt_path in ("best", "last"):
                raise ValueError(f"--ckpt_path={config.ckpt_path} is that of a training run: name it, --run=FOLDER")
            return
        model = config.model
        # An evaluation of attributions makes its model from the file itself, and describes it by its name.
        evaluates = model.class_path.endswith(".AttributionEvaluation")
        if evaluates and config.ckpt_path is None and model.init_args.model.endswith(".ckpt"):
            config.ckpt_path = model.init_args.model
        self.measured = RunFolder(config.run).model(config.ckpt_path)
        # What training alone needs is not taken up, on purpose: the warnings read as if another model were measured.
        for message in ("Be aware that when using `ckpt_path`", "The dirpath has changed"):
            warnings.filterwarnings("ignore", message=message)
        config.ckpt_path = self.measured.path
        if evaluates:
            model.init_args.model, model.init_args.pretrained, config.ckpt_path = self.measured.path, None, None
        # The run's own config.yaml must not be overwritten.
        _write_into(config.trainer, config.run / verb, version=None)


def _write_into(trainer: Any, folder: Path, version: str | None) -> None:
    """Direct all output of a configured trainer into a folder."""
    trainer.default_root_dir = str(folder)
    trainer.logger = placed_loggers(trainer.logger, folder, version)


def refuse_foreign(config: Any) -> None:
    """Refuse checkpoints of other jobs that Lightning would start from inside a Slurm job."""
    if "SLURM_JOB_ID" not in os.environ or config.get("ckpt_path"):
        return
    foreign = sorted(Path(config.trainer.default_root_dir or ".").glob("hpc_ckpt_*"))
    if foreign:
        raise ValueError(
            f"{foreign[-1]} is a checkpoint of an earlier job, and Lightning would start from it: move it away, or "
            f"name it with --ckpt_path={foreign[-1]} to start from it"
        )


def new_folder(root: Path, verb: str, belongs: bool) -> Path:
    """A new `version_N`, the same one for all processes of this start.

    Processes that another program has started cannot agree on one: in a run's folder for a verb (`belongs`) they take
    that itself.

    Raises:
        ValueError: they cannot agree, and there is no such folder.
    """
    if _NEW_FOLDER in os.environ and not is_first():
        return Path(os.environ[_NEW_FOLDER])
    if slurm_job() is not None:
        return root / f"slurm-{slurm_job()}-{verb}"
    if not is_first() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if belongs:
            return root
        raise ValueError(
            "the processes of a group cannot agree on a new folder where the first logger makes none: name the run's "
            "folder, --run=FOLDER, or put a CSVLogger or TensorBoardLogger first"
        )
    for number in itertools.count():
        folder = root / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        os.environ[_NEW_FOLDER] = str(folder)
        return folder
    raise AssertionError("numbers do not end")


def say(text: str) -> None:
    """Print on rank 0 alone."""
    if is_first():
        print(text, flush=True)  # noqa: T201 - the user has to see where a run resumes


def is_first() -> bool:
    """True on rank 0, which Lightning found out from the environment at import."""
    first_node = all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "GROUP_RANK"))
    return first_node and int(getattr(rank_zero_only, "rank", 0)) == 0
