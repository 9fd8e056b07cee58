"""One process that runs trials of `roar`: it loads the model once, and creates the data that are missing."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.progress import Progress

from lightning_xai.atomic_file import write_json
from lightning_xai.attribution.method_options import ChosenMethod, choose_method
from lightning_xai.commands.inputs import load_model
from lightning_xai.commands.outputs import describe, progress_bar
from lightning_xai.data.excluded import BROKEN_RECORD
from lightning_xai.data.shards import MANIFEST_NAME, Manifest
from lightning_xai.evaluation.roar_data import (
    attribute_pairs,
    count_ties,
    partition,
    read_keys,
    write_degraded,
    write_original,
)
from lightning_xai.models import DualEncoder
from lightning_xai.models.fingerprint import weights_fingerprint
from lightning_xai.results.trials import (
    NO_MODALITY,
    ORIGINAL,
    About,
    Recipe,
    Trial,
    TrialResult,
    check_recipe,
    options_that_count,
    read_trial,
)
from lightning_xai.training.roar import retrain

if TYPE_CHECKING:
    from lightning_xai.commands.roar import Roar


class RoarRun:
    """Runs trials in this process.

    Args:
        roar: all settings.
        methods: label -> name and options of each method.
        settings: trial -> the fields of its recipe that follow from the settings alone.

    Raises:
        ValueError: no such model, data or method, or one that cannot serve the model.
    """

    def __init__(
        self,
        roar: Roar,
        methods: Mapping[str, tuple[str, dict[str, Any]]],
        settings: Callable[[Trial], dict[str, dict[str, Any]]],
    ) -> None:
        self.roar = roar
        self.settings = settings
        self.manifest = Manifest.load(roar.data)
        encoder = load_model(roar.model)
        if not isinstance(encoder, DualEncoder):
            raise ValueError(f"roar needs a model of images and captions; {roar.model.name} is a {encoder.name}")
        self.encoder = encoder
        self.chosen = {label: _choose(encoder, label, *given) for label, given in methods.items()}
        self.weights = weights_fingerprint(encoder)
        self.broken = 0  # records of the split that cannot be read

    def run(self, trials: list[Trial]) -> None:
        """Run those of the trials that are not done, and create the data that they need.

        Raises:
            ValueError: a trial is done, but with other settings, data or weights.
            NonFiniteLossError: a loss is NaN or infinite.
        """
        to_do = []
        for trial in trials:
            found = read_trial(self.roar.out, trial)
            if found is None:
                to_do.append(trial)
            else:
                check_recipe(found, self._recipe(trial), self.roar.out)
        with progress_bar() as bar:
            task = bar.add_task("trials", total=len(trials), completed=len(trials) - len(to_do))
            for trial in to_do:
                train = self._training_data(trial, bar)
                bar.update(task, description=str(trial))
                self._retrain(trial, train)
                bar.advance(task)

    def prepare(self) -> None:
        """Create the data that trials need; one job does so before many that share the trials."""
        with progress_bar() as bar:
            for label in (ORIGINAL, *self.chosen):
                for modality in self.roar.modalities:
                    self._training_data(Trial(label, modality, 0), bar)

    def _recipe(self, trial: Trial) -> Recipe:
        method, architecture = self.chosen.get(trial.label), self.encoder.architecture
        return Recipe(
            model={
                "architecture": architecture["model_cfg"],
                "preprocessing": architecture["preprocess_cfg"],
                "weights": self.weights,
            },
            data={"shards": self.manifest.fingerprint},
            method={} if method is None else {"name": method.name, "options": options_that_count(method.options)},
            **self.settings(trial),
        )

    @cached_property
    def _originals(self) -> tuple[Path, Path]:
        """Folders of the training and validation parts."""
        roar, settings = self.roar, self.settings(Trial(ORIGINAL, NO_MODALITY, 0))["selection"]
        keys, self.broken = read_keys(roar.data, self.manifest)
        parts = partition(keys, validation=roar.validation, samples=roar.samples, skip=roar.skip, seed=roar.split_seed)
        transform = self.encoder.architecture["preprocess_cfg"], self.encoder.image_transform.size
        digest = _digest([self.manifest.fingerprint, settings, transform])
        training, validation = (roar.out / "data" / f"{name}-{digest}" for name in ("training", "validation"))
        for folder, own, name in zip((training, validation), parts, ("training", "validation"), strict=True):
            write_original(self.encoder, roar.data, own, folder, f"{self.manifest.name}: {name} part")
        return training, validation

    def _training_data(self, trial: Trial, bar: Progress) -> Path:
        """The folder that a trial trains on; if it is missing, the method's data of all modalities are created."""
        source, _ = self._originals
        if trial.label == ORIGINAL:
            return source
        folder = self._degraded_folder(trial)
        if not (folder / MANIFEST_NAME).is_file():
            maps = self._attribute(trial.label, source, bar)
            for modality in self.roar.modalities:
                target = Trial(trial.label, modality, 0)
                write_degraded(
                    self.encoder,
                    source,
                    maps,
                    self._degraded_folder(target),
                    modality=modality,  # type: ignore[arg-type]  # checked to be one of MODALITIES
                    fraction=self.roar.pixels if modality == "image" else self.roar.tokens,
                    fill=self.roar.fill,
                    name=f"{self.manifest.name}: training part without the {modality} of {trial.label}",
                )
        return folder

    def _degraded_folder(self, trial: Trial) -> Path:
        """Named after everything that its content depends on, so that it never holds data of other settings."""
        recipe = msgspec.structs.asdict(self._recipe(trial)) | {"training": {}}
        return self.roar.out / "degraded" / f"{trial.label}--{trial.modality}--{_digest(recipe)}"

    def _attribute(self, label: str, source: Path, bar: Progress) -> Any:
        pairs = Manifest.load(source).samples
        task = bar.add_task(f"explaining with {label}", total=pairs)
        start = time.perf_counter()
        maps = attribute_pairs(
            self.chosen[label].method,
            source,
            batch_size=self.roar.batch_size,
            on_progress=lambda count: bar.advance(task, count),
        )
        seconds = time.perf_counter() - start
        bar.remove_task(task)
        ties = count_ties(self.encoder, source, maps, pixels=self.roar.pixels, tokens=self.roar.tokens)
        bar.console.print(
            f"{label}: explained {pairs} pairs in {seconds:.1f} s, {pairs / seconds:.1f} pairs/s; the cut runs through "
            f"equal values in {ties['image']} images and {ties['text']} captions",
            soft_wrap=True,
        )
        speed = {"pairs": pairs, "seconds": seconds, "pairs_per_second": pairs / seconds}
        write_json(self.roar.out / "degraded" / f"{label}.json", {**speed, "cut_through_ties": ties})
        return maps

    def _retrain(self, trial: Trial, train: Path) -> None:
        start = time.perf_counter()
        _, validation = self._originals
        curve = retrain(self.encoder, train, validation, self.roar.training, name=str(trial), seed=trial.seed)
        seconds, about = time.perf_counter() - start, self._about
        if trial.label in self.chosen:
            method = self.chosen[trial.label].method
            flags = {"signed": method.signed, "baseline": method.baseline}
            about = msgspec.structs.replace(about, flags=flags)
        TrialResult(trial=trial, curve=tuple(curve), recipe=self._recipe(trial), about=about, seconds=seconds).save(
            self.roar.out
        )

    @cached_property
    def _about(self) -> About:
        roar = self.roar
        described = describe({}, roar.model, self.encoder)
        train, validation = (Manifest.load(folder) for folder in self._originals)
        excluded = Counter({BROKEN_RECORD: self.broken})
        for manifest in (train, validation):
            excluded.update(manifest.excluded)
        data = {
            "name": self.manifest.name,
            "folder": str(roar.data),
            "samples": self.manifest.samples,
            "training": train.samples,
            "validation": validation.samples,
            "excluded": {reason: count for reason, count in excluded.items() if count},
            "fingerprint": self.manifest.fingerprint,
        }
        settings = asdict(roar)
        for name in ("model", "data", "out", "methods", "trial", "prepare", "list_trials", "gather"):
            settings.pop(name)
        model = described["model"] | {"fingerprint": self.weights}
        return About(model, data, settings, described["versions"])


def _choose(encoder: DualEncoder, label: str, name: str, options: dict[str, Any]) -> ChosenMethod:
    try:
        return choose_method(encoder, name, options)
    except ValueError as error:
        raise ValueError(f"methods: {label}: {error}") from error


def _digest(value: Any) -> str:
    """A short name that depends on plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
