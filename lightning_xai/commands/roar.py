"""`roar`: ROAR+, which tests whether heat maps find what a model learns from, in trials that many jobs can share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.roar_cells import ORIGINAL, Cell, gather, plan_cells
from lightning_xai.report.roar import grid_tables, roar_table
from lightning_xai.results.schema import CONTROLS, MODALITIES, check_label, method_of

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there, and so torch.

_CHANGES_NO_NUMBER = ("eval_batch_size",)


@dataclass
class Retraining:
    """How a cell is trained.

    Attributes:
        epochs: passes over the training part.
        batch_size: images in a training batch, each other's negatives.
        lr: learning rate of AdamW, constant.
        weight_decay: of AdamW.
        betas: AdamW's running averages.
        max_logit_scale: upper bound of the factor on similarities.
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


@dataclass
class Roar:
    """Remove what heat maps find important, retrain, and see how much worse the model gets (ROAR+).

    A part of a split is explained once by each method. From its images the most important pixels are taken (the mean of
    each channel takes their place), or from its captions the most important words (padding does). The model is
    fine-tuned on what is left, and measured on another part of the split as it is: the score of a method is
    (l_c - l_o) / l_o, where l_c is that loss and l_o the loss after fine-tuning on the original data. The higher the
    better: the method has found what matters. Random maps and a Gaussian in the middle are the controls to beat.

    Each retraining is a cell (method, modality, seed), whose result is a file. A cell that is done is never run again:
    call the same line again after an interruption, or to add methods and seeds.

    Everything, one cell after another (needs the model of `fit --config configs/demo.yaml`):
      python -m lightning_xai roar --config configs/roar_demo.yaml
    Which cells there are, and which are done:
      python -m lightning_xai roar --config configs/roar_demo.yaml --list-cells
    On a Slurm cluster, one cell a job, and the table at last:
      slurm/roar.sh configs/roar_paper.yaml
    The same by hand:
      python -m lightning_xai roar --config configs/roar_demo.yaml --prepare
      python -m lightning_xai roar --config configs/roar_demo.yaml --cell 0
      python -m lightning_xai roar --config configs/roar_demo.yaml --gather
    The hyperparameters of a method (Table 2 of the M2IB paper):
      python -m lightning_xai roar --config configs/roar_grid.yaml

    Attributes:
        model: the base model, which is explained and then retrained.
        data: folder of shards of one split, as prepare writes them.
        out: folder to write to: cells/, the degraded data, and result.json.
        methods: name, or any label, of each method -> its options, as {m2ib: {beta: 0.01}}; one that goes by another
            label is named among them: {tight: {method: m2ib, beta: 1.0}}.
        controls: random and gaussian take part as well.
        grid: option -> values; the one method given takes part with each combination of them.
        modalities: what is degraded: image, text.
        seeds: of the retraining; one cell for each.
        samples: how many samples of the split take part, drawn at random; left out: all.
        skip: how many of the samples in their random order to pass over; samples: 500 and skip: 500 do not overlap.
        split_seed: of that order, and of which samples are validated on.
        validation: share of the samples that is validated on.
        pixels: share of an image's pixels that is taken away.
        tokens: share of a caption's tokens that is taken away.
        fill: what pixels are replaced by: model_mean, the mean of each channel that the model's normalisation
            subtracts; or image_mean, that over the image itself, which lets some of the color through that is taken.
        training: how a cell is trained.
        batch_size: pairs that are explained at a time; changes no number.
        cell: run this cell alone, by its number in --list-cells.
        prepare: only explain, and write the data that cells need; where many jobs share the cells, one does so first.
        list_cells: only list the cells.
        gather: only put together what is done.
    """

    model: ModelChoice
    data: Path
    out: Path
    methods: dict[str, dict[str, Any] | None]
    controls: bool = True
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
    cell: int | None = None
    prepare: bool = False
    list_cells: bool = False
    gather: bool = False

    def __call__(self) -> None:
        """Run the cells that are not done, and put all together.

        Raises:
            ValueError: settings that cannot be met, no such method, model or data, or results of other settings.
            RuntimeError: a loss is not finite.
        """
        methods = all_methods(self)
        cells = plan_cells(list(methods), self._modalities(), self._seeds())
        if self.list_cells:
            for number, cell in enumerate(cells):
                print(number, cell, "done" if cell.path(self.out).is_file() else "to do")  # noqa: T201
            return
        if (self.cell is not None) + self.prepare + self.gather > 1:
            raise ValueError("--cell, --prepare and --gather are different things to do: give one of them at a time")
        if self.cell is not None and not 0 <= self.cell < len(cells):
            raise ValueError(f"--cell has to be 0 to {len(cells) - 1} (see --list-cells); got {self.cell}")
        if not self.gather:
            self._run(cells if self.cell is None else [cells[self.cell]], methods)
        if self.cell is None and not self.prepare:
            self._report(cells, methods)

    def _run(self, cells: list[Cell], methods: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        from lightning_xai.commands.roar_run import RoarRun

        _check_checkpoint(self.model.name)
        run = RoarRun(self, methods)
        if self.prepare:
            run.prepare()
        else:
            run.run(cells)

    def _report(self, cells: list[Cell], methods: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        result = gather(self.out, cells, methods, partial(recipe_settings, self), self.grid)
        result.save(self.out)
        console = Console()
        console.print(roar_table(result))
        for table in grid_tables(result):
            console.print(table)
        if result.missing:
            print(f"{len(result.missing)} of {len(cells)} cells are missing; see --list-cells")  # noqa: T201
        print(f"Written: {self.out / 'result.json'}; the losses of each epoch: {self.out / 'cells'}")  # noqa: T201

    def _modalities(self) -> tuple[str, ...]:
        if not self.modalities or not set(self.modalities) <= set(MODALITIES):
            raise ValueError(f"modalities has to hold image, text or both; got {list(self.modalities)}")
        return tuple(modality for modality in MODALITIES if modality in self.modalities)

    def _seeds(self) -> tuple[int, ...]:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds has to hold different numbers, at least one, none below 0; got {self.seeds}")
        return self.seeds


def all_methods(roar: Roar) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> name and options of every method that takes part, controls and points of a grid included.

    Raises:
        ValueError: a label or an entry that is none, a grid without its one method, or nobody takes part.
    """
    given = {label: method_of(label, options) for label, options in roar.methods.items()}
    if ORIGINAL in given:
        raise ValueError(f"the label {ORIGINAL!r} stands for the data as they are; give the method another one")
    if roar.grid:
        given = _grid_points(given, roar.grid)
    for name in CONTROLS if roar.controls else ():
        given.setdefault(name, (name, {}))
    if not given:
        raise ValueError("no method takes part: give some as methods, or set controls to true")
    return given


def recipe_settings(roar: Roar, cell: Cell) -> dict[str, Any]:
    """What a cell's result depends on, as far as the settings tell."""
    taken = {"image": {"pixels": roar.pixels, "fill": roar.fill}, "text": {"tokens": roar.tokens}}
    training = asdict(roar.training)
    return {
        "selection": {name: getattr(roar, name) for name in ("samples", "skip", "split_seed", "validation")},
        "degradation": taken.get(cell.modality, {}),
        "training": {name: value for name, value in training.items() if name not in _CHANGES_NO_NUMBER},
    }


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
