from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned_shards import TRANSFORM, keys, make_samples, make_shards
from damaged_shards import Reader
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShapesDataModule, ShardDataModule
from lightning_xai.data.excluded import BrokenRecordWarning, TooManyBrokenRecordsError
from lightning_xai.data.sample import Sample
from lightning_xai.data.shards import write_shards
from lightning_xai.data.spans import CaptionTokenizer
from lightning_xai.models.image_transform import ImageTransform

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(lightning|torch)", "ignore::FutureWarning:torch")


def test_the_global_random_state_stays_as_it_is(shards: Path, tokenizer: CaptionTokenizer) -> None:
    module = ShardDataModule(train=shards, val=shards, batch_size=8, num_workers=0)
    module.bind(TRANSFORM, tokenizer)
    before = torch.random.get_rng_state()
    keys(module.train_dataloader())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_some_images_of_a_split_are_drawn_by_the_seed_alone(shards: Path, tokenizer: CaptionTokenizer) -> None:
    def drawn(count: int, **options: Any) -> Batch:
        data = ShardDataModule(test=shards, num_workers=0, **options)
        data.bind(TRANSFORM, tokenizer)
        return data.drawn("test", count)

    some, every = drawn(12), drawn(100)
    assert every.index.tolist() == list(range(57))
    indices = some.index.tolist()
    assert indices == sorted(set(indices))
    assert len(indices) == 12
    assert torch.equal(some.images, every.images[indices])
    assert some.keys == [every.keys[index] for index in indices]
    assert drawn(12, batch_size=3).index.tolist() == indices
    assert drawn(12, seed=1).index.tolist() != indices


# --- with a real trainer ---------------------------------------------------------------------------------------------


class Recorder(Reader):
    """Records the keys of each training epoch and of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.train_keys: dict[int, list[str]] = {}
        self.val_keys: list[list[str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.train_keys.setdefault(self.current_epoch, []).extend(batch.keys)
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.val_keys.append([])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_keys[-1] += batch.keys
        self.log("val/epoch", float(self.current_epoch), batch_size=len(batch.keys))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_keys.append(list(batch.keys))


class WithoutEncoder(Recorder):
    def __init__(self) -> None:
        super().__init__()
        del self.encoder


make_trainer = partial(quiet_trainer, max_epochs=3)


def checkpoints(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, **options)


SAVING: dict[str, tuple[dict[str, Any], str]] = {
    "at the end of the epoch": ({"save_on_train_epoch_end": True}, "epoch=1-step=28.ckpt"),
    "after validation": ({"save_on_train_epoch_end": False}, "epoch=1-step=28.ckpt"),
    "in the middle of the epoch": ({"every_n_train_steps": 5}, "epoch=1-step=20.ckpt"),
    "at the last step of the epoch": ({"every_n_train_steps": 14}, "epoch=1-step=28.ckpt"),
}


@pytest.mark.parametrize(
    ("saving", "workers", "length"),
    [
        *((saving, 0, {"max_epochs": 4}) for saving in SAVING),
        ("in the middle of the epoch", 2, {"max_epochs": 4}),
        ("at the last step of the epoch", 0, {"max_epochs": -1, "max_steps": 56}),
    ],
)
def test_a_resumed_run_sees_the_very_same_samples(
    tmp_path: Path, shards: Path, workers: int, saving: str, length: dict[str, int]
) -> None:
    def data() -> ShardDataModule:
        return ShardDataModule(train=shards, val=shards, batch_size=4, eval_batch_size=57, num_workers=workers)

    options, file = SAVING[saving]
    straight = Recorder()
    trainer = make_trainer(tmp_path, checkpoints(tmp_path, **options), num_sanity_val_steps=0, **length)
    trainer.fit(straight, data())
    assert sorted(straight.train_keys) == [0, 1, 2, 3]
    assert len({tuple(epoch) for epoch in straight.train_keys.values()}) == 4
    assert {len(epoch) for epoch in straight.train_keys.values()} == {56}
    assert [sorted(run) for run in straight.val_keys] == [sorted(f"k{i}" for i in range(57))] * 4

    resumed = Recorder()
    trainer = make_trainer(tmp_path, num_sanity_val_steps=0, **length)
    trainer.fit(resumed, data(), ckpt_path=tmp_path / file, weights_only=True)
    seen = [key for epoch in sorted(resumed.train_keys) for key in resumed.train_keys[epoch]]
    expected = [key for epoch in range(4) for key in straight.train_keys[epoch]]
    step = int(file.split("step=")[1].split(".")[0])
    assert seen == expected[4 * step :]


def test_overfitting_repeats_the_same_batches(tmp_path: Path, shards: Path) -> None:
    module = Recorder()
    make_trainer(tmp_path, overfit_batches=2).fit(module, ShardDataModule(train=shards, batch_size=4, num_workers=2))
    assert {len(epoch) for epoch in module.train_keys.values()} == {8}
    assert module.train_keys[0] == module.train_keys[1] == module.train_keys[2]


def test_an_epoch_that_is_cut_short_does_not_disturb_the_next(tmp_path: Path, shards: Path) -> None:
    whole, cut = Recorder(), Recorder()
    data: dict[str, Any] = {"train": shards, "batch_size": 4, "persistent_workers": True}
    make_trainer(tmp_path).fit(whole, ShardDataModule(**data))
    make_trainer(tmp_path, limit_train_batches=3).fit(cut, ShardDataModule(**data))
    assert cut.train_keys == {epoch: whole.train_keys[epoch][:12] for epoch in range(3)}


def test_validate_test_and_predict_read_their_split(tmp_path: Path, shards: Path, one_shard: Path) -> None:
    data = ShardDataModule(val=shards, test=one_shard, batch_size=8)
    module = Recorder()
    trainer = make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    assert sorted(module.val_keys[-1]) == sorted(f"k{i}" for i in range(57))
    module.val_keys.clear()
    trainer.test(module, data, verbose=False)
    assert sorted(key for run in module.val_keys for key in run) == sorted(f"k{i}" for i in range(23))
    predictions = trainer.predict(module, data)
    assert predictions is not None
    assert sorted(key for run in predictions for key in run) == sorted(f"k{i}" for i in range(23))
    predictions = trainer.predict(module, ShardDataModule(val=shards, batch_size=8))
    assert predictions is not None
    assert sum(len(run) for run in predictions) == 57


def test_a_model_without_an_encoder_is_told_what_it_lacks(tmp_path: Path, shards: Path) -> None:
    data = ShardDataModule(train=shards, batch_size=8, num_workers=0)
    with pytest.raises(ValueError, match=r"WithoutEncoder.encoder is .*bind"):
        make_trainer(tmp_path).fit(WithoutEncoder(), data)


def test_bound_transform_and_tokenizer_go_before_the_models(
    tmp_path: Path, shards: Path, tokenizer: CaptionTokenizer
) -> None:
    data = ShardDataModule(val=shards, batch_size=57, num_workers=0)
    data.bind(ImageTransform(size=(4, 6)), tokenizer)
    (batch,) = data.val_dataloader()
    assert isinstance(batch, Batch)
    assert batch.images.shape == (57, 3, 4, 6)
    make_trainer(tmp_path).validate(WithoutEncoder(), data, verbose=False)


def test_without_a_trainer_the_epoch_is_an_attribute(shards: Path, tokenizer: CaptionTokenizer) -> None:
    data = ShardDataModule(train=shards, batch_size=8)
    data.bind(TRANSFORM, tokenizer)
    loader = data.train_dataloader()
    first = keys(loader)
    assert keys(loader) == first
    data.epoch = 1
    assert keys(loader) != first


def test_the_preflight_line_comes_once_and_has_the_numbers(
    tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=logger.name):
            data = ShardDataModule(train=shards, val=shards, batch_size=8, eval_batch_size=50)
            make_trainer(tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(Recorder(), data)
    finally:
        logger.removeHandler(caplog.handler)
    lines = sorted({record.message for record in caplog.records if "samples in" in record.message})
    assert lines == [
        f"train: 57 samples in 6 shards ({shards}); 7 batches of 8 on each of 1 ranks, 2 workers each; "
        "1 samples sit out each epoch, others each time",
        f"val: 57 samples in 6 shards ({shards}); 2 batches of 50 on each of 1 ranks, 2 workers each",
    ]


# --- broken records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_counted_and_the_rest_survives(tmp_path: Path, workers: int) -> None:
    folder = make_shards(tmp_path / "s", 30, broken=[17])
    data = ShardDataModule(train=folder, val=folder, batch_size=10, num_workers=workers)
    module = Recorder()
    with pytest.warns(BrokenRecordWarning) as caught:
        make_trainer(tmp_path).fit(module, data)
    messages = [str(warning.message) for warning in caught if warning.category is BrokenRecordWarning]
    assert len(messages) == 2  # once for training and once for validation, however often it comes
    assert all("'k17' (test/17.jpg)" in message for message in messages)
    assert data.fault_counts == {"train": 1, "val": 1}
    assert set(module.train_keys[0]) == {f"k{i}" for i in range(30)}


def test_too_many_broken_records_stop_the_run(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 30, broken=[3, 9, 21])
    with (
        pytest.warns(BrokenRecordWarning),
        pytest.raises(TooManyBrokenRecordsError, match=r"3 of the 30 records .* max_fault_fraction=0.08 allows 2"),
    ):
        make_trainer(tmp_path).validate(
            Recorder(), ShardDataModule(val=folder, batch_size=30, max_fault_fraction=0.08), verbose=False
        )
    allowed = ShardDataModule(val=folder, batch_size=30, max_fault_fraction=0.1)
    with pytest.warns(BrokenRecordWarning):
        make_trainer(tmp_path).validate(Recorder(), allowed, verbose=False)
    assert allowed.fault_counts == {"val": 3}


def test_broken_records_are_counted_from_0_in_each_training_epoch(tmp_path: Path) -> None:
    # An epoch reads 16 of 30 samples in a row and meets one of these two; one is allowed, both would be too many.
    folder = make_shards(tmp_path / "s", 30, per_shard=30, broken=[0, 15])
    data = ShardDataModule(train=folder, batch_size=16, num_workers=0)
    with pytest.warns(BrokenRecordWarning) as caught:
        make_trainer(tmp_path, max_epochs=6).fit(Recorder(), data)
    assert len({str(warning.message) for warning in caught if warning.category is BrokenRecordWarning}) == 2
    assert data.fault_counts == {"train": 1}


# --- wrong arguments -------------------------------------------------------------------------------------------------


def test_a_missing_folder_names_the_argument_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"val=.*nowhere: no such folder; .*lightning_xai prepare .*'val'"):
        ShardDataModule(val=tmp_path / "nowhere").setup("validate")
    with pytest.raises(FileNotFoundError, match=r"train=.*no manifest.json there"):
        ShardDataModule(train=tmp_path).setup("fit")


STAGES = [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "val")]


def test_a_split_that_a_stage_needs_has_to_be_given() -> None:
    for stage, split in STAGES:
        with pytest.raises(ValueError, match=f"no {split} shards are given: set '{split}'"):
            ShardDataModule().setup(stage)


OUT_OF_RANGE: list[dict[str, Any]] = [
    {"batch_size": 0},
    {"eval_batch_size": 0},
    {"num_workers": -1},
    {"shuffle_buffer": -1},
    {"seed": -1},
    {"captions_per_image": 0},
    {"max_fault_fraction": 1.5},
]


def test_options_out_of_range_are_errors_that_name_them() -> None:
    for options in OUT_OF_RANGE:
        with pytest.raises(ValueError, match=next(iter(options))):
            ShardDataModule(**options)


def test_label_names_are_those_of_the_evaluation_split(tmp_path: Path, shards: Path) -> None:
    bare = (Sample(s.key, s.image, s.size, s.captions, s.regions[:1]) for s in make_samples(4))
    write_shards(bare, tmp_path / "dogs", name="dogs", progress=False)
    assert ShardDataModule(val=shards, test=tmp_path / "dogs").label_names == ("cat", "dog")
    assert ShardDataModule(test=tmp_path / "dogs").label_names == ("dog",)


def test_no_more_workers_are_started_than_there_are_batches(shards: Path, tokenizer: CaptionTokenizer) -> None:
    data = ShardDataModule(train=shards, val=shards, batch_size=28, eval_batch_size=57, num_workers=6)
    data.bind(TRANSFORM, tokenizer)
    validation = data.val_dataloader()
    assert isinstance(validation, DataLoader)
    assert (data.train_dataloader().num_workers, validation.num_workers) == (2, 1)


# --- the embedded world ----------------------------------------------------------------------------------------------


def test_shapes_are_made_on_first_use_and_kept(tmp_path: Path) -> None:
    def data() -> ShapesDataModule:
        return ShapesDataModule(root=tmp_path / "shapes", train_samples=40, val_samples=12, batch_size=8, num_workers=0)

    module = Recorder()
    make_trainer(tmp_path, max_epochs=1).fit(module, data())
    assert len(module.train_keys[0]) == 40
    assert len(module.val_keys[-1]) == 12
    manifest = tmp_path / "shapes" / "train" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    make_trainer(tmp_path).test(module, data(), verbose=False)
    assert manifest.stat().st_mtime_ns == written
