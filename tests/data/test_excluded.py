from __future__ import annotations

import io
import pickle
import warnings
from collections import Counter

import pytest
import torch

from lightning_xai.data.excluded import (
    CORRUPT_IMAGE,
    BrokenRecordWarning,
    ExcludedByShard,
    Fault,
    FaultCounter,
    TooManyBrokenRecordsError,
    shard_table,
    worst_shards,
)
from lightning_xai.data.sample import RecordError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_xai.data.excluded.BrokenRecordWarning")


def counter_of(fraction: float, records: int = 100) -> FaultCounter:
    return FaultCounter("val", "data", {"a.tar": 10, "b.tar": 1, "c.tar": 89}, records, fraction)


def faults(*indices: int) -> list[Fault]:
    return [Fault(index, "corrupt image", f"torn {index}") for index in indices]


def test_a_fault_belongs_to_the_shard_that_its_index_lies_in() -> None:
    counter = counter_of(1)
    counter.add(faults(0, 9, 10, 11, 99), read=7)
    assert counter.counts == {
        ("a.tar", "corrupt image"): 2,
        ("b.tar", "corrupt image"): 1,
        ("c.tar", "corrupt image"): 2,
    }
    assert counter.read == 7


FRACTIONS = [(0.0, 0), (0.001, 1), (0.01, 1), (0.029, 2), (0.05, 5)]


def test_it_raises_as_soon_as_no_other_rank_can_make_the_share_right_again() -> None:
    for fraction, allowed in FRACTIONS:
        counter = counter_of(fraction)
        for index in range(allowed):
            counter.add(faults(index), read=1)
        with pytest.raises(
            TooManyBrokenRecordsError, match=rf"val \(data\): {allowed + 1} of the 100 .* allows {allowed}\."
        ):
            counter.add(faults(50), read=1)


def test_the_message_names_the_shards_worst_first() -> None:
    counter = counter_of(0.03)
    with pytest.raises(TooManyBrokenRecordsError, match=r"in c\.tar \(3 corrupt image\), a\.tar \(1 corrupt image\)\."):
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


def test_each_pass_begins_from_nothing_and_batches_of_one_pass_add_up() -> None:
    counter = counter_of(1)
    for _ in range(2):
        counter.begin()
        assert (counter.counts.total(), counter.read) == (0, 0)
        for index in (1, 2):
            counter.add(faults(index), read=5)
        assert (counter.counts.total(), counter.read) == (2, 10)


def test_a_state_is_plain_and_goes_on_where_it_was() -> None:
    counter, other = counter_of(1), counter_of(1)
    counter.add(faults(1, 50, 51), read=8)
    file = io.BytesIO()
    torch.save(counter.state(), file)
    file.seek(0)
    other.load_state(torch.load(file, weights_only=True))
    assert (other.counts, other.read) == (counter.counts, 8)


def test_ten_faults_are_shown_and_none_twice() -> None:
    counter = counter_of(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counter.add(faults(*range(5)), read=5)
        counter.begin()
        counter.add(faults(*range(12)), read=12)
    assert {warning.category for warning in caught} == {BrokenRecordWarning}
    texts = [str(warning.message) for warning in caught]
    assert texts[0] == "val: excluded sample 0 of a.tar: torn 0"
    assert len(texts) == len(set(texts)) == 10
    assert texts[-1].endswith("torn 9; further ones are counted, not shown")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counter.add(faults(60), read=1)


def counts_of(shards: int) -> ExcludedByShard:
    """Shard i has i + 1 faults, half of them of another kind."""
    return Counter(
        {(f"s{i:02}.tar", kind): n for i in range(shards) for kind, n in (("a", i // 2 + 1), ("b", i - i // 2))}
    )


def test_the_worst_ten_shards_are_named_worst_first() -> None:
    lines = shard_table(counts_of(12)).splitlines()
    shards = [line.split()[0] for line in lines[1:-1] if not line.startswith(" ")]
    assert shards == [f"s{i:02}.tar" for i in range(11, 1, -1)]
    assert lines[-1] == "and 2 more shards with 3 faults"
    text = worst_shards(counts_of(12))
    assert text.startswith("s11.tar (6 a, 6 b), s10.tar (6 a, 5 b), ")
    assert text.endswith("s02.tar (2 a, 1 b) and 2 more shards")


def test_ten_shards_are_all_that_are_named() -> None:
    assert "more" not in shard_table(counts_of(10)) + worst_shards(counts_of(10))
    assert shard_table(counts_of(11)).endswith("and 1 more shard with 1 fault")
    assert worst_shards(counts_of(11)).endswith(" and 1 more shard")


def test_equally_bad_shards_come_by_name_whatever_the_order_of_counting() -> None:
    counts = Counter({("b", "x"): 1, ("a", "x"): 1})
    assert worst_shards(counts) == worst_shards(Counter(dict(reversed(counts.items())))) == "a (1 x), b (1 x)"


def test_faults_and_record_errors_keep_their_kind_on_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(RecordError("torn", kind=CORRUPT_IMAGE)))
    assert (str(error), error.kind) == ("torn", CORRUPT_IMAGE)
    fault = Fault(3, CORRUPT_IMAGE, "torn")
    assert pickle.loads(pickle.dumps(fault)) == fault
