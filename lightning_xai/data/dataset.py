"""Iterable datasets over shards: they deal the samples of an epoch out to ranks, workers and batches, and resume.

Every rank gets the same number of batches, whatever the number of shards, ranks and workers, so that no rank ever waits
for a batch that does not come. The split is by sample, not by shard, and is worked out from counts alone.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import chain, islice, pairwise, repeat
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_xai.data.batch import Batch, EvaluationCollate, Record, TrainingCollate
from lightning_xai.data.excluded import FaultCounter
from lightning_xai.data.sample import stable_hash
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.data.shard_store import Place, ShardStore, open_store
from lightning_xai.data.shards import Manifest

__all__ = [
    "Dealt",
    "EvaluationDataset",
    "ShardLoader",
    "TrainingDataset",
    "TrainingLoader",
    "WholeBatchLoader",
    "count_batches",
    "count_passed",
]

_T = TypeVar("_T")
_BLOCK = 4096  # samples that are looked at together where some are passed


def count_batches(store: ShardStore, manifest: Manifest, batch_size: int, world_size: int) -> int:
    """The number of whole training batches that each of `world_size` ranks gets in an epoch.

    Raises:
        ValueError: not one.
    """
    batches = manifest.samples // world_size // batch_size
    if batches == 0:
        each = manifest.samples // world_size
        raise ValueError(
            f"{store}: {manifest.samples} samples do not fill one batch of {batch_size} on each of {world_size} "
            "ranks; "
            + (f"lower batch_size to at most {each}, " if each else "")
            + "use fewer devices, or prepare more samples"
        )
    return batches


class Dealt(NamedTuple):
    """How the beginning of an epoch was dealt out, by a run that goes on with another number of ranks.

    Attributes:
        world_size: number of ranks.
        batch_size: images per batch and rank.
        shuffle_buffer: samples that each worker held to shuffle from.
        num_workers: workers of each rank, at least 1.
        batches: of each rank, that its workers had shared among them.
        given: of these, how many each rank was given.
    """

    world_size: int
    batch_size: int
    shuffle_buffer: int
    num_workers: int
    batches: int
    given: int


def count_passed(samples: int, batch_size: int, world_size: int, dealt: Sequence[Dealt]) -> int:
    """The least number of an epoch's batches to count as passed, so that what is left fills all others."""
    batches = samples // world_size // batch_size
    left = samples - sum(part.world_size * part.batch_size * part.given for part in dealt)
    return batches - min(batches, left // world_size // batch_size)


class _Line:
    """Positions of an epoch's ring that are to be dealt out, in order; by itself all of them.

    Args:
        runs: first and last+1 position of each run of consecutive positions, in order; none of them empty.
    """

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        self._starts, stops = np.array(runs, dtype=np.int64).reshape(-1, 2).T
        self._ends = np.cumsum(stops - self._starts)  # in places of this line
        self._shifts = stops - self._ends  # from a place to its position

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def runs(self, lower: int, upper: int, skipped: Collection[int] = ()) -> Iterator[tuple[int, int]]:
        """The runs of positions at the places `lower` to `upper` (exclusive), without some of these places."""
        for skip in [*sorted(skipped), upper]:
            while lower < skip:
                run = int(np.searchsorted(self._ends, lower, side="right"))
                shift, end = int(self._shifts[run]), min(int(self._ends[run]), skip)
                yield lower + shift, end + shift
                lower = end
            lower = skip + 1

    def rest(self, dealt: Dealt, seeds: Callable[[int, int], int]) -> _Line:
        """What is left when this line has been dealt out so; `seeds` gives those of (rank, worker)."""
        runs: list[tuple[int, int]] = []
        for rank in range(dealt.world_size):
            for worker in range(dealt.num_workers):
                first, stop = _share(dealt.batches, worker, dealt.num_workers)
                order = _ShuffledOrder((stop - first) * dealt.batch_size, dealt.shuffle_buffer, seeds(rank, worker))
                order.skip(len(range(worker, dealt.given, dealt.num_workers)) * dealt.batch_size)
                span, skipped = order.to_come()
                begin = (rank * dealt.batches + first) * dealt.batch_size
                runs += self.runs(begin + span.start, begin + span.stop, [begin + place for place in skipped])
        runs += self.runs(dealt.world_size * dealt.batches * dealt.batch_size, len(self))
        return _Line(runs)


@dataclass(eq=False)
class _RankDataset(IterableDataset[Batch]):
    """The batches of one rank.

    Attributes:
        place: where the shards lie, as `open_store` takes it.
        manifest: their manifest.
        batch_size: images per batch and rank.
        rank: of this process, from 0.
        world_size: number of ranks.
    """

    place: Place
    manifest: Manifest
    collate: Any
    _: KW_ONLY
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.store = open_store(self.place)


@dataclass(eq=False)
class TrainingDataset(_RankDataset):
    """The training batches of one rank.

    In each epoch the shards are laid end to end in an order drawn from (seed, epoch), the same on all ranks, and the
    line is entered at a position drawn likewise and closed to a ring. Rank r takes the r-th contiguous part of whole
    batches; what is left over at the end of the ring, fewer than `world_size * batch_size` samples, waits for another
    epoch.
    A worker takes a contiguous part of its rank's batches and shuffles it through a buffer of undecoded samples.

    Attributes:
        collate: makes a batch; its seed is the seed of the order, too.
        shuffle_buffer: samples that a worker holds while it shuffles; 0 or 1: the order of the shards.

    Raises:
        ValueError: there is less than one batch for each rank.
    """

    collate: TrainingCollate
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._batches = count_batches(self.store, self.manifest, self.batch_size, self.world_size)
        # Epoch and first batch are in shared memory: persistent workers keep the copy of the dataset they started with.
        share: Callable[[], torch.Tensor] = torch.zeros(2, dtype=torch.int64).share_memory_
        self._position = share()
        self._dealt: tuple[Dealt, ...] = ()
        self._dealt_epoch, self._passed = -1, 0
        self._whole = self._rest = _Line([(0, self.manifest.samples)])

    def __len__(self) -> int:
        """Batches of this rank in an epoch; the same on every rank."""
        return self._batches

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Choose the epoch, and how many of its batches to skip undecoded, for iterations that start later."""
        self._position.copy_(torch.tensor([epoch, batch]))

    def deal_rest(self, epoch: int, dealt: Sequence[Dealt], passed: int) -> None:
        """Deal out in an epoch what other numbers of ranks have left of it, each after the one before.

        Args:
            epoch: which one; the others are dealt out whole.
            dealt: how its beginning was dealt out.
            passed: how many of this rank's batches count as that beginning, at least `count_passed`: batches are
                counted up to `len(self)` in this epoch, too.
        """
        line = self._whole
        for stage, part in enumerate(dealt):
            line = line.rest(part, partial(self._shuffle_seed, epoch, stage))
        self._rest, self._dealt, self._dealt_epoch, self._passed = line, tuple(dealt), epoch, passed

    def dealt(self, epoch: int) -> tuple[tuple[Dealt, ...], int]:
        """What `deal_rest` was given for an epoch, if anything: `dealt` and `passed`."""
        return (self._dealt, self._passed) if epoch == self._dealt_epoch else ((), 0)

    def _shuffle_seed(self, epoch: int, stage: int, rank: int, worker: int) -> int:
        return stable_hash("shuffle", self.collate.seed, epoch, rank, worker, *([stage] if stage else []))

    def __iter__(self) -> Iterator[Batch]:
        epoch, consumed = self._position.tolist()  # now, not at the first batch: seek() may be called in between
        return self._iterate(epoch, consumed)

    def _iterate(self, epoch: int, consumed: int) -> Iterator[Batch]:
        worker, workers = _worker()
        dealt, passed = self.dealt(epoch)
        line = self._rest if dealt else self._whole
        batches, consumed = self._batches - passed, consumed - passed
        # The loader asks its workers in turn. Resuming, worker 0 plays the one whose turn it is, so that order stays.
        worker = (worker + consumed) % workers
        first, stop = _share(batches, worker, workers)
        given = len(range(worker, consumed, workers))
        seed = self._shuffle_seed(epoch, len(dealt), self.rank, worker)
        order = _ShuffledOrder((stop - first) * self.batch_size, self.shuffle_buffer, seed)
        order.skip(given * self.batch_size)
        records = partial(self._records, epoch, line, (self.rank * batches + first) * self.batch_size, order)
        yield from wds.DataPipeline(
            records, wds.batched(self.batch_size, collation_fn=partial(self.collate, epoch=epoch))
        )

    def _records(self, epoch: int, line: _Line, begin: int, order: _ShuffledOrder) -> Iterator[Record]:
        """The samples from the place `begin` of the line on, in that order of their places."""
        span, skipped = order.to_come()
        runs = line.runs(begin + span.start, begin + span.stop, [begin + place for place in skipped])
        records = self._read(epoch, list(runs))
        places = (place for place in span if place not in skipped)
        waiting: dict[int, Record] = {}  # read, as they lie before one that was to be given out first
        for place in order:
            while place not in waiting:
                waiting[next(places)] = next(records)
            yield waiting.pop(place)

    def _read(self, epoch: int, runs: Sequence[tuple[int, int]]) -> Iterator[Record]:
        """The samples of some runs of the epoch's ring, in turn."""
        samples = self.manifest.samples
        shards = self.manifest.order(self.collate.seed, epoch)
        entry = stable_hash("entry", self.collate.seed, epoch) % samples
        for turn in (0, samples):  # the ring runs over the end of the line of shards into its beginning
            shift = entry - turn
            shifted = [(max(lower + shift, 0), min(upper + shift, samples)) for lower, upper in runs]
            here = [(lower, upper) for lower, upper in shifted if lower < upper]
            for part in _near(here):
                gaps = pairwise(part)
                passed = [position for (_, end), (begin, _) in gaps for position in range(end, begin)]
                yield from read_samples(self.store, self.manifest, shards, part[0][0], part[-1][1], passed)


def _near(runs: Sequence[tuple[int, int]], gap: int = 10_000) -> Iterator[list[tuple[int, int]]]:
    """Runs in groups: those that are worth reading in one go, with no more than `gap` positions between two of them."""
    group: list[tuple[int, int]] = []
    for run in runs:
        if group and run[0] - group[-1][1] > gap:
            yield group
            group = []
        group.append(run)
    if group:
        yield group


class _ShuffledOrder:
    """The positions from 0 to `count` (exclusive) as a shuffle buffer gives them out; iterate once.

    It is the positions that go through webdataset's shuffle, not the samples: so the order is known before a sample is
    read, and what was given out before a run stopped need not be read again.

    Args:
        count: number of positions.
        buffer: positions held to choose from; 0 or 1: in their order.
        seed: of the choice.
    """

    def __init__(self, count: int, buffer: int, seed: int) -> None:
        self._count = count
        self._drawn = 0
        self._held: set[int] = set()
        self._shuffled = self._draw()
        if buffer > 1:
            shuffle = wds.shuffle(buffer, initial=buffer, rng=random.Random(seed))
            self._shuffled = shuffle(self._shuffled)

    def __iter__(self) -> Iterator[int]:
        for position in self._shuffled:
            self._held.remove(position)
            yield position

    def skip(self, count: int) -> None:
        """Skip that many positions."""
        deque(islice(self, count), maxlen=0)

    def to_come(self) -> tuple[range, frozenset[int]]:
        """A range with the positions that were not yet given out, and those in it that were."""
        first = min(self._held, default=self._drawn)
        return range(first, self._count), frozenset(range(first, self._drawn)) - self._held

    def _draw(self) -> Iterator[int]:
        for position in range(self._count):
            self._drawn = position + 1
            self._held.add(position)
            yield position


@dataclass(eq=False)
class EvaluationDataset(_RankDataset):
    """The evaluation batches of one rank: every sample of the split exactly once over all ranks and workers.

    Rank r takes the r-th contiguous part of ceil(N / world_size) samples; a rank whose part is shorter is padded with
    invalid samples, so that all ranks have the same number of batches of the same sizes. There is no shuffling; with
    several workers the batches come in turn from contiguous parts of the rank's part: `Batch.index` gives the place.

    Attributes:
        collate: makes a batch.
        passed: [N] bool, for each sample of the split whether padding takes its place, so that it is not read; None:
            for none.
    """

    collate: EvaluationCollate
    passed: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._per_rank = -(-self.manifest.samples // self.world_size)

    def __len__(self) -> int:
        """Batches of this rank; the same on every rank."""
        return -(-self._per_rank // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        start, stop = (min(batch * self.batch_size, self._per_rank) for batch in _share(len(self), *_worker()))
        records = partial(self._records, start, stop)
        yield from wds.DataPipeline(records, wds.batched(self.batch_size, collation_fn=self.collate))

    def _records(self, start: int, stop: int) -> Iterator[Record]:
        """The samples from `start` to `stop` of this rank's part, and padding after the last sample of the split."""
        samples = self.manifest.samples
        lower, upper = (min(self.rank * self._per_rank + position, samples) for position in (start, stop))
        order = range(len(self.manifest.shards))
        padding: Record = (-1, None)
        missing = (stop - start) - (upper - lower)
        if self.passed is None:
            records: Iterator[Record] = read_samples(self.store, self.manifest, order, lower, upper)
        else:
            blocks = (range(begin, min(begin + _BLOCK, upper)) for begin in range(lower, upper, _BLOCK))
            records = chain.from_iterable(map(partial(self._block, self.passed), blocks))
        return chain(records, repeat(padding, missing))

    def _block(self, passed: NDArray[np.bool_], block: range) -> Iterator[Record]:
        """Some of the samples, with padding in place of those that are passed."""
        skipped = set((np.flatnonzero(passed[block.start : block.stop]) + block.start).tolist())
        order = range(len(self.manifest.shards))
        found = read_samples(self.store, self.manifest, order, block.start, block.stop, skipped)
        return ((-1, None) if index in skipped else next(found) for index in block)


class WholeBatchLoader(DataLoader[_T]):
    """A DataLoader of whole batches whose workers survive a signal to the whole job.

    `scancel`, preemption and Ctrl-C reach every process. A rank finishes its batch and saves, for which it needs its
    workers; it ends them itself, and that SIGTERM is the one that counts.

    Args:
        dataset: the batches.
        **options: of DataLoader.
    """

    def __init__(self, dataset: Dataset[_T], **options: Any) -> None:
        super().__init__(dataset, **(options | {"batch_size": None, "worker_init_fn": _heed_parent_only}))

    def __iter__(self) -> Iterator[_T]:  # type: ignore[override] # torch names a private class
        """The batches."""
        if self.num_workers == 0 or self._iterator is not None:  # no process is started: persistent workers are there
            return super().__iter__()
        with _held_signals(self.multiprocessing_context):  # else one could reach a worker that does not ignore it yet
            return super().__iter__()


class ShardLoader(WholeBatchLoader[Batch]):
    """A loader that counts what could not be used.

    Args:
        dataset: the batches.
        faults: counts what they could not use; begins with each iteration.
        **options: of DataLoader.
    """

    def __init__(self, dataset: IterableDataset[Batch], *, faults: FaultCounter | None = None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.faults = faults

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # as above
        """The batches."""
        if self.faults is not None:
            self.faults.begin()
        return self._count_faults(super().__iter__())

    def _count_faults(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.faults is not None:
                self.faults.add(batch.faults, int(batch.valid.sum()) + len(batch.faults))
            yield batch


class TrainingLoader(ShardLoader):
    """A loader that starts each epoch's workers with the number of that epoch, and resumes inside an epoch.

    Lightning makes an iterator before it has worked out where a checkpoint leaves off, and then keeps that iterator:
    there the epoch's number can still be one too low. So the number is read, and workers are started, when the first
    batch is asked for.

    Args:
        dataset: the batches; this loader seeks in it.
        current_epoch: gives the epoch.
        **options: of `ShardLoader`.
    """

    def __init__(self, dataset: TrainingDataset, *, current_epoch: Callable[[], int], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.current_epoch = current_epoch
        self.batches = dataset
        self._progress = (0, 0)
        self._resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # a generator, so that nothing starts too early
        """The batches of the current epoch; after `load_state_dict`, those that were still to come in its epoch."""
        epoch = self.current_epoch()
        resume, self._resume = self._resume, None
        consumed = 0
        if resume and resume[0] == epoch:
            consumed = min(resume[1], len(self.batches))
        elif self.faults is not None:
            self.faults.begin()
        self.batches.seek(epoch, consumed)
        self._progress = (epoch, consumed)
        for batch in self._count_faults(WholeBatchLoader.__iter__(self)):
            consumed += 1
            self._progress = (epoch, consumed)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches given out so far; Lightning stores it."""
        epoch, consumed = self._progress
        return {"epoch": epoch, "batches": consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that `state` counts, if the next epoch asked for is still the same."""
        self._resume = (state["epoch"], state["batches"])


@contextmanager
def _held_signals(context: Any) -> Iterator[None]:
    """Processes that are started meanwhile begin with the job's signals held back; this one gets them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Python's own helpers let signals in when they are started, or would hold them back for ever: start them before.
    method = multiprocessing.get_start_method() if context is None else context.get_start_method()
    if method == "forkserver":
        forkserver.ensure_running()
    elif method == "spawn":
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_parent_only(worker: int) -> None:
    """Ignore every signal except SIGTERM from the parent process."""
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        if hasattr(signal, "pthread_sigmask"):  # macOS does not say which process sent a signal: any SIGTERM counts
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()  # not os.getppid(): that may be a fork server, which trains nothing
    assert parent is not None
    threading.Thread(target=_end_for_parent, args=(parent.pid,), daemon=True).start()


def _end_for_parent(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _worker() -> tuple[int, int]:
    """(number of this worker, number of workers); the main process counts as the only one."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _share(batches: int, worker: int, workers: int) -> tuple[int, int]:
    """First and last+1 of a worker's contiguous share; earlier workers take the remainder, one each."""
    each, remainder = divmod(batches, workers)
    first = worker * each + min(worker, remainder)
    return first, first + each + (worker < remainder)
