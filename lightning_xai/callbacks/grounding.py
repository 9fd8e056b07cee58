"""Measures, while a model learns, how well phrases of captions match their objects inside it: gamma and rho."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor

from lightning_xai.attribution.capture import InputCapture
from lightning_xai.attribution.feature_pair import FeaturePairAttribution, HiddenStates, References
from lightning_xai.attribution.path_integral import Rule
from lightning_xai.data.batch import Batch, LeftOut
from lightning_xai.metrics.grounding import GroundingMetric, GroundingSummary, gamma, measurable, patch_mask, rho
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.report.plots import Example, curves, progress_sheet, rasterize, save_figure
from lightning_xai.report.tables import grounding_table, per_pair_csv

__all__ = ["GroundingCallback"]

PAIR_COLUMNS = ("index", "key", "caption_index", "caption", "phrase", "label", "reason", "gamma", "hit", "x0", "y0", "x1", "y1")


class GroundingCallback(Callback):
    """Gamma and rho of every phrase with a box, before training and after each epoch, on all ranks.

    Works with any LightningModule that has a `DualEncoder` (as attribute `encoder`, or anywhere among its modules) and
    evaluates `Batch`es. The hidden states come out of the validation's own forward pass; attributing costs a few percent
    on top. Logs `val/gamma_mean`, `val/gamma_above_50`, `val/gamma_above_80`, `val/rho` (fractions in [0, 1]) and
    `val/grounding_pairs`, which checkpoint callbacks can monitor (`test/...` in a test run).

    In the run's folder, under `grounding/`: a table with a line a pair for each epoch, `summary.csv` and `classes.csv`,
    `curves.png`, and `progress.png`, on which the heat maps of a few fixed examples move from epoch to epoch.

    Args:
        image_layer: layer of the image tower to attribute to, see `FeaturePairAttribution`.
        text_layer: layer of the text tower.
        steps: integration steps.
        rule: quadrature rule.
        image_reference: the uninformative image.
        every_n_epochs: measure after each n-th epoch (and before training).
        before_training: measure the model as it comes, in a full validation before the first step.
        examples: how many fixed examples to draw; the first that can be measured, each of another image.
        internal_batch_size: phrases attributed at a time.

    Raises:
        ValueError: an option outside its range; at set-up: `inference_mode` is on, no DualEncoder, no such layer.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        *,
        image_layer: int = -1,
        text_layer: int = -1,
        steps: int = 10,
        rule: Rule = "right",
        image_reference: Literal["zeros", "black"] = "zeros",
        every_n_epochs: int = 1,
        before_training: bool = True,
        examples: int = 6,
        internal_batch_size: int = 128,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs has to be at least 1; got {every_n_epochs}")
        if examples < 0:
            raise ValueError(f"examples has to be at least 0; got {examples}")
        self._options: dict[str, Any] = {
            "image_layer": image_layer,
            "text_layer": text_layer,
            "steps": steps,
            "rule": rule,
            "image_reference": image_reference,
            "internal_batch_size": internal_batch_size,
        }
        self.every_n_epochs = every_n_epochs
        self.before_training = before_training
        self.examples = examples
        self.history: list[dict[str, Any]] = []
        self._measurement: _Measurement | None = None
        self._attribution: FeaturePairAttribution | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all that could fail later, before anything is computed."""
        if stage == "predict":
            return
        if trainer.test_loop.inference_mode:
            raise ValueError(
                "grounding needs gradients in validation and test, which inference mode rules out: "
                "use Trainer(inference_mode=False), or --trainer.inference_mode=false"
            )
        self._attribution = FeaturePairAttribution(_find_encoder(pl_module), **self._options)
        if stage == "fit" and self.before_training:
            # Lightning's check before training runs the whole validation then: that is the measurement before training.
            trainer.num_sanity_val_steps = float("inf")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start listening to the forward pass, in epochs that are measured."""
        if trainer.sanity_checking:
            due = self.before_training
        else:
            due = trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due:
            self._start("val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start listening to the forward pass."""
        self._start("test")

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Forget what a forward pass outside the batch may have left."""
        if self._measurement is not None:
            self._measurement.forget()

    on_test_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Attribute the batch's phrases, from the hidden states its forward pass has made."""
        if self._measurement is not None and isinstance(batch, Batch):
            self._measurement.add(batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the ranks' numbers together, log and write them."""
        if self._measurement is None:
            return
        measurement, self._measurement = self._measurement, None
        measurement.close()
        summary, pairs, folder = measurement.summary(), measurement.all_pairs(), _folder(trainer)
        scalars = {f"{measurement.split}/{name}": value for name, value in summary.scalars().items()}
        if trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=0)
        else:
            for name, value in scalars.items():
                pl_module.log(name, value, prog_bar=name.endswith("/rho"))
        self._remember(trainer, summary, measurement)
        if trainer.is_global_zero:
            self._write(trainer, folder, pairs, summary, measurement)

    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the table of grounding per epoch, and where the pictures lie."""
        self._show(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Complete the epoch's row with what the module has logged by now; outside `fit`, show the table."""
        if self.history and not trainer.sanity_checking:
            wanted = ("val/loss", "val/image_to_text_recall_at_1", "val/text_to_image_recall_at_1")
            found = {name: float(trainer.callback_metrics[name]) for name in wanted if name in trainer.callback_metrics}
            if self.history[-1]["step"] == trainer.global_step:
                self.history[-1].update({name.removeprefix("val/"): value for name, value in found.items()})
        if trainer.state.fn == "validate":
            self._show(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the table."""
        self._show(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._abandon()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self._abandon()

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far: a run that goes on from a checkpoint goes on with its table and pictures."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the measurements of the run that wrote the checkpoint."""
        self.history = list(state_dict["history"])

    def _start(self, split: str) -> None:
        if self._attribution is None:
            raise RuntimeError("GroundingCallback.setup has to run first; add the callback to the Trainer")
        self._measurement = _Measurement(split, self._attribution, self.examples)

    def _abandon(self) -> None:
        if self._measurement is not None:
            self._measurement.close()
            self._measurement = None

    def _remember(self, trainer: L.Trainer, summary: GroundingSummary, measurement: _Measurement) -> None:
        fitting = trainer.state.fn == "fit"
        epoch: int | str = trainer.current_epoch + 1 if fitting else str(trainer.state.fn)
        row: dict[str, Any] = {"epoch": 0 if trainer.sanity_checking else epoch, "step": trainer.global_step}
        if not fitting:
            self.history.clear()
        scalars = summary.scalars()
        row["pairs"] = int(scalars.pop("grounding_pairs"))
        row |= scalars
        row["left_out"] = dict(summary.left_out)
        row["examples"] = measurement.drawn()
        self.history = [old for old in self.history if old["epoch"] != row["epoch"]] + [row]

    def _write(
        self,
        trainer: L.Trainer,
        folder: Path,
        pairs: Sequence[Mapping[str, object]],
        summary: GroundingSummary,
        measurement: _Measurement,
    ) -> None:
        row = self.history[-1]
        name = f"epoch={row['epoch']:03d}" if isinstance(row["epoch"], int) else str(row["epoch"])
        per_pair_csv(folder / f"pairs-{name}.csv", pairs, PAIR_COLUMNS)
        classes = [{"epoch": row["epoch"], "label": label, **vars(of)} for label, of in summary.per_class.items()]
        per_pair_csv(folder / f"classes-{name}.csv", classes, tuple(classes[0]) if classes else ("epoch", "label"))
        flat = [_scalars_of(old) | {f"left_out_{why}": n for why, n in old["left_out"].items()} for old in self.history]
        per_pair_csv(folder / "summary.csv", flat, tuple(dict.fromkeys(key for line in flat for key in line)))
        save_figure(curves(self.history), folder / "curves.png")
        if not measurement.examples:
            return
        sheet = self._progress(measurement)
        save_figure(sheet, folder / "progress.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    f"{measurement.split}/grounding", rasterize(sheet), trainer.global_step, dataformats="HWC"
                )

    def _progress(self, measurement: _Measurement) -> Any:
        shown = [row for row in self.history if row["examples"]["keys"] == measurement.drawn()["keys"]]
        return progress_sheet(
            measurement.examples,
            [[heat.numpy() for heat in row["examples"]["heats"]] for row in shown],
            [_epoch_name(row["epoch"]) for row in shown],
            [row["examples"]["gammas"] for row in shown],
            f"What the phrase matches in the image ({measurement.split}): red more, blue less similar",
            hits=[row["examples"]["hits"] for row in shown],
        )

    def _show(self, trainer: L.Trainer) -> None:
        folder = _folder(trainer)
        if not (trainer.is_global_zero and self.history):
            return
        console = Console()
        console.print(grounding_table([_scalars_of(row) for row in self.history]))
        left_out = {why: n for why, n in self.history[-1]["left_out"].items() if n}
        reasons = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in left_out.items())
        console.print(f"Left out: {reasons or 'nothing'}.", highlight=False)
        console.print(f"Look at {folder / 'progress.png'}; all numbers: {folder / 'summary.csv'}", soft_wrap=True)


class _Measurement:
    """One pass over a split: the hooks, the metric, this rank's table and pictures."""

    def __init__(self, split: str, attribution: FeaturePairAttribution, examples: int) -> None:
        self.split = split
        self.examples: list[Example] = []
        self._most = examples
        self._drawn: dict[str, list[Any]] = {"keys": [], "heats": [], "gammas": [], "hits": []}
        self._attribution = attribution
        self._references: References | None = None
        self._metric: GroundingMetric | None = None
        self._pairs: list[dict[str, object]] = []
        self._captures = (InputCapture(attribution.image), InputCapture(attribution.text))
        for capture in self._captures:
            capture.open()

    def forget(self) -> None:
        """Let go of hidden states from before the batch."""
        for capture in self._captures:
            capture.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        for capture in self._captures:
            capture.close()

    def add(self, batch: Batch) -> None:
        """Measure a batch whose forward pass has just run."""
        if self._metric is None:
            self._metric = GroundingMetric(batch.label_names).to(batch.images.device)
        states = self._states(batch)
        if self._references is None:
            self._references = self._attribution.references()
        phrases, grid = batch.phrases, self._attribution.image.grid
        size = (batch.images.shape[2], batch.images.shape[3])
        reason = measurable(phrases.reason, phrases.boxes, grid, size)
        rows = (reason == LeftOut.MEASURED).nonzero()[:, 0]
        gammas = torch.full(reason.shape, math.nan, dtype=torch.float64, device=reason.device)
        hits = torch.zeros_like(reason, dtype=torch.bool)
        maps = torch.zeros(0, *grid)
        if len(rows):
            image, caption = phrases.image_row[rows], phrases.caption_row[rows]
            of_phrases = HiddenStates(states.image[image], states.text[caption], states.text_pool[caption])
            maps = self._attribution.span_map_of(of_phrases, phrases.span_mask[rows], self._references)
            masks = patch_mask(phrases.boxes[rows], grid, size)
            gammas[rows] = gamma(maps, masks).to(gammas)
            hits[rows] = rho(maps, masks)
        self._metric.update(gammas, hits, phrases.label, reason)
        self._tabulate(batch, reason, gammas, hits)
        self._draw(batch, rows.tolist(), maps.cpu(), gammas, hits)

    def summary(self) -> GroundingSummary:
        """Over all ranks.

        Raises:
            RuntimeError: no batch came.
        """
        if self._metric is None:
            raise RuntimeError("the evaluation had no batch of lightning_xai.data.Batch, so there is no grounding")
        summary: GroundingSummary = self._metric.compute()
        return summary

    def all_pairs(self) -> list[dict[str, object]]:
        """The table of all ranks, in the order of the data: the same file at any world size."""
        pairs = self._pairs
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, pairs)
            pairs = [row for part in gathered for row in part]
        return sorted(pairs, key=lambda row: (row["index"], row["caption_index"], row["label"]))

    def drawn(self) -> dict[str, list[Any]]:
        """Keys, heat maps, gammas and hits of this rank's examples, as checkpoints can hold them."""
        return self._drawn

    def _states(self, batch: Batch) -> HiddenStates:
        """The captured hidden states where the forward pass was just images and captions, else those of an own pass."""
        image, text = (capture.take() for capture in self._captures)
        if image is None or len(image) != len(batch.images):
            image = self._run(self._attribution.image.stem, batch.images)
        if text is None or len(text) != len(batch.tokens):
            text = self._run(self._attribution.text.stem, batch.tokens)
        return HiddenStates(image, text, self._attribution.text.pool_positions(batch.tokens))

    def _run(self, stem: Any, inputs: Tensor) -> Tensor:
        if len(inputs) == 0:
            return inputs.new_zeros(0, 1, 1, dtype=torch.float32)
        with torch.no_grad():
            hidden: Tensor = stem(inputs)
        return hidden

    def _tabulate(self, batch: Batch, reason: Tensor, gammas: Tensor, hits: Tensor) -> None:
        phrases = batch.phrases
        reasons = reason.masked_fill((reason == LeftOut.MEASURED) & gammas.isnan(), int(LeftOut.NO_POSITIVE)).tolist()
        caption_index = [*batch.caption_index.tolist(), -1]
        index = batch.index.tolist()
        columns = zip(
            phrases.image_row.tolist(),
            phrases.caption_row.tolist(),
            phrases.text,
            phrases.label.tolist(),
            reasons,
            gammas.tolist(),
            hits.tolist(),
            phrases.boxes.tolist(),
            strict=True,
        )
        for image, caption, text, label, why, share, hit, box in columns:
            measured = why == LeftOut.MEASURED
            self._pairs.append(
                {
                    "index": index[image],
                    "key": batch.keys[image],
                    "caption_index": caption_index[caption],
                    "caption": batch.captions[caption] if caption >= 0 else None,
                    "phrase": text,
                    "label": batch.label_names[label],
                    "reason": LeftOut(why).name.lower(),
                    "gamma": share if measured else None,
                    "hit": hit if measured else None,
                    **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)),
                }
            )

    def _draw(self, batch: Batch, rows: list[int], maps: Tensor, gammas: Tensor, hits: Tensor) -> None:
        """Keep the first phrase of each of the first images; which ones they are never depends on the model."""
        transform = self._attribution.encoder.image_transform
        for heat, row in zip(maps, rows, strict=True):
            if len(self.examples) == self._most:
                return
            image, caption = int(batch.phrases.image_row[row]), int(batch.phrases.caption_row[row])
            key, phrase = batch.keys[image], batch.phrases.text[row]
            if any(example.key == key for example in self.examples):
                continue
            pixels = transform.denormalize(batch.images[image].float().cpu()).permute(1, 2, 0).clamp(0, 1).numpy()
            spans = _places(batch.captions[caption], phrase)
            x0, y0, x1, y1 = batch.phrases.boxes[row].tolist()
            self.examples.append(
                Example(np.asarray(pixels), phrase, batch.captions[caption], spans, (x0, y0, x1, y1), key)
            )
            self._drawn["keys"].append(f"{key}: {phrase}")
            self._drawn["heats"].append(heat.float().clone())
            self._drawn["gammas"].append(float(gammas[row]))
            self._drawn["hits"].append(bool(hits[row]))


def _find_encoder(module: L.LightningModule) -> DualEncoder:
    candidates = [getattr(module, "encoder", None), *module.modules()]
    found = next((candidate for candidate in candidates if isinstance(candidate, DualEncoder)), None)
    if found is None:
        raise ValueError(
            f"GroundingCallback found no DualEncoder in {type(module).__name__}: keep one as `self.encoder`, "
            "made by lightning_xai.models.load_dual_encoder"
        )
    return found


def _folder(trainer: L.Trainer) -> Path:
    """The run's folder for grounding; every rank has to call this, since Lightning agrees on the folder over ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "grounding"


def _places(caption: str, phrase: str) -> tuple[tuple[int, int], ...]:
    """Where the words of a phrase (several mentions joined by a comma) stand in a caption, to highlight them."""
    places, start = [], 0
    for words in phrase.split(", "):
        at = caption.find(words, start)
        if at >= 0:
            places.append((at, at + len(words)))
            start = at + len(words)
    return tuple(places)


def _scalars_of(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("left_out", "examples")}


def _epoch_name(epoch: int | str) -> str:
    return "before" if epoch == 0 else f"epoch {epoch}" if isinstance(epoch, int) else epoch
