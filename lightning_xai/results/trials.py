"""Trials of ROAR+, and the files that hold their losses.

A trial is one retraining: on the original data, or without what one method finds most important in one modality, with
one seed. Each finished trial is one file, so that any number of jobs can share the work and none is done twice. Nothing
here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lightning_xai.atomic_file import as_read, read_json, write_json
from lightning_xai.results.record import MethodRecord, ResultRecord, settings_that_differ

__all__ = [
    "LOSS",
    "MODALITIES",
    "NO_MODALITY",
    "ORIGINAL",
    "Retraining",
    "Trial",
    "TrialResult",
    "check_recipe",
    "gather",
    "loss_rows",
    "options_that_count",
    "plan_trials",
    "read_trial",
]

MODALITIES = ("image", "text")
ORIGINAL = "original"
"""Label of the trials that give l_o, where nothing is degraded."""
NO_MODALITY = "none"
"""Their modality."""
LOSS = "validation_loss"
"""The metric of the long table."""
VERSION = 2
_CHANGES_NO_NUMBER = ("internal_batch_size",)


@dataclass(frozen=True)
class Retraining:
    """Retraining of a model in a trial: the one list of its options and their defaults.

    Attributes:
        epochs: passes over the training part.
        batch_size: images in a training batch, each other's negatives.
        lr: learning rate of AdamW, constant.
        weight_decay: of AdamW, on all parameters.
        betas: AdamW's running averages.
        max_logit_scale: the learned factor on similarities is kept between 1 and this.
        val_group_size: images that are each other's negatives in the validation loss.
        precision: of Lightning's Trainer, such as bf16-mixed.
        num_workers: processes that read and decode; the order of the samples depends on it.
        eval_batch_size: images in an evaluation batch; changes no number.
    """

    epochs: int = 5
    batch_size: int = 64
    lr: float = 1e-5
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    max_logit_scale: float = 100.0
    val_group_size: int = 64
    precision: str = "32-true"
    num_workers: int = 0
    eval_batch_size: int = 256


class Trial(msgspec.Struct, frozen=True):
    """One retraining.

    Attributes:
        label: of the method, or `ORIGINAL`.
        modality: the degraded one, image or text, or `NO_MODALITY`.
        seed: of the retraining.
    """

    label: str
    modality: str
    seed: int

    def __str__(self) -> str:
        return f"{self.label}/{self.modality}/{self.seed}"

    def path(self, folder: Path) -> Path:
        """Its file in the output folder, which exists as soon as the trial is done."""
        return folder / "trials" / f"{self.label}--{self.modality}--{self.seed}.json"


class Recipe(msgspec.Struct, frozen=True):
    """Everything that the losses of a trial depend on.

    Attributes:
        model: architecture, preprocessing and fingerprint of the weights.
        data: fingerprint of the shards.
        method: `name` and `options`; empty for `ORIGINAL`.
        selection: which samples take part.
        degradation: what is removed.
        training: the `Retraining`.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    method: dict[str, Any]
    selection: dict[str, Any] = {}
    degradation: dict[str, Any] = {}
    training: dict[str, Any] = {}


class About(msgspec.Struct, frozen=True):
    """A trial's share of the `ResultRecord`: `model`, `data`, `settings`, `versions`, and `flags` of its method."""

    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    flags: dict[str, bool] = {}


class TrialResult(msgspec.Struct, frozen=True, kw_only=True):
    """The losses of a trial, and everything that they depend on.

    Attributes:
        trial: the trial.
        curve: validation losses in nats: before training, and after each epoch; the last one counts.
        recipe: what the losses depend on; see `check_recipe`.
        about: what the result says of it.
        seconds: duration of the retraining.
        version: of this format.
    """

    trial: Trial
    curve: tuple[float, ...]
    recipe: Recipe
    about: About
    seconds: float
    version: int = VERSION

    @property
    def loss(self) -> float:
        """Validation loss after the last epoch."""
        return self.curve[-1]

    def save(self, folder: Path) -> None:
        """Write the trial's file, all or nothing."""
        write_json(self.trial.path(folder), msgspec.to_builtins(self, enc_hook=str))


def plan_trials(labels: Sequence[str], modalities: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """All trials in their order, which gives them their numbers: first those on the original data.

    >>> [str(trial) for trial in plan_trials(["m2ib"], ["image", "text"], [0, 1])][1:4]
    ['original/none/1', 'm2ib/image/0', 'm2ib/image/1']
    """
    degraded = (Trial(label, modality, seed) for label in labels for modality in modalities for seed in seeds)
    return [*(Trial(ORIGINAL, NO_MODALITY, seed) for seed in seeds), *degraded]


def read_trial(folder: Path, trial: Trial) -> TrialResult | None:
    """The result of a trial; None if it has not been run to its end.

    Raises:
        ValueError: its file is broken or of another version.
    """
    path = trial.path(folder)
    if not path.is_file():
        return None
    try:
        found = read_json(path, TrialResult)
        if found.version != VERSION:
            raise ValueError(f"version {found.version}, this release reads {VERSION}")
        if found.trial != trial or not found.curve:
            raise ValueError(f"it is of the trial {found.trial}, with {len(found.curve)} losses")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no result of this trial ({error}); delete it and run the trial again") from error
    return found


def check_recipe(found: TrialResult, recipe: Recipe, folder: Path) -> None:
    """Raise a ValueError that names what differs if a trial was run with other settings, data or weights."""
    was, now = (as_read(msgspec.to_builtins(one, enc_hook=str)) for one in (found.recipe, recipe))
    changes = settings_that_differ(was, now)
    if changes:
        raise ValueError(
            f"{found.trial.path(folder)} was made with other settings: {'; '.join(changes)}. Use another --out folder, "
            "restore the previous settings, or delete the file to run the trial again"
        )


def options_that_count(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method that change its maps."""
    return {name: value for name, value in options.items() if name not in _CHANGES_NO_NUMBER}


def gather(
    folder: Path,
    trials: Sequence[Trial],
    methods: Mapping[str, tuple[str, Mapping[str, Any]]],
    settings: Callable[[Trial], Mapping[str, dict[str, Any]]],
    grid: Mapping[str, Any],
) -> tuple[ResultRecord, list[TrialResult]]:
    """Read the results of all trials that are done, and describe them.

    Args:
        folder: the output folder.
        trials: all trials.
        methods: label -> the method's name and the options that it is given.
        settings: trial -> the fields of its recipe that follow from the settings alone.
        grid: option -> values, where the methods are the points of a grid.

    Raises:
        ValueError: no trial is done, a file is broken, or a trial is of other settings, weights or data than the
            others, or of another method or options than its label now stands for.
    """
    done = [found for trial in trials if (found := read_trial(folder, trial)) is not None]
    if not done:
        raise ValueError(f"{folder}: none of the {len(trials)} trials is done; run some of them first")
    first, of_label = done[0], {found.trial.label: found for found in reversed(done)}
    for found in done:
        expected = {"model": first.recipe.model, "data": first.recipe.data, **settings(found.trial)}
        if found.trial.label in methods:
            name, options = methods[found.trial.label]
            recorded = of_label[found.trial.label].recipe.method.get("options", {})
            expected["method"] = {"name": name, "options": {**recorded, **options_that_count(options)}}
        check_recipe(found, msgspec.structs.replace(found.recipe, **expected), folder)
    done_trials = {found.trial for found in done}
    missing = [str(trial) for trial in trials if trial not in done_trials]
    about = msgspec.structs.asdict(first.about)
    record = ResultRecord(
        kind="roar",
        **{name: about[name] for name in ("model", "data", "settings", "versions")},
        methods={
            label: _method(name, options, [found for found in done if found.trial.label == label])
            for label, (name, options) in methods.items()
        },
        extra={"missing": missing, "grid": dict(grid), "base_loss": first.curve[0]},
    )
    return record, done


def _method(name: str, options: Mapping[str, Any], own: Sequence[TrialResult]) -> MethodRecord:
    if not own:
        return MethodRecord(name=name, options=dict(options), seeds=())
    seeds = sorted({found.trial.seed for found in own})
    return MethodRecord(name=name, options=own[0].recipe.method["options"], seeds=tuple(seeds), **own[0].about.flags)


def loss_rows(done: Sequence[TrialResult]) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    """Values and targets of the long table: l_c and l_o by method and seed; the target is the degraded modality."""
    values = [(each.trial.label, each.trial.seed, each.trial.modality, LOSS, each.loss, "") for each in done]
    nothing = {"kind": "modality", "ordinal": 0, "key": "", "caption_index": 0, "caption": "", "label": ""}
    names = (*MODALITIES, NO_MODALITY)
    return values, [{"target": name, "index": place, **nothing} for place, name in enumerate(names)]
