"""Lightning's verbs, with a folder for each run, exact resuming, and checks before the start."""

from __future__ import annotations

import itertools
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_xai.training import AtomicCheckpointIO, DataFaults, EmbeddingWriter, FiniteSteps, Preflight, Resume
from lightning_xai.training.preflight import check_allocation, slurm_job
from lightning_xai.training.run_folder import RunFolder

__all__ = ["TrainingCLI"]

# Settings that may differ when a run is resumed: paths, what is shown, and what cannot change a number.
_FREE = {
    "": {
        "run", "save_every_minutes", "collective_timeout", "config", "ckpt_path", "weights_only", "on_nonfinite",
        "measure_last",
    },
    "trainer": {
        "accelerator", "devices", "num_nodes", "default_root_dir", "logger", "enable_progress_bar", "profiler",
        "enable_model_summary", "log_every_n_steps", "max_time", "detect_anomaly", "plugins",
    },
    "data": {
        "train", "val", "test", "root", "pin_memory", "persistent_workers", "max_fault_fraction", "verify", "retries",
    },
}  # fmt: skip


class TrainingCLI(LightningCLI):
    """The LightningCLI of `fit`, `validate`, `test` and `predict`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run as a whole."""
        parser.add_argument(
            "--run",
            type=Path | None,
            default=None,
            help="folder of a training run. If it holds a run that was stopped, `fit` resumes it exactly; if it holds "
            "none, a new one starts; the other verbs write into a folder of their name in it. Default: a new folder "
            "for each start; for `fit` inside a Slurm job, slurm-JOBID in trainer.default_root_dir, so that a requeued "
            "job resumes",
        )
        parser.add_argument(
            "--save_every_minutes",
            type=float,
            default=10.0,
            help="of `fit`: most time between two checkpoints to resume from",
        )
        parser.add_argument(
            "--on_nonfinite",
            type=Literal["stop", "skip"],
            default="stop",
            help="of `fit`: what to do with a step whose loss or gradient is NaN or infinite. stop: end the run before "
            "it is taken, and name its samples; skip: leave the step out and count it (train/skipped_steps)",
        )
        parser.add_argument(
            "--measure_last",
            type=bool,
            default=True,
            help="of `fit`: validate, and measure grounding, after the last step, wherever max_steps, max_time or "
            "early stopping put it; false: only where the trainer's schedule of validations says",
        )
        parser.add_argument(
            "--collective_timeout",
            type=float,
            default=600.0,
            help="seconds after which processes give up waiting for one that has died or hangs",
        )

    def before_instantiate_classes(self) -> None:
        """Find the run's folder and its newest checkpoint, before anything that takes time."""
        self._folder: RunFolder | None = None
        self._checkpoint: Path | None = None
        self._settings: dict[str, Any] = {}
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        check_allocation(config.trainer.devices, config.trainer.num_nodes, config.trainer.accelerator)
        if self.subcommand == "fit":
            self._settings = self._deciding_settings()
            if config.run is None and (job := slurm_job()) is not None:
                config.run = Path(config.trainer.default_root_dir or ".") / f"slurm-{job}"
            if config.run is not None:
                self._enter(config.run)
        elif config.run is not None:  # a run's config.yaml names its folder, and must not be overwritten
            self._write_into(config.run / self.subcommand, version=None)
        _refuse_foreign(config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer, with the callbacks and plugins that every run has."""
        given = self._get(self.config_init, "trainer", default={})
        plugins = given.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = list(given.get("callbacks") or [])
        for kind in (EmbeddingWriter, DataFaults, Preflight):
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind())
        if self.subcommand == "fit" and not any(isinstance(callback, FiniteSteps) for callback in callbacks):
            callbacks.append(FiniteSteps(self._get(self.config, "on_nonfinite")))
        if (
            self.subcommand is not None
            and self.subcommand != "predict"
            and given.get("enable_checkpointing") is not False
        ):
            # Last, so that its checkpoints hold the state of all other callbacks after a step.
            chosen = None if self._checkpoint is None else self._checkpoint.name
            minutes = self._get(self.config, "save_every_minutes")
            if not any(isinstance(callback, Checkpoint) for callback in callbacks):
                callbacks.append(ModelCheckpoint(enable_version_counter=False))  # as Lightning would if there were none
            measure_last = self._get(self.config, "measure_last")
            options = {"minutes": minutes, "settings": self._settings, "chosen": chosen, "measure_last": measure_last}
            callbacks.append(Resume(self._folder, **options))
        trainer = super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)
        if isinstance(trainer.strategy, (DDPStrategy, ModelParallelStrategy)):
            trainer.strategy._timeout = timedelta(seconds=self._get(self.config, "collective_timeout"))
        if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.strategy._save_distributed_checkpoint:
            raise ValueError(
                "checkpoints in pieces cannot be written all or nothing: give ModelParallelStrategy "
                "save_distributed_checkpoint: false (configs/coco_vit_h14_sharded.yaml has it)"
            )
        return trainer

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train, from the newest checkpoint of the run if there is one."""
        if self._checkpoint is not None:
            kwargs["ckpt_path"] = self._checkpoint
        self.trainer.fit(model, **kwargs)

    def _enter(self, run: Path) -> None:
        """Lock a run's folder, direct all output there, and find the checkpoint to resume from."""
        self._folder = RunFolder(run)
        if _is_first():
            self._folder.lock()
        record = self._folder.read()
        if record is not None:
            self._checkpoint = self._folder.newest(record)
            for name, reason in self._folder.skipped.items():
                _say(f"Skipped {name} in {self._folder.checkpoints}: {reason}")
            if self._checkpoint is None and not record.finished:
                self._folder.refuse_unreadable()
                _say(f"The run in {run} was stopped before its first checkpoint; it starts over.")
            else:
                self._folder.check(record, self._settings)
                if record.finished:
                    _say(f"The run in {run} is finished; --run=ANOTHER_FOLDER starts a new one.")
                    raise SystemExit(0)
                _say(f"Resuming the run in {run} from {self._checkpoint}")
            if _is_first():
                _set_aside(run / "metrics.csv")
        self._write_into(run, version="")

    def _write_into(self, folder: Path, version: str | None) -> None:
        trainer = self.config[self.subcommand].trainer
        trainer.default_root_dir = str(folder)
        trainer.logger = _inside(trainer.logger, folder, version)

    def _deciding_settings(self) -> dict[str, Any]:
        """The configuration without settings that cannot change a number; nested plain values."""
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        settings: dict[str, Any] = json.loads(parser.dump(config, format="json"))
        for group, names in _FREE.items():
            at = settings.get(group) or {} if group else settings
            at = at.get("init_args", at)
            for name in names:
                at.pop(name, None)
        return settings


def _refuse_foreign(config: Any) -> None:
    """Refuse checkpoints of other jobs that Lightning would start from inside a Slurm job."""
    if "SLURM_JOB_ID" not in os.environ or config.get("ckpt_path"):
        return
    foreign = sorted(Path(config.trainer.default_root_dir or ".").glob("hpc_ckpt_*"))
    if foreign:
        raise ValueError(
            f"{foreign[-1]} is a checkpoint of an earlier job, and Lightning would start from it: move it away, or "
            f"name it with --ckpt_path={foreign[-1]} to start from it"
        )


def _inside(logger: Any, folder: Path, version: str | None) -> Any:
    """Configured loggers that write into a folder itself (version ""), or into a new folder in it (None)."""
    if logger is False:
        return False
    loggers = logger if isinstance(logger, list) else [logger]
    placed = []
    for one in loggers:
        if one in (None, True):
            one = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {}}
        else:
            one = one.as_dict() if hasattr(one, "as_dict") else dict(one)
        arguments = {**(one.get("init_args") or {}), "save_dir": str(folder)}
        if one["class_path"].rpartition(".")[2] in ("TensorBoardLogger", "CSVLogger"):
            arguments |= {"name": "", "version": version}
        placed.append({**one, "init_args": arguments})
    return placed


def _set_aside(table: Path) -> None:
    """Keep the rows that a run had logged before it was stopped: CSVLogger deletes its table at the start."""
    if table.exists():
        number = next(i for i in itertools.count(1) if not table.with_name(f"{table.stem}-{i}.csv").exists())
        table.rename(table.with_name(f"{table.stem}-{number}.csv"))


def _say(text: str) -> None:
    if _is_first():
        print(text, flush=True)  # noqa: T201 - the user has to see where a run resumes


def _is_first() -> bool:
    """True on rank 0, which Lightning found out from the environment at import."""
    first_node = all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "GROUP_RANK"))
    return first_node and int(getattr(rank_zero_only, "rank", 0)) == 0
