"""One process that runs cells of `roar`: the model it has loaded, and the data it makes or finds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_xai.attribution.method_options import ChosenMethod, choose_method
from lightning_xai.commands.inputs import load_model
from lightning_xai.commands.outputs import describe
from lightning_xai.commands.roar import Roar, recipe_settings
from lightning_xai.commands.roar_cells import (
    NOTHING,
    ORIGINAL,
    Cell,
    CellResult,
    check_recipe,
    options_that_count,
    read_cell,
)
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
from lightning_xai.results.schema import write_json
from lightning_xai.training.roar import retrain


class RoarRun:
    """Runs cells in this process.

    Args:
        roar: all settings.
        methods: label -> name and options of each method.

    Raises:
        ValueError: no such model, data or method, or one that cannot serve the model.
    """

    def __init__(self, roar: Roar, methods: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        self.roar = roar
        self.manifest = Manifest.load(roar.data)
        encoder = load_model(roar.model)
        if not isinstance(encoder, DualEncoder):
            raise ValueError(f"roar needs a model of images and captions; {roar.model.name} is a {encoder.name}")
        self.encoder = encoder
        self.chosen = {label: _choose(encoder, label, *given) for label, given in methods.items()}
        self.weights = weights_fingerprint(encoder)
        self.broken = 0  # records of the split that cannot be read

    def run(self, cells: list[Cell]) -> None:
        """Run those of the cells that are not done; data that they need are made on the way.

        Raises:
            ValueError: a cell is done, but with other settings, data or weights.
            NonFiniteLossError: a loss is NaN or infinite.
        """
        to_do = [cell for cell in cells if not self._is_done(cell)]
        with _progress() as bar:
            task = bar.add_task("cells", total=len(cells), completed=len(cells) - len(to_do))
            for cell in to_do:
                train = self._training_data(cell, bar)
                bar.update(task, description=str(cell))
                self._retrain(cell, train)
                bar.advance(task)

    def prepare(self) -> None:
        """Only make the data that cells need: one job does so before many that share the cells."""
        with _progress() as bar:
            for label in (ORIGINAL, *self.chosen):
                for modality in self.roar.modalities:
                    self._training_data(Cell(label, modality, 0), bar)

    def _is_done(self, cell: Cell) -> bool:
        found = read_cell(self.roar.out, cell)
        if found is not None:
            check_recipe(found, self._recipe(cell), self.roar.out)
        return found is not None

    def _recipe(self, cell: Cell) -> dict[str, Any]:
        """All that a cell's losses depend on."""
        method, architecture = self.chosen.get(cell.label), self.encoder.architecture
        return {
            "model": {
                "architecture": architecture["model_cfg"],
                "preprocessing": architecture["preprocess_cfg"],
                "weights": self.weights,
            },
            "data": {"shards": self.manifest.fingerprint},
            "method": {} if method is None else {"name": method.name, "options": options_that_count(method.options)},
            **recipe_settings(self.roar, cell),
        }

    @cached_property
    def _originals(self) -> tuple[Path, Path]:
        """Folders of the training and the validation part."""
        parts, settings = self._partition, recipe_settings(self.roar, Cell(ORIGINAL, NOTHING, 0))["selection"]
        transform = self.encoder.architecture["preprocess_cfg"], self.encoder.image_transform.size
        digest = _digest([self.manifest.fingerprint, settings, transform])
        folders = []
        for name, keys in (("training", parts.training), ("validation", parts.validation)):
            folder = self.roar.out / "data" / f"{name}-{digest}"
            write_original(self.encoder, self.roar.data, keys, folder, f"{self.manifest.name}: {name} part")
            folders.append(folder)
        return folders[0], folders[1]

    @cached_property
    def _partition(self) -> Any:
        keys, self.broken = read_keys(self.roar.data, self.manifest)
        roar = self.roar
        return partition(keys, validation=roar.validation, samples=roar.samples, skip=roar.skip, seed=roar.split_seed)

    def _training_data(self, cell: Cell, bar: Progress) -> Path:
        """The folder that a cell trains on; where it is missing, the method's data of all modalities are made."""
        source, _ = self._originals
        if cell.label == ORIGINAL:
            return source
        folder = self._degraded_folder(cell)
        if not (folder / MANIFEST_NAME).is_file():
            maps = self._attribute(cell.label, source, bar)
            for modality in self.roar.modalities:
                target = Cell(cell.label, modality, 0)
                write_degraded(
                    self.encoder,
                    source,
                    maps,
                    self._degraded_folder(target),
                    modality=modality,  # type: ignore[arg-type]  # checked to be one of MODALITIES
                    fraction=self.roar.pixels if modality == "image" else self.roar.tokens,
                    fill=self.roar.fill,
                    name=f"{self.manifest.name}: training part without the {modality} of {cell.label}",
                )
        return folder

    def _degraded_folder(self, cell: Cell) -> Path:
        """Named after all that its content depends on, so that it never holds what other settings made."""
        recipe = {name: part for name, part in self._recipe(cell).items() if name != "training"}
        return self.roar.out / "degraded" / f"{cell.label}--{cell.modality}--{_digest(recipe)}"

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

    def _retrain(self, cell: Cell, train: Path) -> None:
        start = time.perf_counter()
        options = asdict(self.roar.training)
        _, validation = self._originals
        curve = retrain(self.encoder, train, validation, cell=str(cell), seed=cell.seed, **options)
        recipe, seconds = self._recipe(cell), time.perf_counter() - start
        CellResult(cell, tuple(curve), recipe, self._about, seconds).save(self.roar.out)

    @cached_property
    def _about(self) -> dict[str, dict[str, Any]]:
        roar = self.roar
        described = describe({}, roar.model, self.encoder)
        train, validation = (Manifest.load(folder) for folder in self._originals)
        left_out = {"broken record": self.broken}
        for manifest in (train, validation):
            for reason, count in manifest.excluded.items():
                left_out[reason] = left_out.get(reason, 0) + count
        data = {
            "name": self.manifest.name,
            "folder": str(roar.data),
            "samples": self.manifest.samples,
            "training": train.samples,
            "validation": validation.samples,
            "left_out": {reason: count for reason, count in left_out.items() if count},
            "fingerprint": self.manifest.fingerprint,
        }
        settings = asdict(roar)
        for name in ("model", "data", "out", "methods", "cell", "prepare", "list_cells", "gather"):
            settings.pop(name)
        return {
            "model": described["model"] | {"fingerprint": self.weights},
            "data": data,
            "settings": settings,
            "versions": described["versions"],
        }


def _choose(encoder: DualEncoder, label: str, name: str, options: dict[str, Any]) -> ChosenMethod:
    try:
        return choose_method(encoder, name, options)
    except ValueError as error:
        raise ValueError(f"methods: {label}: {error}") from error


def _digest(value: Any) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        yield bar
