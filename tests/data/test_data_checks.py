"""What the data module refuses before a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from captioned_shards import make_shards
from damaged_shards import Reader, damage_image
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from quiet_trainer import quiet_trainer

from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.shards import ShardError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(lightning|torch)", "ignore::FutureWarning:torch")


class CountingReader(Reader):
    """Counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.batches += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.batches += 1


def data_of(folder: Path, **options: Any) -> ShardDataModule:
    defaults: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "shuffle_buffer": 5}
    return ShardDataModule(train=folder, val=folder, **(defaults | options))


# --- going on from a checkpoint ---


@pytest.fixture
def checkpoint(tmp_path: Path, shards: Path) -> Path:
    """Written in the middle of an epoch of 14 batches."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = quiet_trainer(tmp_path, saver, enable_checkpointing=True, limit_val_batches=0)
    trainer.fit(CountingReader(), data_of(shards))
    return tmp_path / "step=5.ckpt"


def go_on(checkpoint: Path, data: ShardDataModule) -> CountingReader:
    module = CountingReader()
    quiet_trainer(checkpoint.parent, limit_val_batches=0).fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module


OTHER_BATCHES: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 5}, "batch_size was 4 and is 5"),
    ({"seed": 3}, "seed was 0 and is 3"),
    ({"shuffle_buffer": 6}, "shuffle_buffer was 5 and is 6"),
    ({"num_workers": 2}, "num_workers was 1 and is 2"),
    ({"captions_per_image": 1}, "captions_per_image was None and is 1"),
    ({"seed": 3, "num_workers": 2}, "seed was 0 and is 3; num_workers was 1 and is 2"),
]


def test_a_run_does_not_go_on_with_other_batches(checkpoint: Path, shards: Path) -> None:
    for options, change in OTHER_BATCHES:
        data = data_of(shards, **options)
        module = CountingReader()
        with pytest.raises(ValueError, match="cannot go on from this checkpoint") as caught:
            quiet_trainer(checkpoint.parent).fit(module, data, ckpt_path=checkpoint, weights_only=True)
        assert f"would hold other samples: {change}. Restore the former values; or, to start a new run" in str(
            caught.value
        )
        assert f"--model.init_args.model={checkpoint} --model.init_args.pretrained=null" in str(caught.value)
        assert module.batches == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1, "persistent_workers": True},  # the same order as without a worker
        {"eval_batch_size": 3, "max_fault_fraction": 0.5, "swap_objects": True},
    ],
)
def test_a_run_goes_on_where_the_batches_are_the_same(checkpoint: Path, shards: Path, options: dict[str, Any]) -> None:
    assert go_on(checkpoint, data_of(shards, **options)).batches == 14 - 5


def test_a_checkpoint_of_a_version_that_named_the_world_size_otherwise_goes_on(checkpoint: Path, shards: Path) -> None:
    record = torch.load(checkpoint, weights_only=True)
    plan = record["ShardDataModule"]["plan"]
    plan["world"] = plan.pop("world_size")
    torch.save(record, checkpoint)
    assert go_on(checkpoint, data_of(shards)).batches == 14 - 5


def test_changed_shards_are_noticed(checkpoint: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", 57, broken=[2])
    with pytest.raises(ValueError, match="the shard list or the content of a shard has changed") as caught:
        go_on(checkpoint, data_of(other))
    assert "samples was" not in str(caught.value)
    assert "fingerprint was " in str(caught.value)
    fewer = make_shards(tmp_path / "fewer", 47)
    with pytest.raises(ValueError, match="has changed since the checkpoint was written; samples was 57 and is 47"):
        go_on(checkpoint, data_of(fewer))


def test_evaluation_takes_a_checkpoint_of_any_training_data(checkpoint: Path, one_shard: Path, tmp_path: Path) -> None:
    learned = torch.load(checkpoint, weights_only=True)["state_dict"]["weight"]
    assert not torch.equal(learned, CountingReader().weight)
    for verb, data in (
        ("validate", data_of(one_shard, batch_size=3)),
        ("test", ShardDataModule(test=one_shard, batch_size=3, num_workers=0)),
    ):
        reader = CountingReader()
        getattr(quiet_trainer(tmp_path), verb)(reader, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        assert torch.equal(reader.weight, learned), verb


def go_on_with_others(checkpoint: str, shards: str, out: str) -> str:
    trainer = quiet_trainer(Path(out), **join_lightning())
    try:
        trainer.fit(CountingReader(), data_of(Path(shards)), ckpt_path=checkpoint, weights_only=True)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_another_number_of_processes_is_refused_by_all(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    for told in run_distributed(go_on_with_others, str(checkpoint), str(shards), str(tmp_path)):
        assert "would hold other samples: world_size was 1 and is 2. Restore" in told


# --- before a run ---


def test_too_few_samples_are_refused_before_anything_runs(tmp_path: Path, one_shard: Path) -> None:
    module = CountingReader()
    with pytest.raises(ValueError, match=r"23 samples do not fill one batch of 24 on each of 1 ranks; .*at most 23"):
        quiet_trainer(tmp_path).fit(module, data_of(one_shard, batch_size=24))
    assert module.batches == 0
    data_of(one_shard, batch_size=24).setup("validate")


def test_with_more_ranks_than_samples_no_batch_size_is_advised(tmp_path: Path) -> None:
    data = data_of(make_shards(tmp_path / "s", 3), batch_size=1)
    data.trainer = quiet_trainer(tmp_path, devices=4, strategy="ddp")
    with pytest.raises(ValueError, match="3 samples do not fill one batch of 1 on each of 4 ranks; use fewer devices"):
        data.setup("fit")


@pytest.fixture
def two_changed(tmp_path: Path) -> Path:
    folder = make_shards(tmp_path / "changed", 50)
    for shard in (1, 4):
        damage_image(folder, shard, 0)
    return folder


def test_checksums_are_compared_where_asked(two_changed: Path, tmp_path: Path) -> None:
    data_of(two_changed).setup("fit")
    told = r"2 of 5 shards are not as manifest\.json says: shard-000001\.tar has the SHA-256 .*; shard-000004\.tar has "
    module = CountingReader()
    with pytest.raises(ShardError, match=told):
        quiet_trainer(tmp_path).fit(module, data_of(two_changed, verify=True))
    assert module.batches == 0
    sound = make_shards(tmp_path / "sound", 20)
    data_of(sound, verify=True).setup("fit")


def test_checksums_are_compared_once(tmp_path: Path) -> None:
    data = data_of(make_shards(tmp_path / "s", 20), verify=True)
    data.setup("validate")
    damage_image(tmp_path / "s", 0, 0)
    data.setup("validate")
    with pytest.raises(ShardError, match="1 of 2 shards"):
        data.setup("fit")  # the training shards, of which nothing was compared yet


def verify_on_this_rank(folder: str, out: str) -> str:
    trainer = quiet_trainer(Path(out), **join_lightning())
    try:
        trainer.validate(CountingReader(), data_of(Path(folder), verify=True), verbose=False)
    except ShardError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_all_ranks_report_what_each_of_them_has_found(two_changed: Path, tmp_path: Path) -> None:
    first, second = run_distributed(verify_on_this_rank, str(two_changed), str(tmp_path))
    assert first == second
    assert "2 of 5 shards" in first
    sound = make_shards(tmp_path / "sound", 20)
    assert run_distributed(verify_on_this_rank, str(sound), str(tmp_path)) == ["", ""]
