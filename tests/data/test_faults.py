from __future__ import annotations

import pickle
from collections import Counter

from lightning_xai.data.faults import DAMAGED_IMAGE, Fault, FaultCounts, fault_table, worst_shards
from lightning_xai.data.sample import RecordError


def counts_of(shards: int) -> FaultCounts:
    """Shard i has i + 1 faults, half of them of another kind."""
    return Counter(
        {(f"s{i:02}.tar", kind): n for i in range(shards) for kind, n in (("a", i // 2 + 1), ("b", i - i // 2))}
    )


def test_the_worst_ten_shards_are_named_worst_first() -> None:
    lines = fault_table(counts_of(12)).splitlines()
    shards = [line.split()[0] for line in lines[1:-1] if not line.startswith(" ")]
    assert shards == [f"s{i:02}.tar" for i in range(11, 1, -1)]
    assert lines[-1] == "and 2 more shards with 3 faults"
    text = worst_shards(counts_of(12))
    assert text.startswith("s11.tar (6 a, 6 b), s10.tar (6 a, 5 b), ")
    assert text.endswith("s02.tar (2 a, 1 b) and 2 more shards")


def test_ten_shards_are_all_that_are_named() -> None:
    assert "more" not in fault_table(counts_of(10)) + worst_shards(counts_of(10))
    assert fault_table(counts_of(11)).endswith("and 1 more shard with 1 fault")
    assert worst_shards(counts_of(11)).endswith(" and 1 more shard")


def test_equally_bad_shards_come_by_name_whatever_the_order_of_counting() -> None:
    counts = {("b", "x"): 1, ("a", "x"): 1}
    assert worst_shards(counts) == worst_shards(dict(reversed(counts.items()))) == "a (1 x), b (1 x)"


def test_faults_and_record_errors_keep_their_kind_on_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(RecordError("torn", kind=DAMAGED_IMAGE)))
    assert (str(error), error.kind) == ("torn", DAMAGED_IMAGE)
    fault = Fault(3, DAMAGED_IMAGE, "torn")
    assert pickle.loads(pickle.dumps(fault)) == fault
