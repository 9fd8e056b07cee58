"""Broken records are counted, reported and limited, at any number of workers and processes, also when resumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from captioned_shards import make_shards
from damaged_shards import DAMAGE, Reader, damage_image, make_damaged, shard_path
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from quiet_trainer import quiet_trainer

from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.excluded import ExcludedByShard, TooManyBrokenRecordsError
from lightning_xai.training.data_faults import DataFaults

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(lightning|torch)", "ignore::FutureWarning:torch")


def trainer_in(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    return quiet_trainer(folder, DataFaults(), *callbacks, **options)


class Watcher(Callback):
    """Keeps what all ranks have counted in each epoch, and what this one has."""

    def __init__(self) -> None:
        self.counts: list[ExcludedByShard] = []
        self.own: list[int] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined] # Lightning leaves it undeclared
        self.counts.append(data.gather_faults("train"))
        self.own.append(data.fault_counts["train"])


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return make_damaged(tmp_path / "damaged")


def data_of(folder: Path, **options: Any) -> ShardDataModule:
    defaults: dict[str, Any] = {"batch_size": 5, "eval_batch_size": 7, "num_workers": 0, "max_fault_fraction": 0.5}
    return ShardDataModule(train=folder, val=folder, test=folder, **(defaults | options))


def data_that_vanish(folder: Path, **options: Any) -> ShardDataModule:
    """Of a folder whose last shard is deleted when the manifests have been checked, as it may be behind setup."""
    data = data_of(folder, **options)
    for split in ("train", "val", "test"):
        data.manifest(split)
    if dist.is_initialized():
        dist.barrier()
    shard_path(folder, 5).unlink(missing_ok=True)
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_damage_is_counted_by_shard(
    tmp_path: Path, damaged: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data, watcher = data_that_vanish(damaged, num_workers=workers), Watcher()
    trainer = trainer_in(tmp_path, watcher, max_epochs=2)
    trainer.fit(Reader(), data)
    assert watcher.counts == [DAMAGE, DAMAGE]
    assert data.gather_faults("val") == DAMAGE
    assert trainer.callback_metrics["train/broken_records"] == trainer.callback_metrics["val/broken_records"] == 17
    printed = capsys.readouterr().out
    assert "Broken records in train of epoch 0, left out:\nshard             fault " in printed
    assert "Broken records in train of epoch 1" in printed
    assert printed.count("Broken records in val, ") == 2  # not for the batches that only try out the code
    rows = [line.split("  ") for line in printed.partition("val, left out:\n")[2].splitlines()[1:6]]
    assert [(row[0], row[1].strip(), row[-1].strip()) for row in rows] == [
        ("shard-000005.tar", "missing shard", "10"),
        ("shard-000004.tar", "unreadable shard", "4"),
        ("shard-000001.tar", "corrupt image", "1"),
        ("shard-000002.tar", "member without its pair", "1"),
        ("shard-000003.tar", "duplicate key", "1"),
    ]


def test_testing_logs_its_own_number_and_predicting_prints_each_pass(
    tmp_path: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, trainer = data_that_vanish(damaged), trainer_in(tmp_path)
    trainer.test(Reader(), data, verbose=False)
    assert trainer.callback_metrics["test/broken_records"] == 17
    assert not any(name.startswith(("val/", "train/")) for name in trainer.callback_metrics)
    for _ in range(2):
        trainer.predict(Reader(), data)
        assert data.fault_counts == {"test": 17}
        assert "Broken records in test, left out:" in capsys.readouterr().out


def test_sound_data_log_zero_and_show_nothing(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(Reader(), ShardDataModule(train=shards, val=shards, batch_size=5, num_workers=0))
    assert trainer.callback_metrics["train/broken_records"] == trainer.callback_metrics["val/broken_records"] == 0
    assert capsys.readouterr().out == ""


def test_what_comes_back_between_two_validations_is_no_fault_any_more(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 30)
    whole = shard_path(folder, 1).read_bytes()
    damage_image(folder, 1, 3)
    data, trainer = data_of(folder), trainer_in(tmp_path)
    for broken in (1, 0):
        trainer.validate(Reader(), data, verbose=False)
        assert trainer.callback_metrics["val/broken_records"] == broken
        shard_path(folder, 1).write_bytes(whole)


# --- too many --------------------------------------------------------------------------------------------------------


def test_too_many_in_what_a_short_epoch_reads_stop_the_run(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 60)
    for record in range(4):
        damage_image(folder, 0, record)
    trainer = trainer_in(tmp_path, limit_val_batches=1)
    message = (
        r"val .*: 4 of 10 records are broken, .*=0\.1 allows 1\. They are in shard-000000\.tar \(4 corrupt image\)\."
    )
    with pytest.raises(TooManyBrokenRecordsError, match=message):
        trainer.validate(Reader(), data_of(folder, eval_batch_size=10, max_fault_fraction=0.1), verbose=False)
    trainer_in(tmp_path).validate(Reader(), data_of(folder, max_fault_fraction=0.1), verbose=False)


def too_many_together(folder: str, fraction: float) -> list[Any]:
    """Validation over this and the other ranks; the error's text, and how many broken records this one has met."""
    data = data_of(Path(folder), max_fault_fraction=fraction)
    trainer = trainer_in(Path(folder), **join_lightning())
    try:
        trainer.validate(Reader(), data, verbose=False)
    except TooManyBrokenRecordsError as error:
        return [str(error), data.fault_counts["val"]]
    return ["", data.fault_counts["val"]]


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_fail_with_one_message_where_only_their_sum_is_too_much(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 60)  # 3 broken ones are allowed
    for shard, record in ((0, 1), (1, 2), (4, 3)):
        damage_image(folder, shard, record)
    assert run_distributed(too_many_together, str(folder), 0.05) == [["", 2], ["", 1]]
    damage_image(folder, 4, 7)
    first, second = run_distributed(too_many_together, str(folder), 0.05)
    assert first == second
    assert first[1] == 2
    message = "4 of 60 records are broken, and max_fault_fraction=0.05 allows 3. They are in shard-000004.tar (2 "
    assert message in first[0]


@pytest.mark.slow
@pytest.mark.distributed
def test_padding_is_no_record_that_was_read(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "s", 21)  # 0.091 of them are one, and would be two of 22
    for shard in (0, 2):
        damage_image(folder, shard, 0)
    for message, _ in run_distributed(too_many_together, str(folder), 0.091):
        assert "2 of 21 records are broken, and max_fault_fraction=0.091 allows 1." in message


# --- several processes -----------------------------------------------------------------------------------------------


def count_on_this_rank(folder: str, out: str, workers: int) -> dict[str, Any]:
    data, watcher = data_that_vanish(Path(folder), num_workers=workers), Watcher()
    trainer = trainer_in(Path(out), watcher, **join_lightning())
    trainer.fit(Reader(), data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "broken" in name}
    counts = [[*key, count] for key, count in (watcher.counts[0]).items()]
    return {"logged": logged, "train": counts, "own": dict(data.fault_counts)}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_count_the_same_as_one(tmp_path: Path, damaged: Path) -> None:
    ranks = run_distributed(count_on_this_rank, str(damaged), str(tmp_path), 2)
    for rank in ranks:
        assert rank["logged"] == {"train/broken_records": 17, "val/broken_records": 17}
        assert Counter({(shard, kind): count for shard, kind, count in rank["train"]}) == DAMAGE
    assert sum(rank["own"]["train"] for rank in ranks) == sum(rank["own"]["val"] for rank in ranks) == 17
    assert ranks[0]["own"]["val"] < 17


# --- resuming --------------------------------------------------------------------------------------------------------


def stopped_and_not(folder: str, out: str, **parallel: Any) -> dict[str, Any]:
    """Three epochs at once, and the rest of them from a checkpoint in the middle of the second one."""
    runs: dict[str, Any] = {}
    saver = ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    straight = Watcher()
    trainer = trainer_in(Path(out), straight, saver, max_epochs=3, **parallel)
    trainer.fit(Reader(), data_of(Path(folder)))
    steps = int(trainer.num_training_batches)
    step = next(step for step in range(5, 99, 5) if step > steps and step % steps)
    resumed = Watcher()
    trainer = trainer_in(Path(out), resumed, max_epochs=3, **parallel)
    trainer.fit(Reader(), data_of(Path(folder)), ckpt_path=Path(out) / f"step={step}.ckpt", weights_only=True)
    runs["straight"], runs["resumed"] = straight.own[step // steps :], resumed.own
    runs["equal"] = straight.counts[step // steps :] == resumed.counts
    runs["part"] = torch.load(Path(out) / f"step={step}.ckpt", weights_only=True)["ShardDataModule"]["faults"]
    return runs


@pytest.fixture
def folder_with_faults_everywhere(tmp_path: Path) -> Path:
    folder = make_shards(tmp_path / "s", 60)
    for shard in range(5):
        for record in range(3 + shard):
            damage_image(folder, shard, record)
    return folder


def test_an_epoch_resumed_in_its_middle_counts_as_if_never_stopped(
    tmp_path: Path, folder_with_faults_everywhere: Path
) -> None:
    runs = stopped_and_not(str(folder_with_faults_everywhere), str(tmp_path))
    assert 0 < sum(count for *_, count in runs["part"][0]["counts"]) < 25
    assert runs["equal"]
    assert runs["straight"] == runs["resumed"] == [25, 25]


def resume_on_this_rank(folder: str, out: str) -> dict[str, Any]:
    return stopped_and_not(folder, out, **join_lightning())


@pytest.mark.slow
@pytest.mark.distributed
def test_each_rank_gets_its_own_counts_back(tmp_path: Path, folder_with_faults_everywhere: Path) -> None:
    ranks = run_distributed(resume_on_this_rank, str(folder_with_faults_everywhere), str(tmp_path))
    assert [rank["equal"] for rank in ranks] == [True, True]
    assert all(rank["straight"] == rank["resumed"] for rank in ranks)
    assert [sum(own) for own in zip(*(rank["resumed"] for rank in ranks), strict=True)] == [25, 25]
    assert all(sum(count for *_, count in part["counts"]) > 0 for part in ranks[0]["part"])
