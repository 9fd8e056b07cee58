"""`roar`: see whether heat maps find what a model learns from: remove it, retrain, measure (ROAR+)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.results.record import check_label, method_of
from lightning_xai.results.trials import MODALITIES, ORIGINAL, Retraining, Trial, gather, loss_rows, plan_trials

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import those names, and so torch.

BASELINES = ("random", "gaussian")
"""Methods that `baselines` adds: the built-in ones that ignore the model, by name, since listing trials loads no torch.

Their own flag `baseline`, and that of baselines which other packages add and settings name, goes into the result.
"""
_CHANGES_NO_NUMBER = ("eval_batch_size",)


@dataclass
class Roar:
    """Remove what heat maps find important, retrain, and see how much worse the model gets (ROAR+).

    Each method explains a part of a split once. The most important pixels of its images are replaced by the mean of
    each channel, or the most important words of its captions by padding. The model is fine-tuned on the rest, and
    measured on another, unchanged part of the split: the score of a method is (l_c - l_o) / l_o, where l_c is that loss
    and l_o the loss after fine-tuning on the original data. Higher is better: the method has found what matters. Random
    maps and a Gaussian at the centre are the baselines to beat.

    Each retraining is a trial (method, modality, seed), whose result is a file. A trial that is done is never run
    again: repeat the same command after an interruption, or to add methods and seeds.

    Everything, one trial after another (needs the model of `fit --config configs/demo.yaml`):
      python -m lightning_xai roar --config configs/roar_demo.yaml
    List the trials, and which of them are done:
      python -m lightning_xai roar --config configs/roar_demo.yaml --list-trials
    On a Slurm cluster, one trial a job, and the table at the end:
      slurm/roar.sh configs/roar_paper.yaml
    The same by hand:
      python -m lightning_xai roar --config configs/roar_demo.yaml --prepare
      python -m lightning_xai roar --config configs/roar_demo.yaml --trial 0
      python -m lightning_xai roar --config configs/roar_demo.yaml --gather
    The hyperparameters of a method (Table 2 of the M2IB paper):
      python -m lightning_xai roar --config configs/roar_grid.yaml

    Attributes:
        model: the base model, which is explained and then retrained.
        data: folder of shards of one split, as prepare writes them.
        out: folder to write to: trials/, the degraded data, and the result.
        methods: name, or any label, of each method -> its options, as {m2ib: {beta: 0.01}}; under another label the
            options name the method: {tight: {method: m2ib, beta: 1.0}}.
        baselines: random and gaussian take part as well.
        grid: option -> values; the one method given takes part with each combination of them.
        modalities: what is degraded: image, text.
        seeds: of the retraining; one trial for each.
        samples: how many samples of the split take part, drawn at random; left out: all.
        skip: how many samples in their random order to skip; samples: 500 and skip: 500 do not overlap.
        split_seed: of that order, and of which samples are validated on.
        validation: share of the samples that is validated on.
        pixels: share of an image's pixels that is removed.
        tokens: share of a caption's tokens that is removed.
        fill: color that replaces pixels: model_mean, the mean of each channel that the model's normalisation subtracts;
            or image_mean, that over the image itself, which keeps some of the color that is removed.
        training: how a trial is trained.
        batch_size: pairs that are explained at a time; changes no number.
        trial: run this trial alone, by its number in --list-trials.
        prepare: only explain, and write the data that trials need; where many jobs share the trials, one does so first.
        list_trials: only list the trials.
        gather: only collect the results of the trials that are done.
    """

    model: ModelChoice
    data: Path
    out: Path
    methods: dict[str, dict[str, Any] | None]
    baselines: bool = True
    grid: dict[str, list[Any]] = field(default_factory=dict)
    modalities: tuple[str, ...] = MODALITIES
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    samples: int | None = None
    skip: int = 0
    split_seed: int = 0
    validation: float = 0.2
    pixels: float = 0.25
    tokens: float = 0.5
    fill: Literal["model_mean", "image_mean"] = "model_mean"
    training: Retraining = field(default_factory=Retraining)
    batch_size: int = 32
    trial: int | None = None
    prepare: bool = False
    list_trials: bool = False
    gather: bool = False

    def __call__(self) -> None:
        """Run the trials that are not done, and collect all results.

        Raises:
            ValueError: settings that cannot be met, no such method, model or data, or results of other settings.
            RuntimeError: a loss is not finite.
        """
        methods = all_methods(self)
        trials = plan_trials(list(methods), self._modalities(), self._seeds())
        if (self.out / "cells").is_dir():
            raise ValueError(
                f"{self.out} holds results of an earlier release, whose format has changed: use another --out folder "
                "to run the trials again"
            )
        if self.list_trials:
            for number, trial in enumerate(trials):
                print(number, trial, "done" if trial.path(self.out).is_file() else "to do")  # noqa: T201
            return
        if (self.trial is not None) + self.prepare + self.gather > 1:
            raise ValueError("--trial, --prepare and --gather exclude each other: give one of them at a time")
        if self.trial is not None and not 0 <= self.trial < len(trials):
            raise ValueError(f"--trial has to be 0 to {len(trials) - 1} (see --list-trials); got {self.trial}")
        if not self.gather:
            self._run(trials if self.trial is None else [trials[self.trial]], methods)
        if self.trial is None and not self.prepare:
            self._report(trials, methods)

    # Not public: the parser would make a subcommand of it.
    def _settings_of(self, trial: Trial) -> dict[str, dict[str, Any]]:
        """The fields of a trial's recipe that follow from the settings alone."""
        removed: dict[str, dict[str, Any]] = {
            "image": {"pixels": self.pixels, "fill": self.fill},
            "text": {"tokens": self.tokens},
        }
        training = asdict(self.training)
        return {
            "selection": {name: getattr(self, name) for name in ("samples", "skip", "split_seed", "validation")},
            "degradation": removed.get(trial.modality, {}),
            "training": {name: value for name, value in training.items() if name not in _CHANGES_NO_NUMBER},
        }

    def _run(self, trials: list[Trial], methods: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        from lightning_xai.commands.roar_run import RoarRun

        _check_checkpoint(self.model.name)
        run = RoarRun(self, methods, self._settings_of)
        if self.prepare:
            run.prepare()
        else:
            run.run(trials)

    def _report(self, trials: list[Trial], methods: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        # Frames take half a second to load, which a help text and a list of trials do without.

        from lightning_xai.report.terminal import roar_tables, wide_console
        from lightning_xai.results.table import ResultTable, write_result

        record, done = gather(self.out, trials, methods, self._settings_of, self.grid)
        table = ResultTable.of(*loss_rows(done))
        write_result(self.out, record, table)
        console = wide_console()
        for shown in roar_tables(record, table):
            console.print(shown, crop=False)
        if missing := len(trials) - len(done):
            print(f"{missing} of {len(trials)} trials are missing; see --list-trials")  # noqa: T201
        print(f"Saved {self.out / 'result.json'}; the losses of each epoch are in {self.out / 'trials'}")  # noqa: T201

    def _modalities(self) -> tuple[str, ...]:
        if not self.modalities or not set(self.modalities) <= set(MODALITIES):
            raise ValueError(f"modalities has to hold image, text or both; got {list(self.modalities)}")
        return tuple(modality for modality in MODALITIES if modality in self.modalities)

    def _seeds(self) -> tuple[int, ...]:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds has to hold different numbers, at least one, none below 0; got {self.seeds}")
        return self.seeds


def all_methods(roar: Roar) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> name and options of every method that takes part, baselines and points of a grid included.

    Raises:
        ValueError: a label or an entry that is none, a grid without its one method, or no method takes part.
    """
    given = {label: method_of(label, options) for label, options in roar.methods.items()}
    if ORIGINAL in given:
        raise ValueError(f"the label {ORIGINAL!r} stands for the data as they are; give the method another one")
    if roar.grid:
        given = _grid_points(given, roar.grid)
    for name in BASELINES if roar.baselines else ():
        given.setdefault(name, (name, {}))
    if not given:
        raise ValueError("no method takes part: give some as methods, or set baselines to true")
    return given


def _grid_points(
    given: Mapping[str, tuple[str, dict[str, Any]]], grid: Mapping[str, list[Any]]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """The one method given, with each combination of options; labels such as "m2ib,layer=9,beta=0.1"."""
    if len(given) != 1 or not all(grid.values()):
        raise ValueError(
            f"a grid needs exactly one method and at least one value for each option; got {', '.join(given) or 'none'} "
            f"and {dict(grid)}"
        )
    ((label, (name, options)),) = given.items()
    points = {}
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        point = ",".join([label, *(f"{option}={value}" for option, value in chosen.items())])
        points[check_label(point)] = (name, {**options, **chosen})
    return points


def _check_checkpoint(name: str) -> None:
    if name.endswith(".ckpt") and not Path(name).is_file():
        raise ValueError(
            f"there is no checkpoint {name}: train the base model first (that of configs/roar_demo.yaml with "
            "`python -m lightning_xai fit --config configs/demo.yaml`), or name another one with --model.name"
        )
