"""Lightning's verbs, with a folder for each run, exact resuming, and checks before the start."""

from __future__ import annotations

import itertools
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from jsonargparse import set_dumper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lightning_xai.commands.run_callbacks import cluster, progress, with_own
from lightning_xai.commands.run_settings import deciding, dump_config
from lightning_xai.commands.run_start import RunStart, new_folder, refuse_foreign, say
from lightning_xai.commands.training_options import check_optimizer, lists_replaced, with_scheduler
from lightning_xai.training import AtomicCheckpointIO
from lightning_xai.training.preflight import check_allocation, slurm_job
from lightning_xai.training.run_folder import run_of
from lightning_xai.training.run_loggers import continue_loggers, drop_idle_options, has_own_folder, restore_versions

__all__ = ["TrainingCLI"]

# Options next to which --run need not name a run that is there.
_DESCRIBES = ("--config", "-c", "--model", "--data", "--help", "-h", "--print_config")


class TrainingCLI(LightningCLI):
    """The LightningCLI of `fit`, `validate`, `test` and `predict`."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, and have it write configs that it reads back as they were."""
        set_dumper("yaml", dump_config)
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
        self._start = RunStart()
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        replaced = check_optimizer(config)
        if replaced:
            say(f"--optimizer takes the place of the model's own optimizer: {', '.join(replaced)} do nothing")
        if config.get("maps") is not None and self.subcommand != "predict":
            raise ValueError(f"--maps is an option of `predict`; leave it out of `{self.subcommand}`")
        check_allocation(config.trainer.devices, config.trainer.num_nodes, config.trainer.accelerator)
        if self.subcommand == "fit":
            parser = self._parser(self.subcommand)
            self._start.settings = deciding(json.loads(parser.dump(config, format="json")))
            if config.run is None and (job := slurm_job()) is not None:
                config.run = Path(config.trainer.default_root_dir or ".") / f"slurm-{job}"
            if config.run is not None:
                self._start.enter(config.run, config.trainer)
        else:
            self._start.take_model(config, self.subcommand, self._names_run)
        refuse_foreign(config)
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        if not (loggers and loggers[0] is not False and has_own_folder(loggers[0])):
            self._start.shares_folder = True
            if self._start.folder is None and not config.trainer.fast_dev_run:
                root = Path(config.trainer.default_root_dir or ".")
                config.trainer.default_root_dir = str(new_folder(root, self.subcommand, config.run is not None))

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; loggers go on with what they have begun, which no saved config repeats."""
        section = None if self.subcommand is None else self.config[self.subcommand].trainer
        if section is None or not self._start.logger_ids:
            super().instantiate_classes()
            return
        configured, section.logger = section.logger, continue_loggers(section.logger, self._start.logger_ids)
        super().instantiate_classes()
        section.logger = configured
        restore_versions(self.trainer.loggers, self._start.logger_ids)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the trainer, with the callbacks and plugins that every run has."""
        given = self._get(self.config_init, "trainer", default={})
        plugins, callbacks = (_listed(given.get(name)) for name in ("plugins", "callbacks"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        plugins += cluster(plugins)
        options = self.config if self.subcommand is None else self.config[self.subcommand]
        keeps = given.get("enable_checkpointing") is not False
        callbacks = with_own(callbacks, self.subcommand, options, self._start, keeps)
        kwargs |= progress(callbacks)
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

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train, from the newest checkpoint of the run if there is one."""
        if self._start.checkpoint is not None:
            kwargs["ckpt_path"] = self._start.checkpoint
        self.trainer.fit(model, **kwargs)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write predictions; none is kept in memory unless that is asked for."""
        kwargs["return_predictions"] = bool(kwargs.get("return_predictions"))
        self.trainer.predict(model, **kwargs)


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
