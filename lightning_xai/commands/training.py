"""Lightning's verbs, with a folder for each run, exact resuming, and checks before the start."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_dumper
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
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
    MeasuredModel,
    PredictionWriter,
    Preflight,
    ProgressLog,
    Resume,
)
from lightning_xai.training.preflight import check_allocation, slurm_job, started_by_srun
from lightning_xai.training.run_folder import RunFolder, RunModel, run_of
from lightning_xai.training.run_loggers import (
    continue_loggers,
    drop_idle_options,
    has_own_folder,
    keep_rows,
    placed_loggers,
    restore_versions,
)

__all__ = ["TrainingCLI"]

_NEW_FOLDER = "LIGHTNING_XAI_NEW_FOLDER"
"""Environment variable by which the first process names to those that it starts in which folder they write."""

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


# Options next to which --run need not name a run that is there.
_DESCRIBES = ("--config", "-c", "--model", "--data", "--help", "-h", "--print_config")


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
            help="folder of a training run; its config.yaml is taken where no --config is given. If it holds a run "
            "that was stopped, `fit` resumes it exactly, and with more --trainer.max_epochs or max_steps it trains a "
            "finished one for longer; if it holds none, a new one starts. The other verbs measure the run's model, the "
            "best one or that of --ckpt_path (best, last, or a file), and write into a folder of their name in it. "
            "Default: a new folder for each start; for `fit` inside a Slurm job, slurm-JOBID in "
            "trainer.default_root_dir, so that a requeued job resumes; for the other verbs the folder of the "
            "config.yaml, where that is a run's",
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
        """Read the options; a run is described by its own config where there is no other.

        A list in a later config replaces that of an earlier one.
        """
        self._names_run, given = False, sys.argv[1:] if args is None else args
        if isinstance(given, list):
            options = {option.partition("=")[0] for option in given}
            run = _value_of("--run", given)
            self._names_run = run is not None
            if run and not options & {"--config", "-c"} and run_of(Path(run)) and (Path(run) / "config.yaml").is_file():
                given = [given[0], f"--config={Path(run) / 'config.yaml'}", *given[1:]]
            elif run and not any(option.startswith(_DESCRIBES) for option in options) and not run_of(Path(run)):
                raise ValueError(
                    f"--run={run}: there is no run in this folder (it has no run.json); name the folder of one, or "
                    "describe a new one by --config=FILE"
                )
            self.config = parser.parse_args(lists_replaced(given))
        else:
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Find the run's folder and its newest checkpoint, before anything that takes time."""
        self._folder: RunFolder | None = None
        self._checkpoint: Path | None = None
        self._measured: RunModel | None = None
        self._settings: dict[str, Any] = {}
        self._shares_folder = False
        self._logger_ids: dict[str, dict[str, str]] = {}
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
        else:
            self._take_model(config)
        _refuse_foreign(config)
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        if not (loggers and loggers[0] is not False and has_own_folder(loggers[0])):
            self._shares_folder = True
            if self._folder is None and not config.trainer.fast_dev_run:
                root = Path(config.trainer.default_root_dir or ".")
                config.trainer.default_root_dir = str(_new_folder(root, self.subcommand, config.run is not None))

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; loggers go on with what they have begun, which no saved config repeats."""
        section = None if self.subcommand is None else self.config[self.subcommand].trainer
        if section is None or not self._logger_ids:
            super().instantiate_classes()
            return
        configured, section.logger = section.logger, continue_loggers(section.logger, self._logger_ids)
        super().instantiate_classes()
        section.logger = configured
        restore_versions(self.trainer.loggers, self._logger_ids)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer, with the callbacks and plugins that every run has."""
        given = self._get(self.config_init, "trainer", default={})
        plugins, callbacks = (_listed(given.get(name)) for name in ("plugins", "callbacks"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        plugins += _cluster(plugins)
        callbacks = self._with_own(callbacks, given.get("enable_checkpointing") is not False)
        kwargs |= _progress(callbacks)
        trainer = super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)
        drop_idle_options(trainer.loggers)
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

    def _option_of(self, callback: Callback) -> str | None:
        """The option of the command line that was given for a callback that every run has."""
        if isinstance(callback, PredictionWriter) and self._get(self.config, "maps") is not None:
            return "maps"
        if isinstance(callback, FiniteSteps) and self._get(self.config, "on_nonfinite") != "stop":
            return "on_nonfinite"
        return None

    def _missing(self, callbacks: list[Callback]) -> Iterator[Callback]:
        """What every run has, and these callbacks lack."""
        own: list[Callback] = [DataFaults(), Preflight()]
        if self.subcommand == "predict":
            run = self._get(self.config, "run")
            # A folder that is the same when it is started again, so that it goes on.
            folder = None if run is None else run / "predict" / "predictions"
            own.append(PredictionWriter(folder, maps=self._get(self.config, "maps")))
        if self.subcommand == "fit":
            own.append(FiniteSteps(self._get(self.config, "on_nonfinite")))
        for each in own:
            if not any(isinstance(given, type(each)) for given in callbacks):
                yield each
            elif option := self._option_of(each):
                raise ValueError(
                    f"--{option} does nothing next to a {type(each).__name__} among the callbacks: give it to that one"
                )

    def _with_own(self, callbacks: list[Callback], keeps: bool) -> list[Callback]:
        """A run's callbacks and those that every run has; `keeps`: whether it writes checkpoints."""
        refuse_finders(callbacks)
        callbacks += list(self._missing(callbacks))
        if self._measured is not None:
            callbacks.append(MeasuredModel(self._measured))
        if self.subcommand in (None, "predict") or not keeps:
            return callbacks
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            callbacks.append(ModelCheckpoint(enable_version_counter=False))  # as Lightning would if there were none
        if self.subcommand == "fit" and (self._folder is not None or self._shares_folder):
            # Lightning would name a folder after the logger, which may be another one when the run goes on.
            folder = self._folder or RunFolder(Path(self._get(self.config, "trainer").default_root_dir))
            for callback in callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(folder.models)
        # Last, so that its checkpoints hold the state of all other callbacks after a step.
        return [
            *callbacks,
            Resume(
                self._folder,
                minutes=self._get(self.config, "save_every_minutes"),
                settings=self._settings,
                chosen=None if self._checkpoint is None else self._checkpoint.name,
                measure_last=self._get(self.config, "measure_last"),
            ),
        ]

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
        self._folder = RunFolder(run, self._comparable)
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
                longer = self._folder.check(record, self._settings)
                if record.finished and not longer:
                    _say(
                        f"The run in {run} is finished; more --trainer.max_epochs trains it for longer, "
                        "--run=ANOTHER_FOLDER starts a new one."
                    )
                    raise SystemExit(0)
                if self._checkpoint is None:
                    self._folder.refuse_lost()
                if longer:
                    _say(f"Training the run in {run} for longer: {', '.join(longer)}")
                _say(f"Resuming the run in {run} from {self._checkpoint}")
                self._logger_ids = record.loggers
        if _is_first():
            keep_rows(run, self._checkpoint)
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # its table is kept
        self._write_into(run, version="")

    def _take_model(self, config: Any) -> None:
        """Choose the model of a run that is to be measured, and direct all output into the run's folder."""
        if not self._names_run:  # a config.yaml speaks for the folder that it lies in, wherever that has been moved to
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
        self._measured = RunFolder(config.run).model(config.ckpt_path)
        # What training alone needs is not taken up, on purpose: the warnings read as if another model were measured.
        for message in ("Be aware that when using `ckpt_path`", "The dirpath has changed"):
            warnings.filterwarnings("ignore", message=message)
        config.ckpt_path = self._measured.path
        if evaluates:
            model.init_args.model, model.init_args.pretrained, config.ckpt_path = self._measured.path, None, None
        # The run's own config.yaml must not be overwritten.
        self._write_into(config.run / self.subcommand, version=None)

    def _write_into(self, folder: Path, version: str | None) -> None:
        trainer = self.config[self.subcommand].trainer
        trainer.default_root_dir = str(folder)
        trainer.logger = placed_loggers(trainer.logger, folder, version)

    def _deciding_settings(self) -> dict[str, Any]:
        """The configuration without settings that cannot change a number; nested plain values."""
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        return _deciding(json.loads(parser.dump(config, format="json")))

    def _comparable(self, was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        """The settings of a run that another version may have begun, without what is free and with what is new.

        An option that the other version had not has its default, which does what that version did.
        """
        was = _deciding(was)
        # Several processes take the strategy "auto" for "ddp".
        trainers = [each.get("trainer") or {} for each in (was, now)]
        if {each.get("strategy") for each in trainers if isinstance(each.get("strategy"), str)} == {"auto", "ddp"}:
            trainers[0]["strategy"] = trainers[1]["strategy"]
        for group in ("model", "data"):
            old, new = (each.get(group) or {} for each in (was, now))
            if old.get("class_path") != new.get("class_path") or not isinstance(new.get("init_args"), dict):
                continue
            parser = ArgumentParser(exit_on_error=False)
            module, _, name = new["class_path"].rpartition(".")
            parser.add_class_arguments(getattr(import_module(module), name), sub_configs=False)
            defaults = json.loads(parser.dump(parser.get_defaults(), format="json", skip_validation=True))
            own = old.setdefault("init_args", {})
            own |= {
                name: value
                for name, value in new["init_args"].items()
                if name not in own and name in defaults and defaults[name] == value
            }
        return was


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


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The last value that a command line gives an option; None where it gives none."""
    found = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else following
    return found


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


def _new_folder(root: Path, verb: str, belongs: bool) -> Path:
    """A new `version_N`, the same one for all processes of this start.

    Processes that another program has started cannot agree on one: in a run's folder for a verb (`belongs`) they take
    that itself.

    Raises:
        ValueError: they cannot agree, and there is no such folder.
    """
    if _NEW_FOLDER in os.environ and not _is_first():
        return Path(os.environ[_NEW_FOLDER])
    if slurm_job() is not None:
        return root / f"slurm-{slurm_job()}-{verb}"
    if not _is_first() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
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


def _say(text: str) -> None:
    if _is_first():
        print(text, flush=True)  # noqa: T201 - the user has to see where a run resumes


def _is_first() -> bool:
    """True on rank 0, which Lightning found out from the environment at import."""
    first_node = all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "GROUP_RANK"))
    return first_node and int(getattr(rank_zero_only, "rank", 0)) == 0
