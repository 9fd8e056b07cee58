"""Zero-shot accuracy as runs log it: next to grounding, for checkpoints to follow, the same on several processes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed import join_lightning, run_distributed
from image_files import HTML
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from training_runs import task_of, trainer_in

from lightning_xai.data import ShardDataModule
from lightning_xai.data.shape_classes import prepare_shape_classes
from lightning_xai.evaluation.zero_shot import ZeroShot
from lightning_xai.models import load_dual_encoder
from lightning_xai.results.record import read_record
from lightning_xai.training import ContrastiveFineTuning, GroundingCallback, ZeroShotCallback
from lightning_xai.training.grounding_report import show

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

OPTIONS: dict[str, Any] = {"templates": ["a picture of a {}"], "num_workers": 0, "batch_size": 48}


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 32 classes of shapes, with 2 images each, one of which is broken."""
    folder = tmp_path_factory.mktemp("classes") / "shapes"
    prepare_shape_classes(folder, 2)
    (folder / "red_ring" / "001.png").write_bytes(HTML)
    return folder


def data_of(shapes: Path) -> ShardDataModule:
    train, val = shapes / "train", shapes / "val"
    return ShardDataModule(train=train, val=val, test=val, batch_size=32, eval_batch_size=20, num_workers=0)


def task(architecture_file: Callable[[str], Path]) -> ContrastiveFineTuning:
    return task_of(architecture_file("vit"))


class Logged(Callback):
    """What was logged in each validation."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.slow
def test_accuracy_stands_next_to_grounding_and_checkpoints_follow_it(
    architecture_file: Callable[[str], Path], shapes: Path, classes: Path, tmp_path: Path, capsys: Any
) -> None:
    zero_shot = ZeroShotCallback(classes, **OPTIONS)
    # The order of the callbacks does not matter: grounding writes after all of them have logged.
    grounding = GroundingCallback(examples=1, input_phrases=5)
    best = ModelCheckpoint(tmp_path / "best", monitor="val/zero_shot_accuracy", mode="max", save_top_k=-1)
    logger = CSVLogger(tmp_path)
    module = task(architecture_file)
    trainer = trainer_in(tmp_path, grounding, zero_shot, best, max_epochs=2, logger=logger)
    trainer.fit(module, data_of(shapes))
    printed = capsys.readouterr().out
    assert printed.count("Zero-shot classification skipped 1 of 64 images") == 1
    assert "zero-shot" in printed
    folder = Path(logger.log_dir) / "grounding"
    with (folder / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["zero_shot_images"], row["zero_shot_skipped"]) for row in rows] == [
        (epoch, "63.0", "1.0") for epoch in "012"
    ]
    found = [float(row["zero_shot_accuracy"]) for row in rows]
    assert all(
        0 <= value <= float(row["zero_shot_accuracy_top_5"]) <= 1 for value, row in zip(found, rows, strict=True)
    )
    record = read_record(folder / "epoch=001")
    assert record is not None
    assert record.logged["zero_shot_accuracy"] == found[1]
    # The numbers are those of the saved weights, measured apart.
    encoder = load_dual_encoder(best.best_model_path)
    result = ZeroShot(classes, **OPTIONS).measure(encoder)
    assert result.accuracy == pytest.approx(max(found[1:]), abs=1e-6)


def test_a_measurement_of_an_earlier_epoch_does_not_stand_in_the_table_of_a_later_one(
    architecture_file: Callable[[str], Path], shapes: Path, classes: Path, tmp_path: Path
) -> None:
    zero_shot = ZeroShotCallback(classes, every_n_epochs=2, **OPTIONS)
    grounding = GroundingCallback(examples=0, input_phrases=0, before_training=False)
    trainer = trainer_in(tmp_path, zero_shot, grounding, max_epochs=3, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(task(architecture_file), data_of(shapes))
    assert ["zero_shot_accuracy" in row for row in grounding.history] == [False, True, False]
    show(tmp_path, grounding.history)  # gaps are no error


def test_the_training_is_the_same_with_and_without(
    architecture_file: Callable[[str], Path], shapes: Path, classes: Path, tmp_path: Path
) -> None:
    states = []
    for callbacks in ([], [ZeroShotCallback(classes, **OPTIONS)]):
        module = task(architecture_file)
        L.seed_everything(3, verbose=False)
        trainer_in(tmp_path, *callbacks, max_epochs=2, limit_train_batches=1).fit(module, data_of(shapes))
        states.append({**module.state_dict(), "random": torch.get_rng_state()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_test_runs_log_it_under_their_own_name_at_any_precision(
    architecture_file: Callable[[str], Path], shapes: Path, classes: Path, tmp_path: Path
) -> None:
    module = task(architecture_file)
    for precision in ("bf16-mixed", "64-true"):
        trainer = trainer_in(tmp_path, ZeroShotCallback(classes, **OPTIONS), precision=precision)
        (found,) = trainer.test(module, data_of(shapes), verbose=False)
        assert found["test/zero_shot_images"] == 63
        assert 0 <= found["test/zero_shot_accuracy"] < 1


def test_a_callback_that_looks_in_epochs_that_are_not_measured_is_refused_before_training(
    architecture_file: Callable[[str], Path], shapes: Path, classes: Path, tmp_path: Path
) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/zero_shot_accuracy")
    trainer = trainer_in(tmp_path, ZeroShotCallback(classes, every_n_epochs=2, **OPTIONS), best)
    with pytest.raises(ValueError, match="ZeroShotCallback measures it every 2"):
        trainer.fit(task(architecture_file), data_of(shapes))
    with pytest.raises(ValueError, match="every_n_epochs has to be at least 1; got 0"):
        ZeroShotCallback(classes, every_n_epochs=0, **OPTIONS)


def validate(config: str, shapes: str, classes: str, out: str, parallel: dict[str, Any] | None = None) -> Any:
    torch.set_num_threads(1)
    parallel = join_lightning() if parallel is None else parallel
    zero_shot = ZeroShotCallback(Path(classes), **OPTIONS)
    trainer = trainer_in(Path(out), zero_shot, **parallel)
    (found,) = trainer.validate(task_of(config), data_of(Path(shapes)), verbose=False)
    assert zero_shot.result is not None
    assert len(zero_shot.result.reasons) == trainer.is_global_zero  # the first process names what was skipped
    return {name: value for name, value in found.items() if "zero_shot" in name} | {"hits": zero_shot.result.hits}


@pytest.mark.distributed
@pytest.mark.slow
def test_the_numbers_are_the_same_on_one_two_and_four_processes(
    architecture_file: Callable[[str], Path], shapes: Path, classes: Path, tmp_path: Path
) -> None:
    args = (str(architecture_file("vit")), str(shapes), str(classes), str(tmp_path))
    alone = validate(*args, {})
    for world_size in (2, 4):
        assert run_distributed(validate, *args, world_size=world_size) == [alone] * world_size
