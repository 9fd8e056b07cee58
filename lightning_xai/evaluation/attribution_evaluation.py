"""Evaluates explanations of a model: grounding, signs, hard negatives, confidence and localization, by any methods.

One `test` of one model on one split: each batch passes through the model once, each method attributes each of its items
once, and all metrics share what comes out. Every item's rows are kept on disk, so that a run that was killed goes on
where it was, with any number of processes.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from lightning_xai.attribution.base import ConstantMapWarning
from lightning_xai.attribution.method_options import check_method, choose_method
from lightning_xai.attribution.reference import ImageReference
from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.evaluation.evaluation_cell import EvaluationCell, Rows, picture_of
from lightning_xai.evaluation.evaluation_files import Shown, write_evaluation
from lightning_xai.evaluation.example_gallery import ExampleGallery
from lightning_xai.evaluation.item_measures import Embeddings, MeasureOptions
from lightning_xai.evaluation.table_metrics import counts_of
from lightning_xai.models.fingerprint import weights_fingerprint
from lightning_xai.models.loading import load_dual_encoder
from lightning_xai.report.evaluation_table import evaluation_table
from lightning_xai.results.schema import (
    TABLES,
    EvaluationResult,
    MethodResult,
    method_of,
    package_versions,
)

__all__ = ["AttributionEvaluation", "MetricName"]

MetricName = Literal["grounding", "other_objects", "hard_negatives", "confidence", "localization"]
_NEED_BOXES = ("grounding", "other_objects", "hard_negatives", "localization")
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Part:
    """What one rank has done: broken records, pairs attributed, time taken, rows and what has none, by label."""

    broken: int
    pairs: int
    seconds: float
    rows: dict[str, Rows]
    left_out: Counter[tuple[str, str, str]]


class AttributionEvaluation(L.LightningModule):
    """Measures what the attributions of a model are worth, in `test`.

    For each method and item: gamma and rho (feature-pair paper, 4.2), signs of the attributions to other objects (4.3)
    and delta of hard negatives (4.4), these two for signed methods only; confidence drop and increase of image and text
    and localization (M2IB paper, 4.3 and 4.4). Logs `test/METHOD/METRIC`, writes the result files that `report` reads
    into `out`, and prints a table.

    Items that are there already from an earlier run that was interrupted are read from `out`, not computed again.

    Args:
        model: an open_clip name, the path of a JSON model config, or a checkpoint of this project (`.ckpt`).
        pretrained: an open_clip tag, a checkpoint file, or null for the weights of the `.ckpt`.
        out: folder for the results; a run with other settings needs another one.
        methods: name, or any label, of each method -> its options; `{"m2ib_8": {"method": "m2ib", "layer": 8}}` has
            a label of its own. Null: feature_pair.
        metrics: what to measure; null: all that the data allow.
        seeds: how often a method that draws random numbers is repeated, with seeds from its own `seed` on.
        keep_tokens: share of a caption's tokens that is kept for confidence.
        keep_pixels: share of an image's pixels that is kept for confidence, those with the largest values of its map.
            Null: as in the paper, the image is multiplied by its map in [0, 1], which lets a map that is high
            everywhere keep more of the image than one that points at something.
        hidden_image: what is seen of an image where it is not kept, for confidence.
        localization_quantile: of a map's values, above which it is taken to point at something.
        examples: heat maps of so many first images are kept to look at.
        examples_per_class: and of so many images of each class.
        failures: and of so many images with the lowest gamma.
        internal_batch_size: pairs that are attributed at a time; bounds memory, changes no number.

    Attributes:
        result: what was found, on the first rank, after `test`.

    Raises:
        ValueError: unknown model, weights, method, option or metric; a number outside its range; at set-up:
            `inference_mode` is on, `out` cannot be written or holds results of other settings, or metrics were asked
            for that need boxes and the data have none; at the end: metrics were asked for, and there was not one item.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "openai",
        *,
        out: Path,
        methods: dict[str, dict[str, Any] | None] | None = None,
        metrics: list[MetricName] | None = None,
        seeds: int = 1,
        keep_tokens: float = 0.5,
        keep_pixels: float | None = None,
        hidden_image: ImageReference = "zeros",
        localization_quantile: float = 0.75,
        examples: int = 6,
        examples_per_class: int = 2,
        failures: int = 12,
        internal_batch_size: int = 64,
    ) -> None:
        super().__init__()
        if seeds < 1 or internal_batch_size < 1:
            raise ValueError(f"seeds and internal_batch_size have to be at least 1; got {seeds}, {internal_batch_size}")
        shares = {
            "keep_tokens": keep_tokens,
            "keep_pixels": keep_pixels,
            "localization_quantile": localization_quantile,
        }
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} has to be in [0, 1]; got {share}")
        self.out = Path(out)
        self.methods = methods or {"feature_pair": None}
        for label, options in self.methods.items():
            check_method(method_of(label, options)[0])
        self.metrics = None if metrics is None else tuple(dict.fromkeys(metrics))
        self.seeds = seeds
        self.options = MeasureOptions(
            metrics=frozenset(),
            keep_tokens=keep_tokens,
            keep_pixels=keep_pixels,
            hidden_image=hidden_image,
            localization_quantile=localization_quantile,
            batch_size=internal_batch_size,
        )
        self.shown = (examples, examples_per_class, failures)
        self.encoder = load_dual_encoder(model, pretrained)
        self.result: EvaluationResult | None = None
        self._source = {"name": model, "pretrained": pretrained}
        self._cells: list[EvaluationCell] = []
        self._broken = self._pairs = 0
        self._started = 0.0

    def setup(self, stage: str) -> None:
        """Check what could fail later, before anything is computed."""
        if stage != "test":
            raise ValueError(f"AttributionEvaluation measures a model in `test`; it does not {stage}")
        if self.trainer.test_loop.inference_mode:
            raise ValueError(
                "attribution needs gradients, which inference mode rules out: use Trainer(inference_mode=False), "
                "or --trainer.inference_mode=false"
            )
        # Lightning's own listing of a hundred numbers would stand above the tables that are printed at the end.
        self.trainer.test_loop.verbose = False
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            probe = self.out / f".writable-{self.global_rank}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"out={self.out} cannot be written ({error}); choose another folder") from error

    def on_test_start(self) -> None:
        """Build the methods, and take up what an earlier run has computed."""
        data = self._data()
        labels = data.manifest("test").labels
        options = replace(self.options, metrics=self._tables(labels))
        settings = {
            "weights": weights_fingerprint(self.encoder),
            # The same weights are another function with another activation, and see other images.
            "architecture": self.encoder.architecture["model_cfg"],
            "preprocessing": self.encoder.architecture["preprocess_cfg"],
            "data": data.manifest("test").fingerprint,
            "captions_per_image": data.captions_per_image,
            "swap_objects": data.swap_objects,
        }
        self._cells = [cell for label in self.methods for cell in self._build(label, labels, options, settings)]
        # A process that comes late would take what others have just written for an earlier run's.
        self.trainer.strategy.barrier()
        for cell in self._cells:
            cell.maker.listen()
        self._broken = self._pairs = 0
        self._started = time.perf_counter()
        restored = sum(cell.stored for cell in self._cells)
        if restored:
            rank_zero_info(f"{self.out}: {restored:,} items are there already and are taken as they are")
        damaged = sum(cell.damaged for cell in self._cells)
        if damaged:
            rank_zero_info(f"{self.out}: {damaged:,} stored lines are damaged, their items are computed again")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Attribute what is not there yet; the numbers are computed at the end."""
        self._broken += len(batch.faults)
        indices = [index for index in batch.index.tolist() if index >= 0]
        todo = [cell for cell in self._cells if not cell.has(indices)]
        if todo:
            # The derivatives of a tail in half precision would be noise.
            with torch.autocast(self.device.type, enabled=False), warnings.catch_warnings():
                # A map that says nothing shows in every number; one line a batch and method would bury the rest.
                warnings.simplefilter("ignore", ConstantMapWarning)
                self._compute(batch, todo)
        pixels = picture_of(self.encoder, batch)
        for cell in self._cells:
            cell.collect(indices, pixels)

    def on_test_epoch_end(self) -> None:
        """Put the ranks' numbers together, log and write them."""
        seconds = time.perf_counter() - self._started
        self._close()
        cells, self._cells = self._cells, []
        computed = {(cell.label, cell.seed): cell.metrics.compute() for cell in cells}
        for (label, seed), (numbers, _) in computed.items():
            repeated = sum(cell.label == label for cell in cells) > 1
            for name, value in numbers.items():
                # Every rank holds the same number already.
                self.log(f"test/{label}/{name}" + (f"/seed={seed}" if repeated else ""), value)
        left_out = Counter({(cell.label, *what): n for cell in cells for what, n in cell.left_out.items()})
        parts = _of_all_ranks(_Part(self._broken, self._pairs, seconds, _rows_by_label(cells), left_out))
        shown = {cell.label: _shown(cell.gallery) for cell in cells if cell.gallery is not None}
        if self.trainer.is_global_zero:
            rows = _joined(part.rows for part in parts)
            self.result = self._result(cells, {key: numbers for key, (numbers, _) in computed.items()}, rows, parts)
            classes = {label: summary for (label, _), (_, summary) in reversed(computed.items()) if summary is not None}
            write_evaluation(self.out, self.result, rows, classes, shown)
            self._show(self.result)
        self._check_asked_for(
            {name for numbers, _ in computed.values() for name, value in numbers.items() if not math.isnan(value)}
        )

    def on_exception(self, exception: BaseException) -> None:
        """Leave the model as it was, and what was computed on disk."""
        self._close()

    def teardown(self, stage: str) -> None:
        """Leave the model as it was."""
        self._close()

    def _data(self) -> ShardDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ShardDataModule):
            raise ValueError("AttributionEvaluation measures the test split of a ShardDataModule; give it as the data")
        return data

    def _tables(self, label_names: Sequence[str]) -> frozenset[str]:
        """The tables to fill: those asked for, or all that the data allow."""
        if label_names:
            return frozenset(TABLES if self.metrics is None else self.metrics)
        without = [name for name in self.metrics or () if name in _NEED_BOXES]
        if without:
            raise ValueError(
                f"{', '.join(without)} cannot be measured without boxes, and the test shards have none: prepare a data "
                "set with boxes, or ask for the metric confidence alone"
            )
        return frozenset({"confidence"})

    def _build(
        self, label: str, label_names: Sequence[str], options: MeasureOptions, settings: Mapping[str, Any]
    ) -> Iterator[EvaluationCell]:
        """The cells of a method: one, or one for each seed where it draws random numbers."""
        name, own = method_of(label, self.methods[label])
        chosen = choose_method(self.encoder, name, own)
        first = int(chosen.options.get("seed", 0))
        for number in range(self.seeds if "seed" in chosen.options else 1):
            if number:
                chosen = choose_method(self.encoder, name, own | {"seed": first + number})
            gallery = ExampleGallery(*self.shown) if not number and "grounding" in options.metrics else None
            yield EvaluationCell(label, chosen, self.encoder, label_names, options, self.out, settings, gallery)

    def _compute(self, batch: Batch, cells: Sequence[EvaluationCell]) -> None:
        """One forward pass of the model, and what each of the methods makes of it."""
        for cell in cells:
            cell.maker.forget()
        with torch.no_grad():
            embeddings = Embeddings(self.encoder.encode_image(batch.images), self.encoder.encode_text(batch.tokens))
        for cell in cells:
            cell.maker.take(batch)
        for cell in cells:
            cell.compute(batch, embeddings)
            self._pairs += len(batch.tokens)

    def _result(
        self,
        cells: Sequence[EvaluationCell],
        numbers: Mapping[tuple[str, int], Mapping[str, float]],
        rows: Mapping[str, Rows],
        parts: Sequence[_Part],
    ) -> EvaluationResult:
        data = self._data()
        manifest = data.manifest("test")
        pairs, seconds = sum(part.pairs for part in parts), max(part.seconds for part in parts)
        left_out = sum((part.left_out for part in parts), Counter[tuple[str, str, str]]())
        settings = asdict(self.options) | {"metrics": self.metrics, "seeds": self.seeds, "shown": self.shown}
        return EvaluationResult(
            model={
                **self._source,
                "architecture": self.encoder.name,
                "parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
                "fingerprint": weights_fingerprint(self.encoder),
            },
            data={
                "name": manifest.name,
                "folder": str(data.stores["test"]),
                "fingerprint": manifest.fingerprint,
                "samples": manifest.samples,
                "captions_per_image": data.captions_per_image,
                "swap_objects": data.swap_objects,
                "broken_records": sum(part.broken for part in parts),
            },
            settings=settings,
            versions=package_versions(),
            methods={label: _method_result(label, cells, numbers, rows[label], left_out) for label in self.methods},
            speed={"pairs": float(pairs), "seconds": seconds, "pairs_per_second": pairs / max(seconds, 1e-9)},
        )

    def _show(self, result: EvaluationResult) -> None:
        console = Console()
        for table in evaluation_table(result):
            console.print(table)
        speed = result.speed
        lines = [
            f"{speed['pairs']:,.0f} pairs attributed, {speed['pairs_per_second']:.1f} a second",
            f"All numbers: {self.out}",
            f"As a page: python -m lightning_xai report {self.out} --out {self.out / 'report'}",
        ]
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _check_asked_for(self, measured: set[str]) -> None:
        """An error where a metric was asked for by name and there was not one item; all the rest has been written."""
        first = {
            "grounding": "gamma_mean",
            "other_objects": "other_negative",
            "hard_negatives": "delta_mean",
            "confidence": "image_drop",
            "localization": "localization_iou",
        }
        missing = [name for name in self.metrics or () if first[name] not in measured]
        if missing:
            raise ValueError(
                f"no item was left to measure {', '.join(missing)}: {self.out / 'result.json'} counts what was left "
                "out and why (hard negatives need swap_objects or a data set that has them, signs a signed method)"
            )

    def _close(self) -> None:
        for cell in self._cells:
            cell.close()


def _method_result(
    label: str,
    cells: Sequence[EvaluationCell],
    numbers: Mapping[tuple[str, int], Mapping[str, float]],
    rows: Rows,
    left_out: Mapping[tuple[str, str, str], int],
) -> MethodResult:
    own = [cell for cell in cells if cell.label == label]
    found = [numbers.get((label, cell.seed), {}) for cell in own]
    names = dict.fromkeys(name for each in found for name in each)
    metrics = {name: tuple(each[name] for each in found) for name in names}
    return MethodResult(
        method=own[0].chosen.name,
        options=own[0].chosen.options,
        signed=own[0].chosen.method.signed,
        seeds=tuple(cell.seed for cell in own),
        # A metric of which there was no item at all is left out rather than shown as a dash everywhere.
        metrics={name: values for name, values in metrics.items() if not all(map(math.isnan, values))},
        counts={
            table: counts_of(table, rows[table])
            | {why: n for (whose, of, why), n in sorted(left_out.items()) if (whose, of) == (label, table)}
            for table in own[0].tables
        },
    )


def _rows_by_label(cells: Sequence[EvaluationCell]) -> dict[str, Rows]:
    """The rows of this rank, those of several seeds together."""
    return _joined({cell.label: cell.rows} for cell in cells)


def _joined(parts: Iterable[Mapping[str, Rows]]) -> dict[str, Rows]:
    joined: dict[str, Rows] = {}
    for part in parts:
        for label, tables in part.items():
            own = joined.setdefault(label, {})  # also of a method that has no table: its sign says nothing
            for table, rows in tables.items():
                own.setdefault(table, []).extend(rows)
    return joined


def _shown(gallery: ExampleGallery) -> list[Shown]:
    """The examples that are chosen of all ranks'; only their maps and pictures travel."""
    candidates = [replace(candidate, record={}) for candidate in gallery.kept]
    chosen = gallery.choose(candidate for part in _of_all_ranks(candidates) for candidate in part)
    own = [
        Shown(chosen[candidate.place], candidate, pixels)
        for candidate in gallery.kept
        if candidate.place in chosen and (pixels := gallery.pixels(candidate.index)) is not None
    ]
    shown = [example for part in _of_all_ranks(own) for example in part]
    return sorted(shown, key=lambda example: example.candidate.place)


def _of_all_ranks(part: _T) -> list[_T]:
    """What every rank has given, by rank; every rank has to call this."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [part]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, part)
    return gathered
