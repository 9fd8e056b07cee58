"""Lightning's verbs, with a folder for each run, exact resuming, and checks before the start."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml
from jsonargparse import set_dumper
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_xai.commands.training_options import (
    check_optimizer,
    lists_replaced,
    refuse_finders,
    with_scheduler,
)
from lightning_xai.training import (
    AtomicCheckpointIO,
    DataFaults,
    FiniteSteps,
    PredictionWriter,
    Preflight,
    ProgressLog,
    Resume,
)
from lightning_xai.training.preflight import check_allocation, slurm_job, started_by_srun
from lightning_xai.training.run_folder import RunFolder

__all__ = ["TrainingCLI"]

# Settings that may differ when a run is resumed: paths, what is shown, and what cannot change a number.
_FREE = {
    "": {
        "run", "save_every_minutes", "collective_timeout", "config", "ckpt_path", "weights_only", "maps",
        "on_nonfinite", "measure_last",
    },
    "trainer": {
        "accelerator", "devices", "num_nodes", "default_root_dir", "logger", "enable_progress_bar", "profiler",
        "enable_model_summary", "log_every_n_steps", "max_time", "detect_anomaly", "plugins",
    },
    "data": {
        # The batch size goes with the number of processes; with the same number, the data module refuses another one.
        "batch_size",
        "train", "val", "test", "root", "pin_memory", "persistent_workers", "max_fault_fraction", "verify", "retries",
    },
}  # fmt: skip


class _ConfigDumper(yaml.SafeDumper):  # type: ignore[misc] # PyYAML has no types
    """Quotes every text that jsonargparse would read as a number, which PyYAML's own dumper does not ("1e-5")."""


_ConfigDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?"),
    list("-+.0123456789"),
)


def _dump_config(settings: Any) -> str:
    options: dict[str, Any] = {"default_flow_style": False, "allow_unicode": True, "sort_keys": False}
    return str(yaml.dump(settings, Dumper=_ConfigDumper, **options))


class TrainingCLI(LightningCLI):
    """The LightningCLI of `fit`, `validate`, `test` and `predict`."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, and have it write configs that it reads back as they were."""
        set_dumper("yaml", _dump_config)
        return super().init_parser(**kwargs)

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
            "--maps",
            type=Literal["phrases", "interactions"] | None,
            default=None,
            help="of `predict`: besides embeddings, write the phrases' heat maps, or the full interactions (tokens x "
            "patches) of every image and caption, both by feature_pair; another method with its options can be chosen "
            "with the callback PredictionWriter",
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, or `args`; a list in a later config replaces that of an earlier one."""
        self.config = parser.parse_args(lists_replaced(sys.argv[1:] if args is None else args))

    def before_instantiate_classes(self) -> None:
        """Find the run's folder and its newest checkpoint, before anything that takes time."""
        self._folder: RunFolder | None = None
        self._checkpoint: Path | None = None
        self._settings: dict[str, Any] = {}
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        replaced = check_optimizer(config)
        if replaced:
            _say(f"--optimizer takes the place of the model's own optimizer: {', '.join(replaced)} do nothing")
        if config.get("maps") is not None and self.subcommand != "predict":
            raise ValueError(f"--maps is an option of `predict`; leave it out of `{self.subcommand}`")
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
        plugins, callbacks = (_listed(given.get(name)) for name in ("plugins", "callbacks"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        plugins += _cluster(plugins)
        if self.subcommand == "predict" and not any(isinstance(callback, PredictionWriter) for callback in callbacks):
            run = self._get(self.config, "run")
            # A folder that is the same when it is started again, so that it goes on.
            folder = None if run is None else run / "predict" / "predictions"
            callbacks.append(PredictionWriter(folder, maps=self._get(self.config, "maps")))
        for kind in (DataFaults, Preflight):
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind())
        refuse_finders(callbacks)
        kwargs |= _progress(callbacks)
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

    @staticmethod
    def configure_optimizers(lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: Any = None) -> Any:
        """Take `--optimizer` and `--lr_scheduler` in place of the model's own."""
        return with_scheduler(lightning_module, optimizer, lr_scheduler)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train, from the newest checkpoint of the run if there is one."""
        if self._checkpoint is not None:
            kwargs["ckpt_path"] = self._checkpoint
        self.trainer.fit(model, **kwargs)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write predictions; none is kept in memory unless that is asked for."""
        kwargs["return_predictions"] = bool(kwargs.get("return_predictions"))
        self.trainer.predict(model, **kwargs)

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
                # What one version compares, another may not.
                self._folder.check(msgspec.structs.replace(record, settings=_deciding(record.settings)), self._settings)
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
        return _deciding(json.loads(parser.dump(config, format="json")))


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that cannot change a number; removes them."""
    for group, names in _FREE.items():
        at = settings.get(group) or {} if group else settings
        at = at.get("init_args", at)
        for name in names:
            at.pop(name, None)
    return settings


def _listed(given: Any) -> list[Any]:
    """Objects of a config, which may name one alone."""
    return list(given) if isinstance(given, (list, tuple)) else [given] if given else []


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


def _cluster(plugins: list[Any]) -> list[ClusterEnvironment]:
    """Slurm's processes in a step of srun, where no other environment is given.

    Lightning would ignore srun in an interactive allocation: each task would train by itself, as rank 0.
    """
    if not started_by_srun() or any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        return [SLURMEnvironment()]


def _progress(callbacks: list[Any]) -> dict[str, Any]:
    """Show progress as lines where the output is no terminal: adds them to the callbacks; returns trainer options."""
    if sys.stdout.isatty():
        return {}
    if not any(isinstance(callback, ProgressLog) for callback in callbacks):
        callbacks.append(ProgressLog())
    # All that a log would get of a bar is its last state.
    return {} if any(isinstance(callback, ProgressBar) for callback in callbacks) else {"enable_progress_bar": False}


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
