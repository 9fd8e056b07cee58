from __future__ import annotations

import contextlib
import csv
import gc
import io
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from quiet_trainer import quiet_trainer
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped] # has none
from torch import Tensor, nn
from training_runs import task_of

from lightning_xai.attribution import FeaturePairAttribution
from lightning_xai.data import Batch, Manifest, RecordError, Sample, ShardDataModule, write_shards
from lightning_xai.data.sample import read_image
from lightning_xai.data.shapes import prepare_shapes
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.models import DualEncoder, load_dual_encoder
from lightning_xai.results.examples import read_examples, read_words, words_of
from lightning_xai.results.predictions import read_part
from lightning_xai.results.record import read_record
from lightning_xai.results.table import read_result
from lightning_xai.training import ContrastiveFineTuning, GroundingCallback, PredictionWriter
from lightning_xai.training.grounding_report import show

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

LAST = ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho", "grounding_targets")
SCALARS = (*LAST, *(f"{name}_input" for name in LAST))

Make = Callable[..., ContrastiveFineTuning]
Pairs = dict[tuple[int, int, str], "Pair"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes with 24 images to train on and 13, an odd number, to validate on."""
    root = tmp_path_factory.mktemp("world") / "shapes"
    prepare_shapes(root, 24, 13, progress=False)
    return root


@pytest.fixture(scope="module")
def make(architecture_file: Callable[[str], Path]) -> Make:
    return lambda name="vit", **options: task_of(architecture_file(name), **options)


def data_of(world: Path, **options: Any) -> ShardDataModule:
    folders = {"train": world / "train", "val": world / "val", "test": world / "val"}
    return ShardDataModule(**(folders | {"batch_size": 8, "eval_batch_size": 5, "num_workers": 0} | options))


def trainer_in(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    return quiet_trainer(folder, *callbacks, **({"inference_mode": False, "log_every_n_steps": 1} | options))


def samples_of(folder: Path) -> list[Sample]:
    manifest = Manifest.load(folder)
    found = [sample for _, sample in read_samples(folder, manifest, range(len(manifest.shards)), 0, manifest.samples)]
    assert not any(isinstance(sample, RecordError) for sample in found)
    return [sample for sample in found if isinstance(sample, Sample)]


def split_with(folder: Path, samples: list[Sample]) -> Path:
    write_shards(samples, folder, name="test", progress=False)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hooks_in(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


# --- a slow computation ---


class Pair(NamedTuple):
    reason: str
    gamma: float
    hit: bool


def covered(low: float, high: float, patches: int) -> range:
    """The patches of one axis that a box covers, its edges in patches: rounded half up, at least one."""
    first, last = math.floor(low + 0.5), math.floor(high + 0.5)
    return range(first, last) if last > first else range(middle := min(int((low + high) / 2), patches - 1), middle + 1)


def pair_by_pair(encoder: DualEncoder, folder: Path, **options: Any) -> Pairs:
    """Gamma and rho of every phrase of a split of shapes, one at a time, from `span_map` and numpy."""
    encoder.eval()
    attribution = FeaturePairAttribution(encoder, **options)
    (rows, columns), side = attribution.image.grid, encoder.image_transform.size[0]
    pairs: Pairs = {}
    for index, sample in enumerate(samples_of(folder)):
        pixels = encoder.image_transform(read_image(sample.image, sample.key))[None]
        number = Counter(region.label for region in sample.regions)
        for region in sample.regions:
            scale = side / sample.size[0]  # the images are square: there is no crop
            assert region.box is not None
            x, y, width, height = (scale * value for value in region.box)
            for caption_index, spans in region.spans.items():
                where = (index, caption_index, region.label)
                if number[region.label] > 1:
                    pairs[where] = Pair("several_instances", math.nan, False)
                    continue
                if width * height <= (side / columns) * (side / rows):
                    pairs[where] = Pair("smaller_than_patch", math.nan, False)
                    continue
                caption = sample.captions[caption_index]
                tokens = encoder.tokenizer.encode([caption])
                mask = torch.zeros_like(tokens, dtype=torch.bool)
                for span in spans:
                    mask[0, encoder.tokenizer.token_span(caption, span)] = True
                heat = attribution.span_map(pixels, tokens, mask)[0].numpy().astype(np.float64)
                across = covered(x * columns / side, (x + width) * columns / side, columns)
                down = covered(y * rows / side, (y + height) * rows / side, rows)
                inside = np.zeros((rows, columns), dtype=bool)
                inside[np.ix_(list(down), list(across))] = True
                positive = heat.clip(min=0)
                if positive.sum() == 0:
                    pairs[where] = Pair("no_positive", math.nan, False)
                else:
                    hit = bool(inside[np.unravel_index(heat.argmax(), heat.shape)])
                    pairs[where] = Pair("measured", positive[inside].sum() / positive.sum(), hit)
            named = any(other.spans for other in sample.regions if other.label == region.label)
            if not named:
                pairs[index, -1, region.label] = Pair("not_mentioned", math.nan, False)
    return pairs


@pytest.fixture(scope="module")
def expected(make: Make, world: Path) -> Pairs:
    """The pairs of the small ViT, one by one."""
    return pair_by_pair(make().encoder, world / "val")


def lines_of(folder: Path, method: str = "feature_pair") -> list[dict[str, Any]]:
    """The phrases of a measurement's result folder that a method was asked for, with `gamma`, `hit` and `reason`."""
    _, table = read_result(folder)
    targets = {row["target"]: dict(row) for row in table.targets.to_dict("records")}
    lines: dict[str, dict[str, Any]] = {}
    for row in table.values[table.values["method"] == method].itertuples():
        line = lines.setdefault(row.target, targets[row.target])
        line |= {row.metric: row.value, "reason": row.excluded or "measured"}
    return list(lines.values())


def table_of(folder: Path, method: str = "feature_pair") -> Pairs:
    return {
        (row["index"], row["caption_index"], row["label"]): Pair(row["reason"], row["gamma"], row["rho"] == 1)
        for row in lines_of(folder, method)
    }


def assert_same_pairs(found: Pairs, expected: Pairs, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for where, pair in expected.items():
        assert found[where].reason == pair.reason, where
        assert found[where].gamma == pytest.approx(pair.gamma, abs=tolerance, nan_ok=True), where
        assert found[where].hit == pair.hit, where


INPUTS = {"vit": "feature_pair,0,0", "resnet": "feature_pair,1,0"}
"""The label of the inputs, by the first layers that there are."""


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_numbers_are_those_of_a_slow_computation_pair_by_pair_at_the_last_blocks_and_at_the_inputs(
    make: Make, world: Path, tmp_path: Path, name: str
) -> None:
    task, label = make(name), INPUTS[name]
    (logged,) = trainer_in(tmp_path, GroundingCallback(examples=0)).validate(task, data_of(world), verbose=False)
    (summary,) = rows_of(tmp_path / "grounding" / "summary-validate.csv")
    first = {"image_layer": int(label[-3]), "text_layer": int(label[-1]), "steps": 3, "rule": "midpoint"}
    assert summary["layers_input"] == label[-3:]
    for method, ending, options in (("feature_pair", "", {}), (label, "_input", first)):
        expected = pair_by_pair(task.encoder, world / "val", **options)
        found = table_of(tmp_path / "grounding" / "validate", method)
        if ending:  # images without a phrase to measure are not sampled, so what is excluded on them is not there
            images = {where[0] for where, pair in expected.items() if pair.reason in ("measured", "no_positive")}
            expected = {where: pair for where, pair in expected.items() if where[0] in images}
        assert_same_pairs(found, expected)
        measured = [pair for pair in expected.values() if pair.reason == "measured"]
        gammas = np.array([pair.gamma for pair in measured])
        assert len(measured) > 10
        assert logged[f"val/grounding_targets{ending}"] == len(measured)
        assert logged[f"val/gamma_mean{ending}"] == pytest.approx(gammas.mean(), abs=1e-6)
        assert logged[f"val/gamma_above_50{ending}"] == pytest.approx((gammas > 0.5).mean(), abs=1e-6)
        assert logged[f"val/gamma_above_80{ending}"] == pytest.approx((gammas > 0.8).mean(), abs=1e-6)
        assert logged[f"val/rho{ending}"] == pytest.approx(np.mean([pair.hit for pair in measured]), abs=1e-6)
        reasons = Counter(pair.reason for pair in expected.values() if pair.reason != "measured")
        for why, count in reasons.items():
            assert int(summary[f"excluded_{why}{ending}"]) == count


def test_the_sample_is_the_same_in_batches_of_any_size_and_another_with_another_seed(
    make: Make, world: Path, tmp_path: Path
) -> None:
    found: dict[Any, Pairs] = {}
    for size, seed, count in ((13, 0, 9), (2, 0, 9), (5, 1, 9), (5, 0, None)):
        folder = tmp_path / f"{size}-{seed}-{count}"
        callback = GroundingCallback(examples=0, input_phrases=count, input_seed=seed)
        data = data_of(world, eval_batch_size=size)
        (logged,) = trainer_in(folder, callback).validate(make(), data, verbose=False)
        pairs = table_of(folder / "grounding" / "validate", INPUTS["vit"])
        asked = {where: pair for where, pair in pairs.items() if pair.reason in ("measured", "no_positive")}
        found[size, seed, count] = asked
        assert logged["val/grounding_targets_input"] == sum(pair.reason == "measured" for pair in asked.values())
    large, small, other, every = found.values()
    assert len(large) == len(other) == 9 < len(every)
    assert_same_pairs(small, large)
    assert small.keys() != other.keys()
    assert_same_pairs({where: every[where] for where in other}, other)
    with pytest.raises(ValueError, match="ModelCheckpoint looks at val/rho_input, which is not measured with input_ph"):
        trainer_in(
            tmp_path, GroundingCallback(input_phrases=0), ModelCheckpoint(tmp_path, monitor="val/rho_input")
        ).fit(make(), data_of(world))


def test_options_reach_the_attribution(make: Make, world: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_layer": 0, "text_layer": 1, "steps": 2, "rule": "midpoint"}
    results = []
    for number, more in enumerate(({}, options, {"image_reference": "black"}, {"internal_batch_size": 3})):
        callback = GroundingCallback(examples=0, **more)
        (logged,) = trainer_in(tmp_path / str(number), callback).validate(make(), data_of(world), verbose=False)
        results.append(logged["val/gamma_mean"])
    plain, layers, black, chunks = results
    assert abs(layers - plain) > 1e-4
    assert abs(black - plain) > 1e-5
    assert chunks == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_examples_are_kept_in_float32_and_drawn_at_any_precision(
    make: Make, world: Path, tmp_path: Path, precision: str
) -> None:
    kept: list[Any] = []

    class Keeps(GroundingCallback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            super().on_validation_epoch_end(trainer, pl_module)
            assert self._measured is not None
            kept.append(self._measured.row["examples"])

    trainer = trainer_in(tmp_path, Keeps(examples=2), precision=precision)
    (logged,) = trainer.validate(make(), data_of(world), verbose=False)
    assert 0 < logged["val/gamma_mean"] < 1
    assert [heat.dtype for heat in kept[0]["heats"] + kept[0]["heats_input"]] == [torch.float32] * 4
    assert len(list((tmp_path / "grounding").glob("progress*.png"))) == 1


# --- the validation's own forward pass is used ---


def test_each_batch_runs_through_the_towers_once_and_the_references_once_in_all(
    make: Make, world: Path, tmp_path: Path
) -> None:
    task = make()
    model: Any = task.encoder.model
    images: list[int] = []
    captions: list[int] = []
    model.visual.conv1.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    model.token_embedding.register_forward_pre_hook(lambda _, inputs: captions.append(len(inputs[0])))
    callback = GroundingCallback(examples=4, input_phrases=0)
    trainer_in(tmp_path, callback).validate(task, data_of(world), verbose=False)
    assert len(list((tmp_path / "grounding").rglob("progress-validate.png"))) == 1
    # 13 images in batches of 5, and the reference; towers are compared with a model that got hooks, two passes more.
    assert Counter(images) == Counter([5, 5, 3]) + Counter([1]) + Counter([1, 1])
    each = len(samples_of(world / "val")[0].captions)
    assert Counter(captions) == Counter([5 * each, 5 * each, 3 * each]) + Counter([1]) + Counter([1, 1])


class Foreign(L.LightningModule):
    """Another project's module: the encoder has another name, and the forward pass runs as it likes."""

    def __init__(self, encoder: DualEncoder, way: str) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"student": encoder})
        self.way = way

    def on_validation_epoch_start(self) -> None:
        if self.way == "other images before the first batch":
            encoder = self.towers["student"]
            assert isinstance(encoder, DualEncoder)
            encoder.encode_image(torch.zeros(5, 3, *encoder.image_transform.size))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        encoder = self.towers["student"]
        assert isinstance(encoder, DualEncoder)
        images = batch.images
        if self.way not in ("nothing", "other images before the first batch"):
            features = encoder.encode_image(images)
            self.log("val/loss", features.square().mean(), batch_size=len(images))
        if self.way == "captions twice":
            encoder.encode_text(batch.tokens)
            encoder.encode_text(batch.tokens.flip(0))
        if self.way == "open_clip itself":
            model: Any = encoder.model
            model(images, batch.tokens)


@pytest.mark.parametrize("way", ["captions twice", "open_clip itself", "other images before the first batch"])
def test_any_module_with_a_dual_encoder_gets_the_same_numbers_however_it_runs_it(
    make: Make, world: Path, tmp_path: Path, way: str, expected: Pairs
) -> None:
    task, data = make(), data_of(world)
    data.bind(task.encoder.image_transform, task.encoder.tokenizer)
    foreign = Foreign(task.encoder, way)
    trainer_in(tmp_path, GroundingCallback(examples=0)).validate(foreign, data, verbose=False)
    assert_same_pairs(table_of(tmp_path / "grounding" / "validate"), expected)


# --- a whole run ---


class Run(NamedTuple):
    folder: Path
    trainer: L.Trainer
    callback: GroundingCallback
    by_gamma: ModelCheckpoint
    by_input: ModelCheckpoint
    by_loss: ModelCheckpoint
    output: str


@pytest.fixture(scope="module")
def run(make: Make, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs with pictures, checkpoints and TensorBoard."""
    folder = tmp_path_factory.mktemp("run[bold]")  # a name that rich would take for markup
    callback = GroundingCallback(examples=2)
    by_gamma = ModelCheckpoint(filename="grounding", monitor="val/gamma_mean", mode="max")
    by_input = ModelCheckpoint(filename="input", monitor="val/gamma_mean_input", mode="max")
    by_loss = ModelCheckpoint(filename="loss", monitor="val/loss", mode="min")
    logger = TensorBoardLogger(folder, name="run", version=0)
    trainer = trainer_in(folder, callback, by_gamma, by_input, by_loss, logger=logger, max_epochs=2)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.fit(make(), data_of(world))
    logger.experiment.flush()
    return Run(folder / "run" / "version_0", trainer, callback, by_gamma, by_input, by_loss, printed.getvalue())


def test_grounding_is_measured_before_training_and_after_each_epoch_with_a_result_folder_each(
    run: Run, world: Path, expected: Pairs
) -> None:
    history = run.callback.history
    assert [(row["epoch"], row["step"]) for row in history] == [(0, 0), (1, 3), (2, 6)]
    assert len({row["gamma_mean"] for row in history}) == 3
    for row in history:
        path = run.folder / "grounding" / f"epoch={row['epoch']:03d}"
        table = lines_of(path)
        assert len(table) == len(expected)
        gammas = [line["gamma"] for line in table if line["reason"] == "measured"]
        assert np.mean(gammas) == pytest.approx(row["gamma_mean"], abs=1e-12)
        assert len(gammas) == row["targets"]
        assert all(math.isnan(line["gamma"]) == (line["reason"] != "measured") for line in table)
        record = read_record(path)
        assert (record.kind, record.state) == ("training", {"epoch": row["epoch"], "step": row["step"]})
        assert record.logged["loss"] == row["loss"]
        for line in table:
            caption = line["caption"]
            assert all(words in caption for words in line["phrase"].split(", "))
        classes = rows_of(path / "classes.csv")
        assert [line["label"] for line in classes] == list(Manifest.load(world / "val").labels)
        assert sum(int(line["targets"]) for line in classes) == row["targets"]
        weighted = sum(int(line["targets"]) * float(line["gamma_mean"]) for line in classes if int(line["targets"]))
        assert weighted / row["targets"] == pytest.approx(row["gamma_mean"], abs=1e-9)
        # An example is drawn with the gamma of the table.
        for lines, ending in ((table, ""), (lines_of(path, INPUTS["vit"]), "_input")):
            columns = (row["examples"][key] for key in ("keys", f"gammas{ending}", f"hits{ending}"))
            for name, gamma, hit in zip(*columns, strict=True):
                drawn = (*name.split(": "), "measured")
                first = next(line for line in lines if (line["key"], line["phrase"], line["reason"]) == drawn)
                assert (first["gamma"], first["rho"] == 1) == (pytest.approx(gamma, abs=1e-6), hit)


def test_the_table_of_the_best_checkpoint_is_what_its_weights_give(run: Run, world: Path) -> None:
    best = max(run.callback.history[1:], key=lambda row: row["gamma_mean"])
    table = table_of(run.folder / "grounding" / f"epoch={best['epoch']:03d}")
    assert_same_pairs(table, pair_by_pair(load_dual_encoder(run.by_gamma.best_model_path), world / "val"))


def test_checkpoints_follow_grounding_and_loss(run: Run) -> None:
    trained = run.callback.history[1:]
    for saver, name in ((run.by_gamma, "gamma_mean"), (run.by_input, "gamma_mean_input"), (run.by_loss, "loss")):
        best = (max if saver.mode == "max" else min)(row[name] for row in trained)
        assert saver.best_model_score is not None
        assert float(saver.best_model_score) == pytest.approx(best, abs=1e-6)
        state = torch.load(saver.best_model_path, weights_only=True)
        assert any("GroundingCallback" in key for key in state["callbacks"])


def test_the_summary_has_a_line_for_each_epoch_with_what_the_module_logged(run: Run) -> None:
    lines = rows_of(run.folder / "grounding" / "summary.csv")
    assert [int(line["epoch"]) for line in lines] == [0, 1, 2]
    for line, row in zip(lines, run.callback.history, strict=True):
        assert float(line["rho"]) == row["rho"]
        assert float(line["loss"]) == row["loss"]
        assert 0 <= float(line["text_to_image_recall_at_1"]) <= 1
        assert int(line["excluded_not_mentioned"]) == row["excluded"]["not_mentioned"]
    assert float(lines[-1]["loss"]) == pytest.approx(float(run.trainer.callback_metrics["val/loss"]))


def test_the_pictures_are_valid_and_show_the_same_examples_in_every_epoch(run: Run) -> None:
    for name in ("progress.png", "curves.png"):
        with Image.open(run.folder / "grounding" / name) as picture:
            picture.load()
            assert min(picture.size) > 200
            assert len(picture.convert("L").getcolors() or []) > 20
    keys = [row["examples"]["keys"] for row in run.callback.history]
    assert all(len(epoch) == 2 and epoch == keys[0] for epoch in keys)
    assert len({key.split(":")[0] for key in keys[0]}) == 2
    heats = [row["examples"]["heats"] for row in run.callback.history]
    assert all(heat.shape == (4, 4) for epoch in heats for heat in epoch)
    assert not torch.equal(heats[0][0], heats[-1][0])


def test_the_examples_of_each_measurement_are_kept_as_files_and_their_pictures_once(run: Run) -> None:
    folder = run.folder / "grounding"
    for row in run.callback.history:
        for label, ending in (("feature_pair", ""), (INPUTS["vit"], "_input")):
            records = read_examples(folder / f"epoch={row['epoch']:03d}" / label)
            words = read_words(folder / f"epoch={row['epoch']:03d}" / label)
            assert [f"{record.key}: {record.phrase}" for record in records] == row["examples"]["keys"]
            for record, heat, gamma in zip(
                records, *(row["examples"][f"{name}{ending}"] for name in ("heats", "gammas")), strict=True
            ):
                assert record.gamma == pytest.approx(gamma)
                assert np.array(record.heat) == pytest.approx(heat.numpy(), rel=1e-3)
                with Image.open(folder / record.image) as picture:
                    assert picture.size == (32, 32)
            # The map of a phrase is the sum of those of its words.
            for place, (record, heat) in enumerate(zip(records, row["examples"][f"heats{ending}"], strict=True)):
                spans = words_of(record.caption)
                assert len(words[place]) == len(spans)
                own = [any(start < b and a < end for a, b in record.spans) for start, end in spans]
                total = words[place][own].sum(axis=0)
                assert total == pytest.approx(heat.numpy(), rel=1e-3, abs=1e-3 * float(heat.abs().max()))
    assert len(list(folder.rglob("*.jpg"))) == 2


def test_tensorboard_has_scalars_and_pictures_from_step_zero_on(run: Run) -> None:
    events = EventAccumulator(str(run.folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    for name in SCALARS:
        logged = events.Scalars(f"val/{name}")
        key = name.removeprefix("grounding_")
        values = [row[key] for row in run.callback.history]
        assert [event.value for event in logged] == pytest.approx(values, abs=1e-6)
        assert logged[0].step == 0
    losses = [row["loss"] for row in run.callback.history]
    assert [event.value for event in events.Scalars("val/loss")] == pytest.approx(losses)
    pictures = events.Images("val/grounding")
    assert [event.step for event in pictures] == [event.step for event in events.Scalars("val/rho")] == [0, 2, 5]
    with Image.open(run.folder / "grounding" / "progress.png") as picture:
        assert (pictures[-1].width, pictures[-1].height) == picture.size


def test_a_table_is_shown_at_the_end_with_the_path_to_look_at(run: Run) -> None:
    assert "Grounding per epoch" in run.output
    for name in ("before", "epoch 1", "epoch 2"):
        assert run.output.count(name) == 2  # at the inputs, and at the last blocks
    assert run.output.index("inputs (0,0)") < run.output.index("layers (2,2)")
    assert f"{run.folder / 'grounding' / 'progress.png'}" in run.output
    assert f"{run.folder / 'grounding' / 'summary.csv'}" in run.output
    assert "not mentioned" in run.output
    assert max(len(line) for line in run.output.splitlines() if "γ" in line) <= 80


def test_measurements_of_an_earlier_release_have_gaps_where_the_inputs_would_be() -> None:
    last = dict.fromkeys(("gamma_mean", "gamma_above_50", "gamma_above_80", "rho"), 0.25) | {"targets": 4}
    old: dict[str, Any] = {"epoch": 0, "step": 0, "excluded": {}, **last}
    new = old | {f"{name}_input": value for name, value in last.items()} | {"epoch": 1, "layers_input": "0,0"}
    printed = io.StringIO()
    show(Path("nowhere"), [old, new], Console(file=printed, width=100))
    inputs, layers = printed.getvalue().split("Grounding per epoch")[1:]
    assert "inputs (0,0)" in inputs
    assert inputs.count("–") == 5
    assert "–" not in layers
    callback = GroundingCallback()
    callback.load_state_dict({"history": [old]})
    assert callback.history == [old]


# --- when it measures ---


def test_every_second_epoch_is_measured_when_asked_for(make: Make, world: Path, tmp_path: Path) -> None:
    callback = GroundingCallback(every_n_epochs=2, examples=0)
    savers = ModelCheckpoint(monitor="val/rho", every_n_epochs=2), ModelCheckpoint(filename="l", monitor="val/loss")
    trainer_in(tmp_path, callback, *savers, max_epochs=3).fit(make(), data_of(world))
    assert [row["epoch"] for row in callback.history] == [0, 2]
    tables = sorted(path.name for path in (tmp_path / "grounding").glob("epoch=*"))
    assert tables == ["epoch=000", "epoch=002"]


def test_without_the_measurement_before_training_lightnings_short_check_stays_as_it_is(
    make: Make, world: Path, tmp_path: Path
) -> None:
    class Count(Callback):
        batches = 0

        def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            self.batches += trainer.sanity_checking

    callback, count = GroundingCallback(before_training=False, examples=0), Count()
    trainer_in(tmp_path, callback, count, num_sanity_val_steps=1).fit(make(), data_of(world))
    assert count.batches == 1
    assert [row["epoch"] for row in callback.history] == [1]


class RandomState(Callback):
    at_start: Tensor

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at_start = torch.random.get_rng_state()


@pytest.mark.slow
def test_measuring_changes_nothing_in_the_training(make: Make, world: Path, tmp_path: Path) -> None:
    results = []
    for callbacks in ([GroundingCallback(examples=1)], []):
        task, state = make(), RandomState()
        trainer_in(tmp_path, *callbacks, state, num_sanity_val_steps=0).fit(task, data_of(world))
        results.append((task.state_dict(), state.at_start))
    (weights, random), (other_weights, other_random) = results
    assert torch.equal(other_random, random)
    assert all(torch.equal(other_weights[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("looking", "trainer_options"),
    [
        (lambda: ModelCheckpoint(monitor="val/gamma_mean"), {}),
        (lambda: ModelCheckpoint(monitor="val/rho", every_n_epochs=3), {}),
        (lambda: EarlyStopping("val/gamma_above_50"), {}),
        (lambda: EarlyStopping("val/gamma_above_80"), {"check_val_every_n_epoch": 3}),
    ],
)
def test_a_callback_that_looks_in_epochs_that_are_not_measured_is_refused_before_training(
    make: Make, world: Path, tmp_path: Path, looking: Callable[[], Callback], trainer_options: dict[str, Any]
) -> None:
    trainer = trainer_in(tmp_path, GroundingCallback(every_n_epochs=2), looking(), **trainer_options)
    with pytest.raises(ValueError, match=r"looks at val/.* every \d epochs, .* every 2: give both the same"):
        trainer.fit(make(), data_of(world))
    assert trainer.global_step == 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_history(make: Make, world: Path, tmp_path: Path) -> None:
    callback = GroundingCallback(examples=1)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer_in(tmp_path / "first", callback, saver, max_epochs=2).fit(make(), data_of(world))
    resumed = GroundingCallback(examples=1)
    trainer = trainer_in(tmp_path / "second", resumed, max_epochs=2)
    trainer.fit(make(), data_of(world), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert [row["epoch"] for row in resumed.history] == [0, 1, 2]
    for before, after in zip(callback.history, resumed.history, strict=True):
        assert after["gamma_mean"] == before["gamma_mean"]
        assert after["loss"] == before["loss"]
        assert torch.equal(after["examples"]["heats"][0], before["examples"]["heats"][0])
    lines = rows_of(tmp_path / "second" / "grounding" / "summary.csv")
    assert [int(line["epoch"]) for line in lines] == [0, 1, 2]
    sizes = []
    for name in ("first", "second"):
        with Image.open(tmp_path / name / "grounding" / "progress.png") as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1]  # as many columns


@pytest.mark.slow
def test_a_run_that_is_prolonged_keeps_its_history_and_a_second_run_starts_a_new_one(
    make: Make, world: Path, tmp_path: Path
) -> None:
    callback, task = GroundingCallback(examples=0), make()
    trainer = trainer_in(tmp_path, callback, max_epochs=1)
    trainer.fit(task, data_of(world))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(task, data_of(world))
    assert [(row["epoch"], row["step"]) for row in callback.history] == [(0, 0), (1, 3), (2, 6)]
    trainer_in(tmp_path / "second", callback, max_epochs=1).fit(task, data_of(world))
    assert [row["epoch"] for row in callback.history] == [0, 1]


# --- validate and test ---


@pytest.mark.slow
def test_validate_and_test_log_and_write_beside_the_training_without_touching_it(
    make: Make, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, callback = make(), GroundingCallback(examples=2)
    logger = CSVLogger(tmp_path, name="run")
    trainer = trainer_in(tmp_path, callback, logger=logger)
    trainer.fit(task, data_of(world))
    folder = Path(logger.log_dir) / "grounding"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    history = list(callback.history)
    capsys.readouterr()
    results = {}
    for verb, split in (("validate", "val"), ("test", "test")):
        run = trainer.validate if verb == "validate" else trainer.test
        (logged,) = run(task, data_of(world), verbose=False)
        assert {f"{split}/{name}" for name in SCALARS} <= set(logged)
        assert all(name.startswith(f"{split}/") for name in logged)
        results[verb] = [logged[f"{split}/{name}"] for name in (*SCALARS, "loss")]
        printed = capsys.readouterr().out
        assert verb in printed
        assert str(folder / f"progress-{verb}.png") in printed
        assert lines_of(folder / verb)
        for name in (f"summary-{verb}.csv", f"{verb}/classes.csv"):
            assert rows_of(folder / name)
        with Image.open(folder / f"progress-{verb}.png") as picture:
            picture.load()
    last = callback.history[-1]
    assert results["validate"] == pytest.approx(results["test"])
    assert results["validate"][0] == pytest.approx(last["gamma_mean"], abs=1e-6)
    assert callback.history == history
    assert {path: path.read_bytes() for path in before} == before


# --- the model is left as it was ---


def test_hooks_modes_and_gradients_are_as_before_also_after_an_exception(
    make: Make, world: Path, tmp_path: Path, architecture_file: Callable[[str], Path]
) -> None:
    task = make()
    before = hooks_in(task)
    task.encoder.model.visual.eval()  # part of the model may be frozen on purpose
    task.encoder.model.visual.requires_grad_(False)
    modes = {name: module.training for name, module in task.named_modules()}
    grads = {name: parameter.requires_grad for name, parameter in task.named_parameters()}
    trainer_in(tmp_path, GroundingCallback(examples=0)).validate(task, data_of(world), verbose=False)
    assert {name: module.training for name, module in task.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in task.named_parameters()} == grads
    assert all(parameter.grad is None for parameter in task.parameters())
    task.encoder.model.visual.requires_grad_(True)
    trainer_in(tmp_path, GroundingCallback(examples=0)).fit(task, data_of(world))
    assert hooks_in(task) == before

    class Failing(ContrastiveFineTuning):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            assert hooks_in(self) == before + 3, "at both layers, and where the image tower ends"
            if batch_idx == 1:
                raise KeyError("in the middle")

    failing = Failing(str(architecture_file("vit")), None)
    for start in ("fit", "validate"):
        trainer = trainer_in(tmp_path, GroundingCallback(examples=0))
        with pytest.raises(KeyError, match="in the middle"):
            getattr(trainer, start)(failing, data_of(world))
        assert hooks_in(failing) == before


@pytest.mark.slow
def test_repeated_measurements_keep_no_tensors(make: Make, world: Path, tmp_path: Path) -> None:
    task, callback = make(), GroundingCallback(examples=0)
    trainer, counts = trainer_in(tmp_path, callback), []
    for _ in range(3):
        trainer.validate(task, data_of(world), verbose=False)
        gc.collect()
        counts.append(sum(1 for thing in gc.get_objects() if type(thing) is Tensor))
    assert counts[-1] <= counts[1]


# --- mistakes ---


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_inference_mode_is_refused_at_once_with_the_remedy(make: Make, world: Path, tmp_path: Path, verb: str) -> None:
    trainer = trainer_in(tmp_path, GroundingCallback(), inference_mode=True)
    with pytest.raises(ValueError, match=r"Trainer\(inference_mode=False\)"):
        getattr(trainer, verb)(make(), data_of(world))


def test_prediction_needs_no_gradients_and_no_check(make: Make, world: Path, tmp_path: Path) -> None:
    predictions = trainer_in(tmp_path, GroundingCallback(), inference_mode=True).predict(make(), data_of(world))
    assert predictions is not None
    assert len(predictions) == 3


def test_a_layer_that_does_not_exist_is_refused_at_setup(make: Make, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text tower has layers 0 to 2"):
        trainer_in(tmp_path, GroundingCallback(text_layer=-4)).fit(make(), data_of(world))
    assert not (tmp_path / "grounding").exists()


@pytest.mark.parametrize(
    ("name", "least"), [("every_n_epochs", 1), ("internal_batch_size", 1), ("examples", 0), ("input_phrases", 0)]
)
def test_numbers_outside_their_range_are_refused(name: str, least: int) -> None:
    options: dict[str, Any] = {name: least - 1}
    with pytest.raises(ValueError, match=f"{name} has to be at least {least}; got {least - 1}"):
        GroundingCallback(**options)


def test_a_module_without_a_dual_encoder_is_refused_with_the_remedy(world: Path, tmp_path: Path) -> None:
    class Bare(L.LightningModule):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            pass

    with pytest.raises(ValueError, match=r"no DualEncoder in Bare: keep one as `self.encoder`"):
        trainer_in(tmp_path, GroundingCallback()).validate(Bare(), data_of(world))


def test_other_batches_are_an_error(make: Make, tmp_path: Path) -> None:
    class Plain(Foreign):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    loader: Any = torch.utils.data.DataLoader([1, 2, 3])  # type: ignore[arg-type] # a list is a data set
    with pytest.raises(RuntimeError, match=r"no lightning_xai\.data\.Batch"):
        trainer_in(tmp_path, GroundingCallback()).validate(Plain(make().encoder, "nothing"), loader)


def test_weights_that_are_nan_are_named_as_the_cause(make: Make, world: Path, tmp_path: Path) -> None:
    task = make()
    with torch.no_grad():
        next(task.encoder.model.visual.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"not finite.*\n?.*training run that diverged leaves NaN"):
        trainer_in(tmp_path, GroundingCallback(input_phrases=0)).validate(task, data_of(world), verbose=False)
    with pytest.raises(ValueError, match=r"image tower's output is not finite: its weights hold NaN"):
        trainer_in(tmp_path, GroundingCallback()).validate(task, data_of(world), verbose=False)
    assert hooks_in(task) == 0


def test_a_split_where_nothing_can_be_measured_gives_nan_and_no_picture_and_the_run_completes(
    make: Make, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = split_with(tmp_path / "bare", [replace(sample, regions=()) for sample in samples_of(world / "val")])
    callback, saver = GroundingCallback(), ModelCheckpoint(tmp_path, monitor="val/gamma_mean", mode="max")
    trainer = trainer_in(tmp_path / "run", callback, saver, logger=TensorBoardLogger(tmp_path / "run", version=0))
    trainer.fit(make(), data_of(world, val=bare))
    assert trainer.global_step == 3
    logged = trainer.callback_metrics
    assert float(logged["val/grounding_targets"]) == 0
    assert all(math.isnan(float(logged[f"val/{name}"])) for name in SCALARS if "targets" not in name)
    assert math.isfinite(float(logged["val/loss"]))
    folder = Path(trainer.log_dir or "") / "grounding"
    assert not list(folder.glob("*.png"))
    assert lines_of(folder / "epoch=001") == []
    assert len(rows_of(folder / "summary.csv")) == 2
    printed = capsys.readouterr().out
    assert "progress.png" not in printed
    assert str(folder / "summary.csv") in printed
    assert Path(saver.best_model_path).is_file()


def test_of_a_module_that_is_not_ours_loggers_get_its_own_nan_but_none_of_what_was_not_measured(
    make: Make, world: Path, tmp_path: Path
) -> None:
    class Odd(Foreign):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("val/odd", math.nan, batch_size=len(batch.images))

    bare = split_with(tmp_path / "bare", [replace(sample, regions=()) for sample in samples_of(world / "val")])
    task, data = make(), data_of(world, val=bare)
    data.bind(task.encoder.image_transform, task.encoder.tokenizer)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = trainer_in(tmp_path, GroundingCallback(), logger=logger)
    with pytest.warns(UserWarning, match="gamma and rho at layers 2,2 have no value"):
        trainer.validate(Odd(task.encoder, "captions once"), data, verbose=False)
    assert math.isnan(float(trainer.callback_metrics["val/gamma_mean"]))
    (row,) = rows_of(tmp_path / "metrics.csv")
    assert row.keys() - {"epoch", "step"} == {
        "val/loss",
        "val/odd",
        "val/grounding_targets",
        "val/grounding_targets_input",
    }


def test_broken_records_are_excluded_and_the_other_pairs_stay(
    make: Make, world: Path, tmp_path: Path, expected: Pairs
) -> None:
    samples = samples_of(world / "val")
    torn = [replace(s, image=s.image[:-60]) if i in (0, 7) else s for i, s in enumerate(samples)]
    broken = split_with(tmp_path / "broken", torn)
    task = make()
    data = data_of(world, val=broken, max_fault_fraction=0.5)
    trainer_in(tmp_path, GroundingCallback(examples=1)).validate(task, data, verbose=False)
    intact = {where: pair for where, pair in expected.items() if where[0] not in (0, 7)}
    assert_same_pairs(table_of(tmp_path / "grounding" / "validate"), intact)


# --- two processes; test_same_numbers.py compares the numbers of their evaluations ---


def fit_and_predict(config: str, world: str, splits: str, out: str, **parallel: Any) -> dict[str, Any]:
    """Fit for an epoch, and write embeddings of splits of which a rank has fewer samples than the other, or none."""
    callback, saver = GroundingCallback(examples=2), ModelCheckpoint(monitor="val/gamma_mean", mode="max")
    logger = TensorBoardLogger(Path(out) / "fit")
    trainer = trainer_in(Path(out) / "fit", callback, saver, logger=logger, **parallel)
    trainer.fit(task_of(config), data_of(Path(world), batch_size=4))
    for name in ("three", "one"):
        data = data_of(Path(world), val=Path(splits) / name, test=None)
        trainer_in(Path(out) / name, PredictionWriter(), **parallel).predict(task_of(config), data)
    history = [{k: row[k] for k in ("epoch", "step", "gamma_mean", "targets", "loss")} for row in callback.history]
    return {
        "history": history,
        "drawn": len(callback.history[0]["examples"]["keys"]),
        "saved": saver.best_model_path,
    }


def fit_and_predict_on_this_rank(config: str, world: str, splits: str, out: str) -> dict[str, Any]:
    return fit_and_predict(config, world, splits, out, **join_lightning())


@pytest.mark.distributed
def test_two_processes_have_one_history_one_folder_and_one_checkpoint_and_each_its_own_embeddings(
    architecture_file: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    samples = samples_of(world / "val")
    for name, count in (("three", 3), ("one", 1)):
        split_with(tmp_path / "splits" / name, samples[:count])
    where = (str(architecture_file("vit")), str(world), str(tmp_path / "splits"))
    first, second = run_distributed(fit_and_predict_on_this_rank, *where, str(tmp_path / "two"))
    alone = fit_and_predict(*where, str(tmp_path / "alone"))
    assert [row["epoch"] for row in first["history"]] == [0, 1]
    assert first["history"] == second["history"]
    assert first["history"][0] == pytest.approx(alone["history"][0], abs=2e-6)
    assert first["saved"] == second["saved"]
    assert Path(first["saved"]).is_file()
    assert [rank["drawn"] for rank in (first, second)] == [2, 0]  # only the rank that writes keeps pictures
    assert len(list((tmp_path / "two" / "fit").rglob("progress.png"))) == 1
    for name, shares in (("three", [2, 1]), ("one", [1, 0])):
        keys: list[str] = []
        for rank, share in enumerate(shares):
            paths = sorted((tmp_path / "two" / name / "predictions").glob(f"rank_{rank}-*"))
            assert len(paths) == bool(share)
            for part in map(read_part, paths):
                assert part.arrays["image"].shape == (share, 24)
                captions = sum(len(sample.captions) for sample in samples if sample.key in part.texts["keys"])
                assert part.arrays["text"].shape == (captions, 24)
                keys += part.texts["keys"]
        assert keys == [sample.key for sample in samples[: sum(shares)]]
