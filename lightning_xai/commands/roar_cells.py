"""The runs of ROAR+, called cells, and the files that hold what they got.

A cell is one retraining: on the original data, or without what one method finds most important in one modality, with
one seed. Each finished cell is one file, so that any number of jobs can share the work, and none is done twice. Nothing
here loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_xai.results.schema import RoarMethod, RoarResult, write_json

_MEASURED = ("model", "data")  # parts of a recipe that settings do not tell
_CHANGES_NO_NUMBER = ("internal_batch_size",)
ORIGINAL = "original"
"""Label of the cells that give l_o, where nothing is degraded."""
NOTHING = "none"
"""Their modality."""
VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One retraining.

    Attributes:
        label: of the method, or `ORIGINAL`.
        modality: what is degraded: image or text, or `NOTHING`.
        seed: of the retraining.
    """

    label: str
    modality: str
    seed: int

    def __str__(self) -> str:
        return f"{self.label}/{self.modality}/{self.seed}"

    def path(self, folder: Path) -> Path:
        """Its file below the output folder; there as soon as the cell is done."""
        return folder / "cells" / f"{self.label}--{self.modality}--{self.seed}.json"


@dataclass(frozen=True)
class CellResult:
    """What a cell got, and everything that it depends on.

    Attributes:
        cell: which one.
        curve: validation losses in nats: before training, and after each epoch; the last one counts.
        recipe: what the losses depend on; see `check_recipe`.
        about: `model`, `data`, `settings` and `versions` as in `RoarResult`.
        seconds: how long the retraining took.
    """

    cell: Cell
    curve: tuple[float, ...]
    recipe: Mapping[str, Any]
    about: Mapping[str, Mapping[str, Any]]
    seconds: float

    @property
    def loss(self) -> float:
        """Validation loss after the last epoch."""
        return self.curve[-1]

    def save(self, folder: Path) -> None:
        """Write the cell's file, whole or not at all."""
        write_json(self.cell.path(folder), {"version": VERSION, "loss": self.loss, **asdict(self)})


def plan_cells(labels: Sequence[str], modalities: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells in their order, which gives them their numbers: first those on the original data.

    >>> [str(cell) for cell in plan_cells(["m2ib"], ["image", "text"], [0, 1])][1:4]
    ['original/none/1', 'm2ib/image/0', 'm2ib/image/1']
    """
    degraded = (Cell(label, modality, seed) for label in labels for modality in modalities for seed in seeds)
    return [*(Cell(ORIGINAL, NOTHING, seed) for seed in seeds), *degraded]


def read_cell(folder: Path, cell: Cell) -> CellResult | None:
    """What a cell got; None where it has not been run to its end.

    Raises:
        ValueError: its file is broken or of another version.
    """
    path = cell.path(folder)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']!r}, this release reads {VERSION}")
        found = CellResult(
            cell=Cell(**record["cell"]),
            curve=tuple(float(loss) for loss in record["curve"]),
            recipe={**record["recipe"], **{name: dict(record["recipe"][name]) for name in (*_MEASURED, "method")}},
            about={name: dict(record["about"][name]) for name in ("model", "data", "settings", "versions")},
            seconds=float(record["seconds"]),
        )
        if found.cell != cell or not found.curve:
            raise ValueError(f"it is of the cell {found.cell}, with {len(found.curve)} losses")
    except (OSError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no result of this cell ({error!r}); delete it and run the cell again") from error
    return found


def check_recipe(found: CellResult, recipe: Mapping[str, Any], folder: Path) -> None:
    """Raise a ValueError that names what differs where a cell was run with other settings, data or weights."""
    changes = list(_differences(found.recipe, json.loads(json.dumps(recipe))))
    if changes:
        raise ValueError(
            f"{found.cell.path(folder)} was made with other settings: {'; '.join(changes)}. Use another --out folder, "
            "go back to the former settings, or delete the file to run the cell again"
        )


def options_that_count(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method that change its maps."""
    return {name: value for name, value in options.items() if name not in _CHANGES_NO_NUMBER}


def gather(
    folder: Path,
    cells: Sequence[Cell],
    methods: Mapping[str, tuple[str, Mapping[str, Any]]],
    settings: Callable[[Cell], Mapping[str, Any]],
    grid: Mapping[str, Any],
) -> RoarResult:
    """Put the results of all cells that are done together.

    Args:
        folder: the output folder.
        cells: all cells.
        methods: label -> the method's name and the options that it is given.
        settings: cell -> the part of its recipe that the settings alone tell.
        grid: option -> values, where the methods are the points of a grid.

    Raises:
        ValueError: no cell is done, a file is broken, or a cell is of other settings, weights or data than the others,
            or of another method or options than its label now stands for.
    """
    done = [found for cell in cells if (found := read_cell(folder, cell)) is not None]
    if not done:
        raise ValueError(f"{folder}: not one of the {len(cells)} cells is done; run some of them first")
    first, of_label = done[0], {found.cell.label: found for found in reversed(done)}
    for found in done:
        expected = {**found.recipe, **{name: first.recipe[name] for name in _MEASURED}, **settings(found.cell)}
        if found.cell.label in methods:
            name, options = methods[found.cell.label]
            recorded = of_label[found.cell.label].recipe["method"].get("options", {})
            expected["method"] = {"name": name, "options": {**recorded, **options_that_count(options)}}
        check_recipe(found, expected, folder)
    return RoarResult(
        model=first.about["model"],
        data=first.about["data"],
        settings=first.about["settings"],
        versions=first.about["versions"],
        original={found.cell.seed: found.loss for found in done if found.cell.label == ORIGINAL},
        methods={label: _method(label, *given, done) for label, given in methods.items()},
        missing=tuple(str(cell) for cell in cells if not cell.path(folder).is_file()),
        grid=grid,
        base_loss=first.curve[0],
    )


def _method(label: str, name: str, options: Mapping[str, Any], done: Sequence[CellResult]) -> RoarMethod:
    own = [found for found in done if found.cell.label == label]
    losses: dict[str, dict[int, float]] = {}
    for found in own:
        losses.setdefault(found.cell.modality, {})[found.cell.seed] = found.loss
    return RoarMethod(name, own[0].recipe["method"]["options"] if own else dict(options), losses)


def _differences(was: Any, now: Any, at: str = "") -> Iterator[str]:
    """What differs between two nested records.

    >>> list(_differences({"training": {"lr": 1, "epochs": 5}}, {"training": {"lr": 2, "epochs": 5}}))
    ['training.lr was 1 and is 2']
    """
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from _differences(was.get(key), now.get(key), f"{at}.{key}" if at else str(key))
    elif was != now:
        yield f"{at} was {was!r} and is {now!r}"
