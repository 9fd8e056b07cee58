"""Evaluates explanations of a model: grounding, signs, hard negatives, confidence and localization, by any methods.

One `test` of one model on one split: each batch passes through the model once, each method attributes each of its items
once, and all metrics share what comes out. Every item's rows are kept on disk, so that a run that was killed continues
where it was, with any number of processes.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_xai.atomic_file import replaced_at_once
from lightning_xai.attribution.base import ConstantMapWarning
from lightning_xai.attribution.method_options import check_method, choose_method
from lightning_xai.attribution.registry import ALL, METHODS
from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.evaluation.collages import POOL, Collages
from lightning_xai.evaluation.embeddings import Embeddings
from lightning_xai.evaluation.evaluation_pictures import for_loggers
from lightning_xai.evaluation.examples import Place, choose_examples, jpeg_of
from lightning_xai.evaluation.logged_pictures import log_pictures
from lightning_xai.evaluation.method_run import MethodRun, from_first, gather_to_first, join_rows
from lightning_xai.evaluation.rows import clock, measure_batch
from lightning_xai.metrics.registry import METRICS, ChosenMetric, choose_metrics
from lightning_xai.models.encoder import TwoTowerEncoder
from lightning_xai.models.fingerprint import weights_fingerprint
from lightning_xai.models.loading import load_dual_encoder
from lightning_xai.results.examples import ExampleRecord, write_examples
from lightning_xai.results.record import MethodRecord, ResultRecord, method_of, package_versions

if TYPE_CHECKING:
    from lightning_xai.results.table import ResultTable

__all__ = ["AttributionEvaluation"]

_COST = "seconds_per_pair"  # of the model's own forward pass; with a label, of a method on top of it
_LAYERS = {"image_layer", "text_layer"}
_COMPARED = ("grounding", "agreement")  # what a referee is for


class AttributionEvaluation(L.LightningModule):
    """Measures how good the attributions of a model are, in `test`.

    For each method and item: gamma and rho (feature-pair paper, 4.2), signs of the attributions to other objects (4.3)
    and delta of hard negatives (4.4), these two for signed methods only; confidence drop and increase of image and text
    and localization (M2IB paper, 4.3 and 4.4); and the metrics of installed plug-ins. Logs `test/METHOD/SCORE`, writes
    the result folder `out` that `report` reads, and prints a table for each metric. Each logger of the trainer gets the
    heat maps of the examples, the scores and the phrases, as `test/heat_maps/fixed`, `test/scores` and so on.

    Items that are there already from an earlier run that was interrupted are read from `out`, not computed again.

    Args:
        model: an open_clip name, the path of a JSON model config, or a checkpoint of this project (`.ckpt`).
        pretrained: an open_clip tag, a checkpoint file, or null for the weights of the `.ckpt`.
        out: folder for the results; a run with other settings needs another one.
        methods: name, or any label, of each method -> its options; `{"m2ib_8": {"method": "m2ib", "layer": 8}}` has
            another label. Null: feature_pair.
        layers: pairs (image layer, text layer), counted as `FeaturePairAttribution` counts them: methods that attribute
            to a layer of both towers are measured at each, under labels such as `feature_pair,0,-1`. `all`: at every
            pair of layers that the towers have; `{every: 3}`: at pairs of every third layer from the inputs on, and the
            last. Null: at the layers of their options.
        referee: label of a method that the others are compared with: `grounding` and `agreement` are measured too, and
            `report` compares gammas. Its first seed counts. Null: none.
        metrics: what to measure, by name; null: all that the data allow, but those that cost many forward passes
            (faithfulness, insertion and deletion, pointing game, ROAD and others).
        metric_options: name of a metric -> its options, such as `{"confidence": {"keep_pixels": 0.5}}`.
        seeds: how often a stochastic method is repeated, with seeds from its `seed` on.
        examples: heat maps of so many first images are kept to look at.
        examples_per_class: and of so many images of each class.
        failures: and of so many images with the lowest gamma.
        internal_batch_size: pairs that are attributed at a time; bounds memory, changes no number.
        image_size: (height, width) of images in pixels, or one number for both; null: that of the model.
        image_mean: mean of each channel, of pixel values in [0, 1]; null: that of the weights.
        image_std: standard deviation of each channel, likewise.
        interpolation: of resizing images, likewise: bicubic, bilinear or random.
        resize_mode: likewise: shortest (crop what sticks out), longest (pad), letterbox (pad with the mean colour) or
            squash (give the aspect ratio up).
        fit: likewise, in plain words: crop (shortest) or letterbox.
        quick_gelu: whether the transformers compute with OpenAI's QuickGELU; null: as the weights were trained.

    Attributes:
        result: the record of the results, on the first rank, after `test`.
        table: the long table, likewise.

    Raises:
        ValueError: unknown model, weights, method, metric or option; a number outside its range; a metric that was
            asked for and reads what none of the methods has; at set-up:
            `inference_mode` is on, `out` cannot be written or holds results of other settings, or metrics were asked
            for that need boxes and the data have none; at the end: metrics were asked for, and there was not one item.
        PluginError: a method or metric of another package breaks its contract.
    """

    def __init__(  # noqa: PLR0913 - the signature is the configuration
        self,
        model: str = "ViT-B-16",
        pretrained: str | None = "openai",
        *,
        out: Path,
        methods: dict[str, dict[str, Any] | None] | None = None,
        layers: list[tuple[int, int]] | Literal["all"] | dict[str, int] | None = None,
        referee: str | None = None,
        metrics: list[str] | None = None,
        metric_options: dict[str, dict[str, Any]] | None = None,
        seeds: int = 1,
        examples: int = 6,
        examples_per_class: int = 2,
        failures: int = 12,
        internal_batch_size: int = 64,
        image_size: int | tuple[int, int] | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
        interpolation: str | None = None,
        resize_mode: str | None = None,
        fit: str | None = None,
        quick_gelu: bool | None = None,
    ) -> None:
        super().__init__()
        if seeds < 1 or internal_batch_size < 1:
            raise ValueError(f"seeds and internal_batch_size have to be at least 1; got {seeds}, {internal_batch_size}")
        self.out = Path(out)
        self.methods = methods or {"feature_pair": None}
        for label, options in self.methods.items():
            check_method(method_of(label, options)[0])
        if referee is not None and referee not in self.methods:
            raise ValueError(f"the referee has to be one of the methods ({', '.join(self.methods)}); got {referee!r}")
        self.referee = referee
        compared = _COMPARED if referee is not None else ()
        self.metrics = choose_metrics(None if metrics is None else [*metrics, *compared], metric_options or {})
        self.asked_for = tuple(dict.fromkeys((*(metrics or ()), *compared)))
        _check_served(self.methods, [self.metrics[name] for name in self.asked_for])
        self.seeds = seeds
        self.internal_batch_size = internal_batch_size
        self.shown = (examples, examples_per_class, failures)
        self.encoder = load_dual_encoder(
            model,
            pretrained,
            image_size=image_size,
            image_mean=image_mean,
            image_std=image_std,
            interpolation=interpolation,
            resize_mode=resize_mode,
            fit=fit,
            quick_gelu=quick_gelu,
        )
        if layers is not None:
            self.methods = _at_layers(self.methods, _pairs_of_layers(self.encoder, layers), referee)
        self.result: ResultRecord | None = None
        self.table: ResultTable | None = None
        self._source = {"name": model, "pretrained": pretrained}
        self._runs: list[MethodRun] = []
        self._collages: Collages | None = None
        self._pictures: dict[str, bytes] = {}
        self._examples: dict[str, list[ExampleRecord]] = {}
        self._broken = self._pairs = 0
        self._costs: list[tuple[str, float, int]] = []
        self._started = 0.0
        self._fingerprint = ""

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
        manifest = data.manifest("test")
        self._fingerprint = weights_fingerprint(self.encoder)
        settings = {
            "weights": self._fingerprint,
            # The same weights are another function with another activation, and see other images.
            "architecture": self.encoder.architecture["model_cfg"],
            "preprocessing": self.encoder.architecture["preprocess_cfg"],
            "data": manifest.fingerprint,
            "captions_per_image": data.captions_per_image,
            "swap_objects": data.swap_objects,
        }
        metrics = self._possible(has_boxes=bool(manifest.labels), has_masks=bool(manifest.masks))
        if any(metric.spec.kind == "collage" for metric in metrics.values()):
            self._collages = Collages(data.drawn("test", POOL).to(self.device))
            settings["collages"] = [POOL, data.seed]
        self._runs = []
        for label in sorted(self.methods, key=lambda label: label != self.referee):  # the referee first
            self._add(label, metrics, settings)
        # A process that comes late would take what others have just written for an earlier run's.
        self.trainer.strategy.barrier()
        self._pictures, self._examples = {}, {}
        self._broken = self._pairs = 0
        self._costs = []
        self._started = time.perf_counter()
        stored, damaged = sum(len(run.cache) for run in self._runs), sum(run.cache.damaged for run in self._runs)
        if stored:
            rank_zero_info(f"{self.out}: {stored:,} items are there already and are taken as they are")
        if damaged:
            rank_zero_info(f"{self.out}: {damaged:,} stored lines are damaged, their items are computed again")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Attribute what is not there yet; scores are computed at the end."""
        self._broken += len(batch.faults)
        indices = [index for index in batch.index.tolist() if index >= 0]
        todo = [run for run in self._runs if not all(index in run.cache for index in indices)]
        if todo:
            # The derivatives of a tail in half precision would be noise.
            with torch.autocast(self.device.type, enabled=False), warnings.catch_warnings():
                # A constant map shows in every number; a line for each batch and method would bury the rest.
                warnings.simplefilter("ignore", ConstantMapWarning)
                self._compute(batch, indices, todo)
        for run in self._runs:
            run.collect(indices)
        images = {record.image: index for run in self._runs for (index, _, _), record in run.examples.items()}
        self._pictures = {
            name: self._pictures[name] if name in self._pictures else _jpeg(self.encoder, batch, index)
            for name, index in images.items()
        }

    def on_test_epoch_end(self) -> None:
        """Join the ranks' rows on the first one, log the scores, write and show everything."""
        seconds = time.perf_counter() - self._started
        runs = self._close()
        targets = list({name: target for run in runs for name, target in run.targets.items()}.values())
        metrics = {name: metric.spec for run in runs for name, metric in run.metrics.items()}
        all_scores = [score for spec in metrics.values() for score in spec.scores]
        found, self.table = join_rows([row for run in runs for row in run.values], targets, all_scores)
        for run in runs:
            repeated = sum(other.label == run.label for other in runs) > 1
            for score in (score for metric in run.metrics.values() for score in metric.spec.scores):
                value, _ = found.get((run.label, run.seed, score.name), (math.nan, 0))
                # Every rank holds the same number already.
                self.log(f"test/{run.label}/{score.name}" + (f"/seed={run.seed}" if repeated else ""), value)
        totals = gather_to_first((self._broken, self._pairs, seconds, self._costs))
        kept = {run.label: gather_to_first(run.examples) for run in runs if run.shown is not None}
        chosen = from_first(lambda: self._write_examples(kept))
        for name in chosen & self._pictures.keys():
            # Always written again: an earlier run in this folder may have been of a model that sees another size.
            with replaced_at_once(self.out / name) as part:
                part.write_bytes(self._pictures[name])
        self.trainer.strategy.barrier()
        if self.table is not None:
            self.result = self._record(runs, *zip(*totals, strict=True))
            self._write(self.result, self.table)
            log_pictures(self.trainer, for_loggers(self.out, self.result, self.table, self._examples))
        there = {name for (_, _, name), (_, count) in found.items() if count}
        measured = {name for name, spec in metrics.items() if there & {score.name for score in spec.scores}}
        missing = [name for name in self.asked_for if name not in measured]
        if missing:
            raise ValueError(
                f"no item was left to measure {', '.join(missing)}: {self.out / 'values.csv'} has the reason for each "
                "excluded target (hard negatives need swap_objects or a data set that has them, collages three images "
                "without the caption's classes)"
            )

    def teardown(self, stage: str) -> None:
        """Leave what was computed on disk."""
        self._close()

    def _data(self) -> ShardDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ShardDataModule):
            raise ValueError("AttributionEvaluation measures the test split of a ShardDataModule; give it as the data")
        return data

    def _possible(self, *, has_boxes: bool, has_masks: bool) -> dict[str, ChosenMetric]:
        """The metrics asked for, or all that the data allow."""
        possible = {
            name: metric
            for name, metric in self.metrics.items()
            if (has_boxes or not metric.spec.needs_boxes) and (self.referee or not metric.spec.needs_referee)
        }
        without = [name for name in self.asked_for if name not in possible]
        if self.referee is None and any(self.metrics[name].spec.needs_referee for name in without):
            raise ValueError(
                f"{', '.join(without)} needs a referee that maps are compared with; set referee to the label of one of "
                f"the methods ({', '.join(self.methods)})"
            )
        if without:
            raise ValueError(
                f"{', '.join(without)} cannot be measured without boxes, and the test shards have none: prepare a data "
                f"set with boxes, or ask for other metrics, such as {', '.join(possible) or 'confidence'}"
            )
        masked = [name for name, metric in possible.items() if metric.spec.needs_masks and not has_masks]
        if without := [name for name in self.asked_for if name in masked]:
            raise ValueError(
                f"{', '.join(without)} cannot be measured without segmentation masks, and the test shards have none: "
                "prepare them again with this release from data that have masks, such as COCO's (--masks true)"
            )
        return {name: metric for name, metric in possible.items() if name not in masked}

    def _add(self, label: str, metrics: Mapping[str, ChosenMetric], settings: Mapping[str, Any]) -> None:
        """Add the runs of a method: one, or one for each seed where it is stochastic."""
        name, own = method_of(label, self.methods[label])
        chosen = choose_method(self.encoder, name, own)
        first = int(chosen.options["seed"]) if chosen.method.stochastic else 0
        for number in range(self.seeds if chosen.method.stochastic else 1):
            if number:
                chosen = choose_method(self.encoder, name, own | {"seed": first + number})
            shown = None if number else self.shown
            referee = self._runs[0] if self.referee is not None and self._runs else None
            self._runs.append(
                MethodRun(label, chosen, metrics, self.out, settings, shown, self.internal_batch_size, referee)
            )

    def _compute(self, batch: Batch, indices: list[int], runs: list[MethodRun]) -> None:
        """One forward pass of the model, and the rows that each of the methods makes from it."""
        pairs = len(batch.tokens)
        referee = next((run.referee for run in runs if run.referee is not None), None)
        # Of an earlier run there are the referee's rows, but not the maps that others are compared with.
        needed = runs if referee is None or referee in runs else [referee, *runs]
        with ExitStack() as passes:
            for run in needed:
                passes.enter_context(run.maps.forward_pass())
            begin = clock(self.device)
            embeddings = Embeddings.of(self.encoder, batch)
            self._costs.append((_COST, clock(self.device) - begin, pairs))
        maps = None
        for run in needed:
            metrics = list(run.metrics.values()) if run in runs else [run.metrics["grounding"]]
            rows = measure_batch(batch, run.maps, metrics, embeddings, collages=self._collages, referee=maps)
            if run is referee:
                maps = rows.phrase_maps
            if run in runs:
                run.cache.put(rows.by_item(indices, heats=run.shown is not None))
                self._costs.append((f"{_COST}/{run.label}", rows.seconds, pairs))
                self._pairs += pairs

    def _record(
        self,
        runs: list[MethodRun],
        broken: Sequence[int],
        pairs: Sequence[int],
        seconds: Sequence[float],
        costs: Sequence[list[tuple[str, float, int]]],
    ) -> ResultRecord:
        """The record of the results, from what each rank has counted."""
        data = self._data()
        manifest = data.manifest("test")
        metrics = {name: metric for run in runs for name, metric in run.metrics.items()}
        origins = [METHODS.origin(run.chosen.name) for run in runs] + [METRICS.origin(name) for name in metrics]
        return ResultRecord(
            kind="evaluation",
            model={
                **self._source,
                "architecture": self.encoder.name,
                "preprocessing": self.encoder.preprocessing,
                "parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
                "fingerprint": self._fingerprint,
            },
            data={
                "name": manifest.name,
                "folder": str(data.stores["test"]),
                "fingerprint": manifest.fingerprint,
                "samples": manifest.samples,
                "captions_per_image": data.captions_per_image,
                "swap_objects": data.swap_objects,
                "broken_records": sum(broken),
            },
            settings={
                "metrics": list(self.asked_for) or None,
                "referee": self.referee,
                "metric_options": {name: metric.options for name, metric in metrics.items() if metric.options},
                "seeds": self.seeds,
                "shown": self.shown,
                "internal_batch_size": self.internal_batch_size,
            },
            versions=package_versions()
            | {package: version for package, _, version in (origin.partition(" ") for origin in origins) if version},
            methods={label: own for label in self.methods if (own := _described(runs, label))},
            metrics={
                name: metrics[name].spec.record(metrics[name].options) for name in self.metrics if name in metrics
            },
            speed={
                "pairs": float(sum(pairs)),
                "seconds": max(seconds),
                "pairs_per_second": sum(pairs) / max(*seconds, 1e-9),
                **_means(cost for own in costs for cost in own),
            },
        )

    def _write_examples(self, kept: Mapping[str, list[dict[Place, ExampleRecord]]]) -> set[str]:
        """Choose from what each rank has kept, write `METHOD/examples.json`, and return the names of the pictures."""
        names: set[str] = set()
        for label, parts in kept.items():
            chosen = list(choose_examples((item for part in parts for item in part.items()), *self.shown).values())
            write_examples(self.out / label, chosen)
            self._examples[label] = chosen
            names |= {record.image for record in chosen}
        return names

    def _write(self, result: ResultRecord, table: ResultTable) -> None:
        """Write the results, and show them on the terminal."""
        # Not before: pandas takes a while to import.
        from lightning_xai.report.terminal import result_tables, wide_console
        from lightning_xai.results.table import write_result

        write_result(self.out, result, table)
        console = wide_console()
        for lines in result_tables(result, table):
            console.print(lines, crop=False)
        speed = result.speed
        for line in (
            f"{speed['pairs']:,.0f} pairs attributed, {speed['pairs_per_second']:.1f} a second",
            f"Saved {self.out}",
            f"As a page: python -m lightning_xai report {self.out} --out {self.out / 'report'}",
        ):
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _close(self) -> list[MethodRun]:
        """Write what is left to the caches, and let go of the runs."""
        runs, self._runs = self._runs, []
        for run in runs:
            run.cache.close()
        return runs


def _check_served(methods: Mapping[str, dict[str, Any] | None], metrics: Iterable[ChosenMetric]) -> None:
    """Raise a ValueError where a metric reads what none of the methods has."""
    names = [method_of(label, options)[0] for label, options in methods.items()]
    if ALL in names:  # is refused where methods are built
        return
    flags = [METHODS[name] for name in names]
    for metric in metrics:
        if not any(metric.spec.serves(signed=each.signed, pairwise=each.pairwise) for each in flags):
            what = "token-patch interactions" if metric.spec.needs_interactions else "signed maps"
            raise ValueError(
                f"{metric.spec.name} reads {what}, which none of the methods {', '.join(methods)} has: add one that "
                "has, such as feature_pair, or leave the metric out"
            )


def _described(runs: Iterable[MethodRun], label: str) -> MethodRecord | None:
    """A method as it took part, with the seeds of its runs."""
    own = [run for run in runs if run.label == label]
    if not own:
        return None
    chosen = own[0].chosen
    return MethodRecord(
        name=chosen.name,
        options=chosen.options,
        signed=chosen.method.signed,
        baseline=chosen.method.baseline,
        seeds=tuple(run.seed for run in own),
    )


def _means(costs: Iterable[tuple[str, float, int]]) -> dict[str, float]:
    """Seconds a pair by name, of batches with their seconds and numbers of pairs."""
    totals: dict[str, list[float]] = {}
    for name, seconds, pairs in costs:
        total = totals.setdefault(name, [0.0, 0.0])
        total[0] += seconds
        total[1] += pairs
    return {name: seconds / pairs for name, (seconds, pairs) in sorted(totals.items()) if pairs}


def _pairs_of_layers(
    encoder: TwoTowerEncoder, layers: Sequence[tuple[int, int]] | str | Mapping[str, int]
) -> Sequence[tuple[int, int]]:
    """The pairs of image and text layer that settings ask for; -1 is the last, whatever its number."""
    if isinstance(layers, str):
        layers = {"every": 1}
    if not isinstance(layers, Mapping):
        return layers
    step = layers.get("every", 0)
    if len(layers) != 1 or step < 1:
        raise ValueError(f"layers are pairs such as [[-1, -1], [0, 0]], `all`, or {{every: 3}}; got {dict(layers)}")
    towers = (encoder.image_at_layer(), encoder.text_at_layer())
    return list(product(*([*tower.layers[:-1:step], -1] for tower in towers)))


def _at_layers(
    methods: Mapping[str, dict[str, Any] | None], layers: Sequence[tuple[int, int]], referee: str | None
) -> dict[str, dict[str, Any] | None]:
    """Methods, those that attribute to a layer of both towers once for each pair of layers; the referee stays one."""
    expanded: dict[str, dict[str, Any] | None] = {}
    for label, options in methods.items():
        name, own = method_of(label, options)
        if label == referee or not inspect.signature(METHODS[name]).parameters.keys() >= _LAYERS:
            expanded[label] = options
            continue
        if given := _LAYERS & own.keys():
            raise ValueError(
                f"the method {label} has {', '.join(sorted(given))}, which layers would replace: leave out one of both"
            )
        for image, text in layers:
            at = {"method": name, **own, "image_layer": image, "text_layer": text}
            expanded[f"{label},{image},{text}"] = at
    if expanded.keys() == methods.keys():
        raise ValueError(f"layers would do nothing: none of {', '.join(methods)} attributes to a layer of both towers")
    return expanded


def _jpeg(encoder: TwoTowerEncoder, batch: Batch, index: int) -> bytes:
    """The picture of a sample of a batch as the model saw it."""
    row = (batch.index == index).nonzero()[0]
    picture = encoder.pictures(batch.images[row].float().cpu())[0].permute(1, 2, 0)
    return jpeg_of(picture.numpy())
