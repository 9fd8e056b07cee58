"""Measures, while a model learns, how well phrases of captions match their objects inside it: gamma and rho."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import msgspec
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lightning_xai.attribution.feature_pair import FeaturePairAttribution
from lightning_xai.attribution.path_integral import Rule, quadrature
from lightning_xai.attribution.presets import Preset, preset_setting
from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.evaluation.examples import example_of
from lightning_xai.evaluation.logged_pictures import log_pictures
from lightning_xai.evaluation.method_run import join_rows
from lightning_xai.evaluation.rows import BOX_COLUMNS, BatchRows, in_digits, maps_of, measure_batch, places_of
from lightning_xai.metrics.grounding import SPEC
from lightning_xai.metrics.registry import choose_metric
from lightning_xai.models.at_layer import first_layer
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.report.plots import Example
from lightning_xai.results.examples import ExampleRecord
from lightning_xai.training.grounding_report import INPUT, LOGGED, METHOD, Reading, Row, for_loggers, show, write
from lightning_xai.training.measured_model import describe_measured
from lightning_xai.training.measurement import check_monitors, find_encoder, is_due, is_fitting
from lightning_xai.training.phrase_sample import PhraseSample
from lightning_xai.training.run_loggers import log_measured

if TYPE_CHECKING:
    import pandas as pd

    from lightning_xai.results.table import ResultTable

__all__ = ["GroundingCallback"]

_SCALARS = (*LOGGED, "grounding_targets")
_EVERY_SCALAR = (*_SCALARS, *(f"{name}{INPUT}" for name in _SCALARS))


class GroundingPass:
    """The rows of one evaluation on this rank, measured batch by batch after the module's own forward passes.

    Args:
        readings: the layers to read at, those that all phrases are read at first; then the inputs, if wanted.
        sample: chooses the phrases that are read at the inputs.
        batch_size: phrases attributed at a time; bounds memory, changes no number.
        examples: how many examples to keep for drawing.

    Attributes:
        label_names: the split's classes; None before the first batch.
        examples: what to draw of `row["examples"]`.
        records: label of a reading -> the same examples with their maps, to keep as files.
        words: label of a reading -> place of an example -> the maps of its caption's words, [n, H, W].
        split: `"val"` or `"test"`; as all that follows after `finish`.
        row: `targets`, gamma and rho over all ranks, and `examples`.
        table: the long table of all ranks, on the first one; elsewhere None.
    """

    split: str
    row: Row
    table: ResultTable | None

    def __init__(
        self, readings: Sequence[Reading], sample: PhraseSample | None, batch_size: int, examples: int
    ) -> None:
        self.hooks = ExitStack()
        self.readings = readings
        self._encoder = readings[0].attribution.encoder
        self._maps = [maps_of(reading.attribution, batch_size) for reading in readings]
        self._sample = sample
        self._metric = choose_metric(SPEC.name, {})
        self._most_drawn = examples
        self.label_names: tuple[str, ...] | None = None
        self.examples: list[Example] = []
        self.records: dict[str, list[ExampleRecord]] = {reading.label: [] for reading in readings}
        self.words: dict[str, dict[int, NDArray[np.float32]]] = {reading.label: {} for reading in readings}
        self._targets: list[dict[str, Any]] = []
        self._values: list[tuple[Any, ...]] = []
        self._drawn: dict[str, list[Any]] = {"keys": []}
        for reading in readings:
            self._drawn |= {f"{name}{reading.suffix}": [] for name in ("heats", "gammas", "hits")}

    def open(self) -> None:
        """Capture what the forward pass of a batch computes."""
        self.hooks.close()
        self.hooks.enter_context(self._maps[0].forward_pass())

    def add(self, batch: Batch) -> None:
        """Measure a batch whose forward pass has just run."""
        self.hooks.close()
        if self.label_names is None:
            self.label_names = batch.label_names
        if self.label_names != batch.label_names:
            raise ValueError(
                "the batches of one evaluation differ in their classes; GroundingCallback measures one split at a "
                "time, so give the trainer one validation data loader"
            )
        rows = self._measure(0, batch)
        if self._sample is not None:
            for part in self._sample.add(batch):
                self._measure(1, part)
        self._draw(batch, rows)

    def _measure(self, number: int, batch: Batch) -> BatchRows:
        rows = measure_batch(batch, self._maps[number], [self._metric])
        self._targets += rows.targets
        self._values += [(self.readings[number].label, 0, *row) for row in rows.values]
        return rows

    def finish(self, split: str, device: torch.device) -> None:
        """Put together what all ranks have measured; every rank has to call this."""
        self.hooks.close()
        if self.label_names is None:
            raise RuntimeError(
                "the evaluation had no lightning_xai.data.Batch, so there is no grounding: let the data loader give "
                "such batches (ShardDataModule does), or take GroundingCallback out"
            )
        if self._sample is not None:
            for part in self._sample.finish(device):
                self._measure(1, part)
        self.split = split
        found, self.table = join_rows(self._values, self._targets, SPEC.scores)
        self.row = {}
        for reading in self.readings:
            scores = {score.name: found.get((reading.label, 0, score.name), (math.nan, 0)) for score in SPEC.scores}
            own: Row = {"targets": scores[LOGGED[0]][1]} | {name: scores[name][0] for name in LOGGED}
            own |= {"excluded": self._excluded(reading), "layers": reading.layers}
            self.row |= {f"{name}{reading.suffix}": value for name, value in own.items()}
        self.row["examples"] = self._drawn

    @cached_property
    def classes(self) -> pd.DataFrame:
        """A line for each class of the split, in the split's order, and columns for each reading; on the first rank."""
        import pandas as pd

        from lightning_xai.results.table import summary_table

        assert self.table is not None, "the first rank holds the table"
        frame, parts = self.table.frame, []
        for reading in self.readings:
            own = frame[frame["method"] == reading.label]
            classes = summary_table(own, SPEC.scores, ["label"]).set_index("label").reindex(self.label_names)
            counts = [column for column in classes.columns if column == "targets" or column.startswith("excluded_")]
            classes[counts] = classes[counts].fillna(0).astype("int64")
            parts.append(classes.assign(layers=reading.layers).add_suffix(reading.suffix))
        return pd.concat(parts, axis="columns").rename_axis("label").reset_index()

    def _excluded(self, reading: Reading) -> dict[str, int]:
        """How many phrases were not measured, by reason; on the first rank."""
        if self.table is None:
            return {}
        from lightning_xai.results.table import exclusions

        values = self.table.values
        own = values[(values["metric"] == SPEC.values[0]) & (values["method"] == reading.label)]
        counts = exclusions(own, by=["metric"])
        return {why: count for why, count in zip(counts["excluded"], counts["count"].tolist(), strict=True) if why}

    def _draw(self, batch: Batch, rows: BatchRows) -> None:
        """Keep the first phrase of each of the first images; which ones they are never depends on the model."""
        new: dict[int, dict[str, Any]] = {}
        drawn = {example.key for example in self.examples}
        for target, _ in rows.phrases:
            if len(drawn) < self._most_drawn and target["key"] not in drawn:
                drawn.add(target["key"])
                new[target["index"]] = target
        if not new:
            return
        parts = [(batch, rows)]
        if len(self.readings) > 1:
            few = _first_phrases(batch, rows, {index: target["ordinal"] for index, target in new.items()})
            parts += [(few, measure_batch(few, maps, [self._metric])) for maps in self._maps[1:]]
        for target in new.values():
            self._draw_example(batch, target)
            for number, (part, found) in enumerate(parts):
                self._draw_map(number, target, found)
                self._map_words(number, part, found, target)

    def _draw_map(self, number: int, target: Mapping[str, Any], rows: BatchRows) -> None:
        """Keep the map of an example at one of the readings."""
        reading = self.readings[number]
        values = {metric: value for name, metric, value, _ in rows.values if name == target["target"]}
        heat = rows.phrase_maps[target["target"]]
        drawn = {"heats": heat.float().clone(), "gammas": values["gamma"], "hits": values["rho"] == 1}
        for name, value in drawn.items():
            self._drawn[f"{name}{reading.suffix}"].append(value)
        _, record = example_of(target, values["gamma"], values["rho"] == 1, in_digits(heat))
        self.records[reading.label].append(msgspec.structs.replace(record, why=("fixed",)))

    def _map_words(self, number: int, batch: Batch, rows: BatchRows, target: Mapping[str, Any]) -> None:
        """Keep the maps of the words of the last example's caption, where its words are whole tokens."""
        label = self.readings[number].label
        image = int((batch.index == target["index"]).nonzero()[0])
        own = (batch.caption_image == image) & (batch.caption_index == target["caption_index"])
        caption = int(own.nonzero()[0, 0])
        found = self._maps[number].word_maps(rows.states, image, caption, target["caption"])
        if found is not None:
            self.words[label][len(self.records[label]) - 1] = found.numpy()

    def _draw_example(self, batch: Batch, target: Mapping[str, Any]) -> None:
        image = (batch.index == target["index"]).nonzero()[0]
        pixels = self._encoder.pictures(batch.images[image].float().cpu())[0].permute(1, 2, 0).numpy()
        text, phrase, box = target["caption"], target["phrase"], tuple(target[side] for side in BOX_COLUMNS)
        self.examples.append(Example(np.asarray(pixels), phrase, text, places_of(text, phrase), box, target["key"]))
        self._drawn["keys"].append(f"{target['key']}: {phrase}")


class GroundingCallback(Callback):
    """Gamma and rho of every phrase with a box, before training and after each epoch, on all ranks.

    Works with any LightningModule that has a `DualEncoder` (as attribute `encoder`, or anywhere among its modules) and
    evaluates `Batch`es. The hidden states come out of the validation's own forward pass, so that only the layers from
    the chosen ones on run again. Logs `val/gamma_mean`, `val/gamma_above_50`, `val/gamma_above_80`, `val/rho`
    (fractions in [0, 1]) and `val/grounding_targets`. A sample of the phrases is read at the inputs of both towers as
    well (the first layers that attribution reaches: a ResNet's is its first stage), where tokens and patches have not
    been mixed yet: `val/gamma_mean_input` and so on. Checkpoint callbacks can monitor each of them (`test/...` in a
    test run); they are NaN where no phrase could be measured, which a warning says and loggers do not get. All that is
    logged under `val/` in the validation before training goes to the loggers as well, at step 0.
    What the module and other callbacks log under `val/` stands next to grounding in all tables and curves.

    In the run's folder, under `grounding/`: a result folder for each measurement (`epoch=003/`: the long table, its
    record, `classes.csv` with a line for each class, and the maps of a few fixed examples, `METHOD/examples.json` and
    `words.safetensors`, whose pictures are in `examples/`; `step=00000040/` for one within an epoch), `summary.csv`,
    `curves.png`, and `progress.png`, on which the heat maps of the examples change from epoch to epoch. `watch` shows
    them all while the run goes on.
    `trainer.validate` and `trainer.test` write `validate/` and `test/`, `summary-test.csv` and so on. Each logger of
    the trainer gets the pictures as `val/grounding` and `val/grounding_curves`, and tables of the phrases (with the
    heat maps of the examples) and the classes, `val/grounding_pairs` and `val/grounding_classes`, see `log_pictures`.

    Args:
        image_layer: layer of the image tower to attribute to, see `FeaturePairAttribution`. None: the preset's, as for
            the next three.
        text_layer: layer of the text tower.
        steps: integration steps.
        rule: quadrature rule.
        preset: `paper`, `fast` or `inputs`, see `FeaturePairAttribution`.
        image_reference: the uninformative image.
        input_phrases: how many phrases are read at the inputs; 0: none, None: all. They are the same ones in each
            measurement, on any number of processes and in batches of any size: whole images in a random order, until
            there are so many phrases. Until the end of an evaluation, the images wait in memory.
        input_steps: integration steps at the inputs; None: those of the preset `inputs`.
        input_rule: quadrature rule there, likewise.
        input_seed: of the random order.
        every_n_epochs: measure in the validations of each n-th epoch, before training, and where training ends in an
            epoch that would have no validation there.
        before_training: measure the model as it comes, in a full validation before the first step.
        examples: how many fixed examples to draw; the first that can be measured, each of another image.
        internal_batch_size: phrases attributed at a time.

    Attributes:
        history: a `Row` for each measurement of the training so far.

    Raises:
        ValueError: an option outside its range; at set-up: `inference_mode` is on, no DualEncoder, no such layer, or a
            callback that monitors grounding in epochs that are not measured.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        *,
        image_layer: int | None = None,
        text_layer: int | None = None,
        steps: int | None = None,
        rule: Rule | None = None,
        preset: Preset = "paper",
        image_reference: Literal["zeros", "black"] = "zeros",
        input_phrases: int | None = 500,
        input_steps: int | None = None,
        input_rule: Rule | None = None,
        input_seed: int = 0,
        every_n_epochs: int = 1,
        before_training: bool = True,
        examples: int = 6,
        internal_batch_size: int = 128,
    ) -> None:
        given = {"every_n_epochs": every_n_epochs, "examples": examples, "internal_batch_size": internal_batch_size}
        for name, value in (given | {"input_phrases": input_phrases or 0}).items():
            if value < (least := 0 if name in ("examples", "input_phrases") else 1):
                raise ValueError(f"{name} has to be at least {least}; got {value}")
        self._options: dict[str, Any] = {
            "image_layer": image_layer,
            "text_layer": text_layer,
            "steps": steps,
            "rule": rule,
            "preset": preset,
            "image_reference": image_reference,
        }
        self._input_options = self._options | {"steps": input_steps, "rule": input_rule, "preset": "inputs"}
        for options in (self._options, self._input_options):
            quadrature(*preset_setting(options["preset"]).points(options["rule"], options["steps"]))  # refused at once
        self.input_phrases = input_phrases
        self.input_seed = input_seed
        self.every_n_epochs = every_n_epochs
        self.before_training = before_training
        self.examples = examples
        self.internal_batch_size = internal_batch_size
        self.history: list[Row] = []
        self._readings: tuple[Reading, ...] = ()
        self._pass: GroundingPass | None = None
        self._measured: GroundingPass | None = None
        self._logged_before: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all that could fail later, before anything is computed."""
        if stage == "predict":
            return
        if trainer.test_loop.inference_mode:
            raise ValueError(
                "grounding needs gradients in validation and test, which inference mode rules out: "
                "use Trainer(inference_mode=False), or --trainer.inference_mode=false"
            )
        self._readings = self._read_at(find_encoder(pl_module, type(self).__name__))
        # Lightning gets them all the same, since checkpoints may monitor them; what else a module logs is its own.
        log_measured(trainer.loggers, [f"{split}/{name}" for split in ("val", "test") for name in _EVERY_SCALAR])
        if stage != "fit":
            return
        self._check_monitors(trainer)
        if trainer.current_epoch == 0:
            # A new run; one that resumes gets its history from the checkpoint, after set-up.
            self.history = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Turn Lightning's check before training, a few batches, into a whole validation: the first measurement."""
        if self._first_is_due():
            trainer.num_sanity_val_steps = float("inf")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a measurement, in epochs that are measured."""
        due = self._first_is_due() if trainer.sanity_checking else is_due(trainer, self.every_n_epochs)
        self._logged_before = dict(trainer.callback_metrics)
        if due:
            assert self._readings, "Lightning calls setup first"
            examples = self.examples if trainer.is_global_zero else 0
            inputs = self._readings[1:]
            sample = PhraseSample(self.input_phrases, self.input_seed, inputs[0].attribution.grid) if inputs else None
            self._pass = GroundingPass(self._readings, sample, self.internal_batch_size, examples)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Capture what the batch's forward pass computes."""
        if self._pass is not None:
            self._pass.open()

    on_test_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Attribute the batch's phrases, from the hidden states of its forward pass."""
        if self._pass is not None and isinstance(batch, Batch):
            self._pass.add(batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the ranks' rows, and log the scores."""
        if self._pass is None:
            return
        self._measured, self._pass = self._pass, None
        self._measured.finish("test" if trainer.testing else "val", pl_module.device)
        for reading in self._readings:
            for name in _SCALARS:
                # Every rank holds the same number already.
                value = self._measured.row[f"{name.removeprefix('grounding_')}{reading.suffix}"]
                whole = f"{self._measured.split}/{name}{reading.suffix}"
                pl_module.log(whole, float(value), prog_bar=name == "rho")
            if not self._measured.row[f"targets{reading.suffix}"]:
                why = self._measured.row[f"excluded{reading.suffix}"]
                rank_zero_warn(
                    f"{self._measured.split}: gamma and rho at layers {reading.layers} have no value, as no phrase "
                    f"could be measured ({', '.join(f'{n} {name}' for name, n in why.items()) or 'there is none'}); a "
                    "checkpoint that monitors them takes this for the worst, and early stopping ends the run unless "
                    "its check_finite is false"
                )

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write tables and pictures, now that the module has logged its own numbers of this evaluation."""
        if self._measured is None:
            return
        measured, self._measured = self._measured, None
        prefix = f"{measured.split}/"
        logged = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            # Lightning keeps what was logged in earlier validations, by callbacks that pass over this one.
            if name.startswith(prefix) and value is not self._logged_before.get(name)
        }
        row: Row = _state(trainer) | measured.row
        others = {name.removeprefix(prefix): value for name, value in logged.items()}
        row |= {name: value for name, value in others.items() if name not in {*row, *_EVERY_SCALAR}}
        if is_fitting(trainer):
            self.history = [old for old in self.history if old["step"] != row["step"]] + [row]
        if trainer.sanity_checking:
            # Lightning keeps what this validation logs to itself.
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step)
        folder = _folder(trainer)
        if trainer.is_global_zero:
            self._report(trainer, folder, self.history if is_fitting(trainer) else [row], measured)

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the table of grounding per epoch, and where the pictures are."""
        folder = _folder(trainer)
        if trainer.is_global_zero and self.history:
            show(folder, self.history)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        if self._pass is not None:
            self._pass.hooks.close()
        self._pass = self._measured = None

    on_exception = teardown

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far, so that a resumed run continues its table and pictures."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the measurements of the run that wrote the checkpoint."""
        self.history = [row for row in state_dict["history"] if "targets" in row]
        if len(self.history) < len(state_dict["history"]):
            warnings.warn(
                "Skipped grounding measured by an earlier release, in another format; measurements start again from "
                "this checkpoint on",
                stacklevel=2,
            )

    def _first_is_due(self) -> bool:
        """A run that resumes has a history from its checkpoint, which the measurement before training belongs to."""
        return self.before_training and not self.history

    def _report(self, trainer: L.Trainer, folder: Path, rows: list[Row], measured: GroundingPass) -> None:
        about = _about(trainer, measured.split, self._readings[0].attribution.encoder)
        about["settings"] = {name: getattr(self, name) for name in ("input_phrases", "input_seed")}
        pictures = write(folder, rows, measured, about)
        log_pictures(trainer, for_loggers(folder, rows[-1], measured, pictures))
        if not is_fitting(trainer):
            show(folder, rows)

    def _read_at(self, encoder: DualEncoder) -> tuple[Reading, ...]:
        """Where to read; the layers of the inputs are the first that attribution reaches in both towers."""
        attribution = FeaturePairAttribution(encoder, **self._options)
        last = Reading(METHOD, "", attribution, self._options | attribution.resolved_options)
        if self.input_phrases == 0:
            return (last,)
        image, text = first_layer(encoder.image_at_layer), first_layer(encoder.text_at_layer)
        options = self._input_options | {"image_layer": image, "text_layer": text}
        label = f"{METHOD},{image},{text}"
        inputs = FeaturePairAttribution(encoder, **options)
        return last, Reading(label, INPUT, inputs, options | inputs.resolved_options)

    def _check_monitors(self, trainer: L.Trainer) -> None:
        logged = {f"val/{name}" for name in _EVERY_SCALAR}
        for callback in (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks):
            monitor = str(getattr(callback, "monitor", None))
            if monitor in logged and monitor.endswith(INPUT) and self.input_phrases == 0:
                raise ValueError(
                    f"{type(callback).__name__} looks at {monitor}, which is not measured with input_phrases=0: set "
                    "GroundingCallback's input_phrases to how many phrases to read at the inputs"
                )
        check_monitors(trainer, logged, type(self).__name__, self.every_n_epochs)


def _first_phrases(batch: Batch, rows: BatchRows, last: Mapping[int, int]) -> Batch:
    """Some images of a batch, with the phrases up to the one that is drawn of each.

    Args:
        batch: the batch.
        rows: measured on it.
        last: index of an image -> the number of its last phrase.
    """
    images = [row for row, index in enumerate(batch.index.tolist()) if index in last]
    few = batch.only(torch.tensor(images, device=batch.index.device))
    kept = [target["ordinal"] <= last[target["index"]] for target in rows.targets if target["index"] in last]
    return replace(few, phrases=few.phrases.only(torch.tensor(kept, device=few.index.device).nonzero()[:, 0]))


def _about(trainer: L.Trainer, split: str, encoder: TwoTowerEncoder) -> dict[str, dict[str, Any]]:
    """`model` and `data` of a measurement's record, as far as they are known."""
    data = getattr(trainer, "datamodule", None)
    model = {"architecture": encoder.name, "preprocessing": encoder.preprocessing, **describe_measured(trainer)}
    if not isinstance(data, ShardDataModule):
        return {"model": model}
    manifest = data.manifest(split)
    described = {"name": manifest.name, "folder": str(data.stores[split]), "fingerprint": manifest.fingerprint}
    return {"model": model, "data": described | {"samples": manifest.samples, "split": split}}


def _state(trainer: L.Trainer) -> Row:
    """`epoch`, `step` and, within an epoch, `batch` of a row."""
    step = trainer.global_step
    if not is_fitting(trainer):
        return {"epoch": "test" if trainer.testing else "validate", "step": step}
    if trainer.sanity_checking:
        return {"epoch": trainer.current_epoch, "step": step}
    if trainer.is_last_batch:
        return {"epoch": trainer.current_epoch + 1, "step": step}
    return {"epoch": trainer.current_epoch, "step": step, "batch": trainer.fit_loop.batch_idx + 1}


def _folder(trainer: L.Trainer) -> Path:
    """The run's folder for grounding; every rank has to call this, since Lightning agrees on the folder over ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "grounding"
