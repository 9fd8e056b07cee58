"""Runs trials of `objectives`, in this process or in several: each trains, validates and judges one model."""

from __future__ import annotations

import copy
import io
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from lightning_xai.attribution.method_options import choose_method
from lightning_xai.cores import usable_cores
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.evaluation import AttributionEvaluation
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.results.objectives import ObjectiveTrial, TrainedModel, read_trained_model
from lightning_xai.results.record import method_of
from lightning_xai.training.contrastive import ContrastiveFineTuning
from lightning_xai.training.objectives import Objective
from lightning_xai.training.roar import process_as_before

if TYPE_CHECKING:
    from lightning_xai.commands.objectives import Objectives

_JUDGE_BATCH = 8
# A trial is one process wherever it runs, whose only output is its result.
_TRAINER = {
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "inference_mode": False,
    "deterministic": "warn",
}
_TRAINED_MODEL = {"model", "pretrained", "out", "seeds"}  # options of the judgement that a trial decides


def run_trials(
    settings: Objectives, trials: Sequence[ObjectiveTrial], on_start: Callable[[ObjectiveTrial], object]
) -> Generator[ObjectiveTrial, None, None]:
    """Run those of the trials that are not done, and yield each trial when it is done.

    With several workers, each takes the next trial when it has done one. When a trial fails, the others are ended.

    Args:
        settings: all settings.
        trials: those to run.
        on_start: called with each trial that is started.

    Raises:
        ValueError: no such model, or a model, method or objective that does not go with the others; a trial that is
            done, but with other settings.
        ArgumentError: an option that does not exist, or a value of the wrong type.
        RuntimeError: a worker ended without a word.
    """
    run = ObjectivesRun(settings)
    run.check()  # before anything is trained
    done = [trial for trial in trials if run.is_done(trial)]
    yield from done
    to_do = [trial for trial in trials if trial not in done]
    workers = min(settings.workers, len(to_do))
    if workers > 1:
        yield from _run_in_workers(settings, to_do, workers, on_start)
        return
    for trial in to_do:
        on_start(trial)
        run.run(trial)
        yield trial


def _run_in_workers(
    settings: Objectives, trials: list[ObjectiveTrial], workers: int, on_start: Callable[[ObjectiveTrial], object]
) -> Iterator[ObjectiveTrial]:
    # The longest last would leave the other workers idle: the more terms, the longer a trial takes.
    waiting = sorted(trials, key=lambda trial: len(settings.variants[trial.variant]))
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    running: dict[Connection, ObjectiveTrial] = {}

    def start_next(worker: Connection) -> None:
        running[worker] = waiting.pop()
        worker.send(running[worker])
        on_start(running[worker])

    processes = []
    try:
        for number in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(settings, there, number, usable_cores() // workers))
            process.start()
            processes.append(process)
            there.close()  # so that its end is seen here
            start_next(here)
        while running:
            for worker in cast(list[Connection], wait(list(running))):
                trial = running.pop(worker)
                _raise_failure(worker, trial)
                yield trial
                if waiting:
                    start_next(worker)
    finally:
        for process in processes:
            process.kill()  # every file is written all or nothing


def _raise_failure(worker: Connection, trial: ObjectiveTrial) -> None:
    try:
        failure = worker.recv()
    except EOFError:
        message = f"the worker that ran {trial} was ended, perhaps for want of memory: try fewer workers"
        raise RuntimeError(message) from None
    if failure is not None:
        raise failure


def _work(settings: Objectives, parent: Connection, number: int, cores: int) -> None:
    """Run the trials that come, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends its workers
    _see_one_gpu(number)
    torch.set_num_threads(max(1, min(cores, torch.get_num_threads())))
    run = ObjectivesRun(settings)
    with suppress(EOFError):
        while True:
            trial, failure = parent.recv(), None
            try:
                run.run(trial)
            except Exception as error:
                failure = error
            parent.send(failure)


def _see_one_gpu(number: int) -> None:
    """Leave a worker one of several GPUs, by its number; each trial takes the first that it sees."""
    count = torch.cuda.device_count()  # initialises nothing
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]


@dataclass(frozen=True)
class _Parts:
    """What a trial is made of, made for it alone."""

    model: dict[str, Any]
    objectives: list[Objective]
    data: ShardDataModule
    judged_data: ShardDataModule
    trainer: dict[str, Any]
    judge: dict[str, Any]


class ObjectivesRun:
    """Runs trials in this process.

    Args:
        settings: all settings.

    Raises:
        ArgumentError: an option that does not exist, or a value of the wrong type.
    """

    def __init__(self, settings: Objectives) -> None:
        self.settings = settings
        self._parser = _parser(settings)
        # Options are checked by the signatures that they go to, before anything is trained.
        names = ("model", "data", "judge", "variants")
        # A copy, since the parser puts objects into lists that it is given.
        given = copy.deepcopy({name: getattr(settings, name) for name in names})
        self._config = self._parser.parse_object({**given, "trainer": copy.deepcopy(_TRAINER | settings.trainer)})

    def check(self) -> None:
        """Make every variant once.

        Raises:
            ValueError: a model that an objective or a method does not suit.
        """
        for variant in self.settings.variants:
            self.trained_on(variant)

    def is_done(self, trial: ObjectiveTrial) -> bool:
        """Whether a trial was run to its end.

        Raises:
            ValueError: it was, but with other settings.
        """
        return read_trained_model(self.settings.out, trial, self._recipe(trial)) is not None

    def run(self, trial: ObjectiveTrial) -> None:
        """Train, validate and judge a model, and keep the result."""
        parts, out = self._parts(trial), self.settings.out
        start = time.perf_counter()
        with _quiet():
            # Seeded once the objectives are there: they may draw, and variants have to start from the same weights.
            L.seed_everything(trial.seed, verbose=False)
            module = ContrastiveFineTuning(**parts.model, objectives=parts.objectives)
            trainer = L.Trainer(**parts.trainer | {"limit_val_batches": 0})
            trainer.fit(module.train(), datamodule=parts.data)
            checkpoint = trial.checkpoint(out)
            trainer.save_checkpoint(checkpoint, weights_only=True)
            validation = L.Trainer(**parts.trainer)
            validation.validate(module, datamodule=parts.data, verbose=False)
            logged = {name: float(value) for name, value in sorted(validation.callback_metrics.items())}
            trained = time.perf_counter()
            judge = AttributionEvaluation(str(checkpoint), None, out=trial.judged(out), **parts.judge)
            batches = math.ceil(self.settings.images / _JUDGE_BATCH)
            plain = {name: value for name, value in parts.trainer.items() if name != "callbacks"}
            L.Trainer(**plain | {"limit_test_batches": batches}).test(judge, datamodule=parts.judged_data)
        seconds = {"training": trained - start, "judging": time.perf_counter() - trained}
        TrainedModel(
            trial=trial,
            recipe=self._recipe(trial),
            logged=dict(logged),
            trained_on=self.trained_on(trial.variant),
            seconds=seconds,
        ).save(out)

    def _recipe(self, trial: ObjectiveTrial) -> dict[str, Any]:
        """Everything that the numbers of a trial depend on, as the settings give it."""
        settings = self.settings
        names = ("model", "data", "trainer", "judge", "images", "captions_per_image")
        return {"objectives": settings.variants[trial.variant], **{name: getattr(settings, name) for name in names}}

    def _parts(self, trial: ObjectiveTrial) -> _Parts:
        """New objects for a trial: trainers and data modules remember what they did."""
        made = [self._instance(trial, **change) for change in ({}, self._judged_data())]
        first = made[0]
        trainer = first.trainer.as_dict()
        # Callbacks write next to the trial's other results, not into the folder that the command is run from.
        trainer["default_root_dir"] = trainer["default_root_dir"] or trial.validated(self.settings.out)
        # Lightning must not act on Slurm's tasks and signals.
        trainer["plugins"] = [*(trainer["plugins"] or []), LightningEnvironment()]
        return _Parts(
            first.model.as_dict(),
            first.variants[trial.variant],
            first.data,
            made[1].data,
            trainer,
            first.judge.as_dict(),
        )

    def _judged_data(self) -> dict[str, Any]:
        return {"captions_per_image": self.settings.captions_per_image, "eval_batch_size": _JUDGE_BATCH}

    def _instance(self, trial: ObjectiveTrial, **data: Any) -> Namespace:
        config = self._config.clone()
        for name, value in {"seed": trial.seed, **data}.items():
            config.data.init_args[name] = value
        made: Namespace = self._parser.instantiate_classes(config)
        return made

    def trained_on(self, variant: str) -> tuple[str, ...]:
        """Find the judging methods and logged numbers that a variant's objectives ask about.

        Raises:
            ValueError: a model that an objective or a method does not suit.
        """
        parts = self._parts(ObjectiveTrial(variant, self.settings.seeds[0]))
        with _quiet():
            encoder = ContrastiveFineTuning(**parts.model, objectives=parts.objectives).encoder
        found = []
        for label, options in (parts.judge["methods"] or {"feature_pair": None}).items():
            name, own = method_of(label, options)
            chosen = choose_method(encoder, name, own).options
            asked = [each.trains_on[name] for each in parts.objectives if name in each.trains_on]
            if any(_same(encoder, chosen, each) for each in asked):
                found.append(label)
        return (*found, *(name for each in parts.objectives for name in each.trains_on if "/" in name))


def _same(encoder: DualEncoder, chosen: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a method has the options that an objective asks about; layers may be counted from either end."""
    at_layer = {"image_layer": encoder.image_at_layer, "text_layer": encoder.text_at_layer}

    def resolved(options: Mapping[str, Any], name: str) -> Any:
        value = options.get(name)
        return at_layer[name](value).layer if name in at_layer and value is not None else value

    return all(resolved(chosen, name) == resolved(asked, name) for name in asked)


def _parser(settings: Objectives) -> ArgumentParser:
    """The parser that `fit` and `test` have, with a list of objectives for each variant."""
    parser = ArgumentParser(prog="lightning_xai objectives", exit_on_error=False)
    parser.add_class_arguments(ContrastiveFineTuning, "model", skip={"objectives"}, instantiate=False)
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False)
    parser.add_class_arguments(AttributionEvaluation, "judge", skip=set(_TRAINED_MODEL), instantiate=False)
    parser.add_subclass_arguments(ShardDataModule, "data", required=True)
    for name in settings.variants:
        parser.add_argument(f"--variants.{name}", type=list[Objective], required=True)
    return parser


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to the trials' progress: each would print the tables of its judgement."""
    with process_as_before(), redirect_stdout(io.StringIO()):
        yield
