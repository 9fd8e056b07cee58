from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import torch

from lightning_xai.data.fault_counter import BrokenRecordWarning, FaultCounter, TooManyBrokenRecordsError
from lightning_xai.data.faults import Fault
from lightning_xai.data.shard_store import LocalStore
from lightning_xai.data.shards import Manifest, ShardEntry

pytestmark = pytest.mark.filterwarnings("ignore::lightning_xai.data.fault_counter.BrokenRecordWarning")


def counter_of(fraction: float, records: int = 100) -> FaultCounter:
    entries = tuple(ShardEntry(f"{name}.tar", size, 1, "0" * 64) for name, size in (("a", 10), ("b", 1), ("c", 89)))
    return FaultCounter("val", LocalStore(Path("data")), Manifest("made", entries, (), {}, 100), records, fraction)


def faults(*indices: int) -> list[Fault]:
    return [Fault(index, "damaged image", f"torn {index}") for index in indices]


def test_a_fault_belongs_to_the_shard_that_its_index_lies_in() -> None:
    counter = counter_of(1)
    counter.add(faults(0, 9, 10, 11, 99), read=7)
    assert counter.counts == {
        ("a.tar", "damaged image"): 2,
        ("b.tar", "damaged image"): 1,
        ("c.tar", "damaged image"): 2,
    }
    assert counter.read == 7


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, 0), (0.001, 1), (0.01, 1), (0.029, 2), (0.05, 5)])
def test_it_raises_as_soon_as_no_other_rank_can_make_the_share_right_again(fraction: float, allowed: int) -> None:
    counter = counter_of(fraction)
    for index in range(allowed):
        counter.add(faults(index), read=1)
    with pytest.raises(
        TooManyBrokenRecordsError, match=rf"val \(data\): {allowed + 1} of the 100 .* allows {allowed}\."
    ):
        counter.add(faults(50), read=1)


def test_the_message_names_the_shards_worst_first() -> None:
    counter = counter_of(0.03)
    with pytest.raises(TooManyBrokenRecordsError, match=r"in c\.tar \(3 damaged image\), a\.tar \(1 damaged image\)\."):
        counter.add(faults(3, 30, 31, 32), read=4)


def test_the_sum_of_all_ranks_is_measured_by_what_they_have_read() -> None:
    counter = counter_of(0.1)
    others = counter_of(0.1)
    for one in (counter, others):
        one.add(faults(1, 2), read=20)
    both = counter.counts + others.counts
    counter.check_sum(both, 40)
    with pytest.raises(TooManyBrokenRecordsError, match=r"4 of 39 records are broken, .* allows 3"):
        counter.check_sum(both, 39)


def test_each_pass_begins_from_nothing_and_batches_of_one_epoch_add_up() -> None:
    counter = counter_of(1)
    for epoch, index, expected in ((0, 1, 1), (0, 2, 2), (1, 3, 1), (1, 4, 2)):
        counter.continue_in(epoch)
        counter.add(faults(index), read=5)
        assert counter.counts.total() == expected
    assert counter.read == 10
    counter.continue_in(2)
    assert (counter.counts.total(), counter.read) == (0, 0)
    counter.add(faults(1), read=1)
    counter.begin()
    assert (counter.counts.total(), counter.read) == (0, 0)


def test_a_state_is_plain_and_goes_on_where_it_was() -> None:
    counter, other = counter_of(1), counter_of(1)
    counter.continue_in(3)
    counter.add(faults(1, 50, 51), read=8)
    file = io.BytesIO()
    torch.save(counter.state(), file)
    file.seek(0)
    other.load_state(torch.load(file, weights_only=True))
    assert (other.counts, other.read) == (counter.counts, 8)
    other.continue_in(3)
    assert other.counts == counter.counts
    other.continue_in(4)
    assert not other.counts


def test_ten_faults_are_shown_and_none_twice() -> None:
    counter = counter_of(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counter.add(faults(*range(5)), read=5)
        counter.begin()
        counter.add(faults(*range(12)), read=12)
    assert {warning.category for warning in caught} == {BrokenRecordWarning}
    texts = [str(warning.message) for warning in caught]
    assert texts[0] == "val: left out sample 0 of a.tar: torn 0"
    assert len(texts) == len(set(texts)) == 10
    assert texts[-1].endswith("torn 9; further ones are counted, not shown")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counter.add(faults(60), read=1)
