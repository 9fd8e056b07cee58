from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from captioned_shards import TRANSFORM, keys, make_shards
from torch.utils.data import DataLoader

from lightning_xai.data.batch import Batch, EvaluationCollate, Record, TrainingCollate
from lightning_xai.data.dataset import Dealt, EvaluationDataset, TrainingDataset, TrainingLoader, count_passed
from lightning_xai.data.sample import stable_hash
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shards import Manifest
from lightning_xai.data.spans import CaptionTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes in total")


def training(
    folder: Path, tokenizer: CaptionTokenizer, rank: int = 0, world_size: int = 1, seed: int = 0, **options: Any
) -> TrainingDataset:
    collate = TrainingCollate(TRANSFORM, tokenizer, seed=seed)
    options = {"batch_size": 4, "shuffle_buffer": 5} | options
    return TrainingDataset(folder, Manifest.load(folder), collate, rank=rank, world_size=world_size, **options)


def evaluation(
    folder: Path, tokenizer: CaptionTokenizer, batch_size: int, rank: int = 0, world_size: int = 1
) -> EvaluationDataset:
    manifest = Manifest.load(folder)
    collate = EvaluationCollate(TRANSFORM, tokenizer, manifest.labels)
    return EvaluationDataset(folder, manifest, collate, batch_size=batch_size, rank=rank, world_size=world_size)


def load(dataset: TrainingDataset | EvaluationDataset, workers: int) -> list[Batch]:
    return list(DataLoader(dataset, batch_size=None, num_workers=workers))


# --- evaluation: every sample exactly once ---------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 1), (3, 4), (8, 4), (2, 100)])
def test_evaluation_has_every_sample_exactly_once(
    one_shard: Path, tokenizer: CaptionTokenizer, world_size: int, batch_size: int
) -> None:
    ranks = [list(evaluation(one_shard, tokenizer, batch_size, rank, world_size)) for rank in range(world_size)]
    index = [i for batches in ranks for batch in batches for i in batch.index[batch.valid].tolist()]
    assert index == list(range(23))
    assert {tuple(len(batch.valid) for batch in batches) for batches in ranks} == {
        tuple(len(batch.valid) for batch in ranks[0])
    }
    assert {len(batches) for batches in ranks} == {len(evaluation(one_shard, tokenizer, batch_size, 0, world_size))}
    padded = sum(int((~batch.valid).sum()) for batches in ranks for batch in batches)
    assert padded == -(-23 // world_size) * world_size - 23
    assert not any(batch.faults for batches in ranks for batch in batches)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "workers"),
    [(2, 3, 3), (1, 100, 2)],  # the last: more workers than batches
)
def test_evaluation_has_every_sample_exactly_once_with_workers(
    shards: Path, tokenizer: CaptionTokenizer, world_size: int, batch_size: int, workers: int
) -> None:
    counts: Counter[int] = Counter()
    for rank in range(world_size):
        dataset = evaluation(shards, tokenizer, batch_size, rank, world_size)
        batches = load(dataset, workers)
        assert len(batches) == len(dataset)
        counts.update(i for batch in batches for i in batch.index[batch.valid].tolist())
    assert counts == Counter(range(57))


def test_evaluation_keeps_captions_and_phrases_with_their_image(shards: Path, tokenizer: CaptionTokenizer) -> None:
    for batch in load(evaluation(shards, tokenizer, 10), 2):
        for caption, row in zip(batch.captions, batch.caption_image.tolist(), strict=True):
            assert caption.endswith(f" {batch.index[row]}")
        assert len(batch.captions) == 3 * len(batch.keys)
        assert sorted(batch.phrases.text) == ["cat"] * len(batch.keys) + ["dog"] * len(batch.keys)
        assert batch.label_names == ("cat", "dog")


# --- training: equal counts, no repetition, shuffled, the same again -------------------------------------------------


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (3, 5), (8, 7)])
def test_training_ranks_have_equally_many_full_batches_of_different_samples(
    shards: Path, tokenizer: CaptionTokenizer, world_size: int, batch_size: int
) -> None:
    for epoch in range(3):
        seen: list[str] = []
        for rank in range(world_size):
            dataset = training(shards, tokenizer, rank, world_size, batch_size=batch_size)
            dataset.seek(epoch)
            batches = list(dataset)
            assert len(batches) == len(dataset) == 57 // world_size // batch_size
            assert {len(batch.keys) for batch in batches} == {batch_size}
            seen += keys(batches)
        assert len(set(seen)) == len(seen)
        assert len(seen) == world_size * (57 // world_size // batch_size) * batch_size


def test_the_samples_of_an_epoch_do_not_depend_on_ranks_and_workers(shards: Path, tokenizer: CaptionTokenizer) -> None:
    # 56 of 57 samples for any of these splits
    whole = set(keys(training(shards, tokenizer, batch_size=7)))
    halves = {key for rank in range(2) for key in keys(load(training(shards, tokenizer, rank, 2, batch_size=7), 2))}
    assert halves == whole


def test_every_sample_gets_its_turn_though_some_sit_out_each_epoch(
    one_shard: Path, tokenizer: CaptionTokenizer
) -> None:
    dataset = training(one_shard, tokenizer, batch_size=8)  # 16 of 23
    seen: set[str] = set()
    for epoch in range(20):
        dataset.seek(epoch)
        epoch_keys = keys(dataset)
        assert len(epoch_keys) == len(set(epoch_keys)) == 16
        seen.update(epoch_keys)
    assert len(seen) == 23


def test_workers_outlive_a_signal_to_the_whole_job_in_the_moment_in_which_they_start() -> None:
    # Of its own process, since nothing takes back what is to be done in each child.
    script = """
import os, signal
from torch.utils.data import IterableDataset
from lightning_xai.data.dataset import ShardLoader

class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(3))

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler raises where it is not expected
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), sent))
for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    loader = ShardLoader(Numbers(), num_workers=2, multiprocessing_context="fork")
    assert sorted(loader) == [0, 0, 1, 1, 2, 2], sent
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    print(sent.name)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert run.stdout.split() == ["SIGTERM", "SIGINT", "SIGUSR1"], run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_at_a_signal_of_their_own_process_and_not_at_that_of_others(
    method: str, shards: Path, tokenizer: CaptionTokenizer
) -> None:
    options: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": method}
    loader = TrainingLoader(training(shards, tokenizer), current_epoch=lambda: 0, **options)
    assert keys(loader)
    (worker,) = loader._iterator._workers  # type: ignore[union-attr] # there is no other way to it
    subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}; kill -INT {worker.pid}"], check=True)
    worker.join(1)
    assert worker.exitcode is None
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


@pytest.mark.slow
def test_spawned_workers_give_what_the_main_process_gives(shards: Path, tokenizer: CaptionTokenizer) -> None:
    dataset = training(shards, tokenizer, batch_size=28)
    loader = TrainingLoader(dataset, current_epoch=lambda: 3, num_workers=1, multiprocessing_context="spawn")
    spawned = keys(loader)
    dataset.seek(3)
    assert spawned == keys(dataset)


# --- the loader: epochs and resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "batch_size", "shuffle_buffer"),
    [(0, 4, 5), (0, 4, 1000), (0, 4, 0), (1, 28, 10), (2, 4, 5), (3, 4, 5), (3, 28, 10)],
)
def test_resuming_at_any_batch_gives_the_batches_still_to_come(
    shards: Path, tokenizer: CaptionTokenizer, workers: int, batch_size: int, shuffle_buffer: int
) -> None:
    def make() -> TrainingLoader:
        dataset = training(shards, tokenizer, batch_size=batch_size, shuffle_buffer=shuffle_buffer)
        return TrainingLoader(dataset, current_epoch=lambda: 1, num_workers=workers)

    first = make()
    states, whole = [first.state_dict()], []
    for batch in first:
        whole.append(batch.keys)
        states.append(pickle.loads(pickle.dumps(first.state_dict())))
    assert len(whole) == 57 // batch_size
    assert states[1:] == [{"epoch": 1, "batches": count} for count in range(1, len(whole) + 1)]
    for consumed in range(1, len(whole) + 1, 1 if workers == 0 else 3):
        second = make()
        second.load_state_dict(states[consumed])
        assert [batch.keys for batch in second] == whole[consumed:]
    assert [batch.keys for batch in second] == whole  # a second pass is not resumed again


def test_persistent_workers_resume_and_go_on_with_the_next_epoch(shards: Path, tokenizer: CaptionTokenizer) -> None:
    def make(first_epoch: int) -> TrainingLoader:
        epochs = iter(range(first_epoch, 4))
        options: dict[str, Any] = {"num_workers": 2, "persistent_workers": True}
        return TrainingLoader(training(shards, tokenizer), current_epoch=lambda: next(epochs), **options)

    loader = make(0)
    whole = [[batch.keys for batch in loader] for _ in range(4)]
    for consumed in (1, 4, 13):
        resumed = make(2)
        resumed.load_state_dict({"epoch": 2, "batches": consumed})
        assert [batch.keys for batch in resumed] == whole[2][consumed:]
        assert [batch.keys for batch in resumed] == whole[3]


@pytest.mark.parametrize(("world_size", "shuffle_buffer"), [(1, 0), (1, 5), (1, 1000), (3, 2), (3, 20)])
def test_the_order_is_that_of_a_shuffle_buffer_full_of_samples(
    shards: Path, tokenizer: CaptionTokenizer, shuffle_buffer: int, world_size: int
) -> None:
    manifest = Manifest.load(shards)
    part = 57 // world_size // 4 * 4
    for seed, epoch in ((0, 0), (0, 1), (1, 2)):
        order = manifest.order(seed, epoch)
        ring = [index for index, _ in read_samples(shards, manifest, order, 0, 57)] * 2
        entry = stable_hash("entry", seed, epoch) % 57
        for rank in range(world_size):
            dataset = training(shards, tokenizer, rank, world_size, seed, shuffle_buffer=shuffle_buffer)
            dataset.seek(epoch)
            samples = iter(ring[entry + rank * part :][:part])
            if shuffle_buffer > 1:
                rng = random.Random(stable_hash("shuffle", seed, epoch, rank, 0))
                samples = wds.shuffle(shuffle_buffer, initial=shuffle_buffer, rng=rng)(samples)
            assert [index for batch in dataset for index in batch.index.tolist()] == list(samples)


def test_each_sample_still_to_come_is_read_once_and_no_more_are_held_than_the_buffer(
    shards: Path, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def noted(*args: Any) -> Iterator[Record]:
        for record in read_samples(*args):
            read.append(record[0])
            yield record

    monkeypatch.setattr("lightning_xai.data.dataset.read_samples", noted)
    dataset = training(shards, tokenizer, shuffle_buffer=9)
    for consumed in range(15):
        read.clear()
        dataset.seek(0, consumed)
        given: list[int] = []
        for batch in dataset:
            given += batch.index.tolist()
            assert len(read) - len(given) <= 9
        assert sorted(read) == sorted(given)
        assert len(given) == 4 * (14 - consumed)


def test_a_corrupt_shard_has_the_same_faults_in_a_resumed_epoch(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    folder = make_shards(tmp_path / "s", 40, per_shard=20)
    manifest = Manifest.load(folder)
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[: manifest.shards[1].bytes // 2])
    collate = TrainingCollate(TRANSFORM, tokenizer)
    dataset = TrainingDataset(folder, manifest, collate, batch_size=4, shuffle_buffer=15)
    whole = [(batch.keys, batch.faults) for batch in dataset]
    assert sum(len(faults) for _, faults in whole) > 5
    for consumed in range(11):
        dataset.seek(0, consumed)
        assert [(batch.keys, batch.faults) for batch in dataset] == whole[consumed:]


def test_a_state_of_another_epoch_changes_nothing(shards: Path, tokenizer: CaptionTokenizer) -> None:
    loader = TrainingLoader(training(shards, tokenizer), current_epoch=lambda: 1)
    whole = keys(loader)
    loader.load_state_dict(loader.state_dict() | {"epoch": 0})
    assert keys(loader) == whole


# --- training: another number of ranks within an epoch ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 3])  # two places to enter the ring
def test_ranks_that_take_over_within_an_epoch_see_each_of_its_samples_at_most_once(
    shards: Path, tokenizer: CaptionTokenizer, workers: int, epoch: int
) -> None:
    seen: list[str] = []
    dealt: list[Dealt] = []
    given = {(3, 4): 2, (1, 5): 3, (2, 2): 20}  # batches of each rank, the last as many as there are
    for (world_size, batch_size), count in given.items():
        for rank in range(world_size):
            dataset = training(shards, tokenizer, rank, world_size, batch_size=batch_size)
            passed = count_passed(57, batch_size, world_size, dealt)
            dataset.deal_rest(epoch, dealt, passed)
            dataset.seek(epoch, passed)
            batches = keys(load(dataset, workers)[:count])
            seen += batches
            # Another epoch is whole.
            dataset.seek(epoch + 1)
            assert keys(dataset) == keys(
                seeking(training(shards, tokenizer, rank, world_size, batch_size=batch_size), epoch + 1)
            )
        dealt.append(Dealt(world_size, batch_size, 5, max(1, workers), len(dataset) - passed, count))
    assert len(set(seen)) == len(seen)
    # 24 and 15 of 57 samples, and the most of the other 18 that fill a batch of 2 on each of 2 ranks.
    assert len(seen) == 24 + 15 + 16


def seeking(dataset: TrainingDataset, epoch: int) -> TrainingDataset:
    dataset.seek(epoch)
    return dataset


def test_the_rest_of_an_epoch_goes_on_where_it_was_stopped(shards: Path, tokenizer: CaptionTokenizer) -> None:
    for workers in (0, 2):
        dataset = training(shards, tokenizer, batch_size=5)
        dealt = [Dealt(2, 4, 5, 1, 7, 3)]
        passed = count_passed(57, 5, 1, dealt)
        dataset.deal_rest(1, dealt, passed)
        dataset.seek(1, passed)
        whole = [batch.keys for batch in load(dataset, workers)]
        dataset.seek(1, passed + 3)
        assert [batch.keys for batch in load(dataset, workers)] == whole[3:]
        assert passed + len(whole) == len(dataset)
