from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from lightning_xai.exclusion import Exclusion
from lightning_xai.metrics.grounding import SPEC, GroundingMetric, GroundingSummary

LABELS = ("dog", "cat", "ring", "unseen")
GRID, IMAGE = (3, 4), (48, 64)  # patches of 16 pixels


def random_rows(rows: int) -> dict[str, Tensor]:
    """Rows as a validation pass makes them: some left out, some without a positive entry."""
    generator = torch.Generator().manual_seed(3)
    reason = torch.randint(len(Exclusion), (rows,), generator=generator)
    reason[torch.rand(rows, generator=generator) < 0.7] = Exclusion.MEASURED
    values = torch.rand(rows, generator=generator, dtype=torch.float64)
    values[torch.rand(rows, generator=generator) < 0.1] = math.nan
    label = torch.randint(3, (rows,), generator=generator)
    return {"gamma": values, "hit": torch.rand(rows, generator=generator) < 0.6, "label": label, "reason": reason}


def update(metric: GroundingMetric, rows: dict[str, Tensor], part: Any = slice(None)) -> None:
    metric.update(**{name: column[part] for name, column in rows.items()})


def add_nothing(metric: GroundingMetric) -> None:
    """A pass without a row; torchmetrics warns when there was no update at all."""
    update(metric, random_rows(1), slice(0))


def summaries_of_own_share(rows: dict[str, Tensor]) -> list[str]:
    """A third of the rows in one piece here, the others one by one there; all on the last rank; none at all."""
    rank, count = dist.get_rank(), len(rows["label"])
    uneven, one_sided, empty = (GroundingMetric(LABELS) for _ in range(3))
    if rank == 0:
        update(uneven, rows, slice(count // 3))
    elif rank == 1:
        for row in reversed(range(count // 3, count)):
            update(uneven, rows, [row])
    if rank == dist.get_world_size() - 1:
        update(one_sided, rows)
    # repr: floats in full, and NaN equals itself.
    return [repr(metric.compute()) for metric in (uneven, one_sided, empty)]


def test_thresholds_are_strict_and_means_are_over_pairs_not_classes() -> None:
    metric = GroundingMetric(LABELS)
    values = torch.tensor([0.5, 0.8, 0.9, 0.2], dtype=torch.float64)
    hit = torch.tensor([True, False, True, True])
    metric.update(values, hit, torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.int64))
    summary = metric.compute()
    assert summary.gamma_mean == pytest.approx(0.6, abs=1e-12)
    assert (summary.gamma_above_50, summary.gamma_above_80, summary.rho, summary.targets) == (0.5, 0.25, 0.75, 4)
    dog, cat = summary.per_class["dog"], summary.per_class["cat"]
    assert (dog.targets, dog.gamma_above_50, dog.gamma_above_80, dog.rho) == (3, 2 / 3, 1 / 3, 2 / 3)
    assert dog.gamma_std == pytest.approx(statistics.stdev([0.5, 0.8, 0.9]), abs=1e-12)
    assert (cat.targets, cat.rho) == (1, 1)
    assert cat.gamma_mean == pytest.approx(0.2, abs=1e-12)
    assert math.isnan(cat.gamma_std)
    assert summary.per_class["unseen"].targets == 0


def test_the_summary_agrees_with_a_plain_loop() -> None:
    rows = random_rows(300)
    metric = GroundingMetric(LABELS)
    update(metric, rows)
    summary = metric.compute()
    kept = (rows["reason"] == Exclusion.MEASURED) & ~rows["gamma"].isnan()
    assert 100 < int(kept.sum()) < 250
    groups: list[tuple[GroundingSummary, Tensor]] = [(summary, kept)]
    groups += [(summary.per_class[name], kept & (rows["label"] == number)) for number, name in enumerate(LABELS[:3])]
    for group, mask in groups:
        values = rows["gamma"][mask].tolist()
        assert group.targets == len(values)
        assert group.gamma_mean == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert group.gamma_std == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert group.gamma_above_50 == sum(value > 0.5 for value in values) / len(values)
        assert group.gamma_above_80 == sum(value > 0.8 for value in values) / len(values)
        assert group.rho == sum(rows["hit"][mask].tolist()) / len(values)


def test_every_row_is_counted_once_by_its_reason() -> None:
    rows = random_rows(300)
    metric = GroundingMetric(LABELS)
    update(metric, rows)
    summary = metric.compute()
    without = (rows["reason"] == Exclusion.MEASURED) & rows["gamma"].isnan()
    for why in Exclusion:
        if why is not Exclusion.MEASURED:
            extra = int(without.sum()) if why is Exclusion.NO_POSITIVE else 0
            assert summary.excluded[why.name.lower()] == int((rows["reason"] == why).sum()) + extra
            of_classes = [of.excluded[why.name.lower()] for of in summary.per_class.values()]
            assert sum(of_classes) == summary.excluded[why.name.lower()]
            if why is not Exclusion.NO_POSITIVE:
                at = rows["label"][rows["reason"] == why]
                assert of_classes == [int((at == number).sum()) for number in range(len(of_classes))]
    assert "measured" not in summary.excluded
    assert summary.targets + sum(summary.excluded.values()) == 300


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_result_of_one_to_the_last_bit_also_without_updates(size: int) -> None:
    rows = random_rows(120)
    metric = GroundingMetric(LABELS)
    update(metric, rows)
    nothing = GroundingMetric(LABELS)
    add_nothing(nothing)
    expected = [repr(metric.compute()), repr(metric.compute()), repr(nothing.compute())]
    for summaries in run_distributed(summaries_of_own_share, rows, world_size=size):
        assert summaries == expected


@pytest.mark.parametrize("labels", [LABELS, ()])
def test_an_empty_metric_has_the_same_keys_and_nan(labels: tuple[str, ...]) -> None:
    metric = GroundingMetric(labels)
    none = torch.zeros(0)
    metric.update(none, none.bool(), none.long(), none.long())
    summary = metric.compute()
    assert summary.targets == 0
    assert all(math.isnan(getattr(summary, score.name)) for score in SPEC.scores)
    assert set(summary.excluded.values()) == {0}
    assert tuple(summary.per_class) == labels


@pytest.mark.parametrize(("first", "second"), [("inference", "grad"), ("grad", "inference"), ("no_grad", "inference")])
def test_updates_work_in_every_gradient_mode(first: str, second: str) -> None:
    modes: dict[str, Any] = {"inference": torch.inference_mode, "grad": torch.enable_grad, "no_grad": torch.no_grad}
    metric, rows, expected = GroundingMetric(LABELS), random_rows(20), GroundingMetric(LABELS)
    update(expected, rows)
    with modes[first]():
        update(metric, rows, slice(10))
    with modes[second]():
        update(metric, rows, slice(10, None))
    assert repr(metric.compute()) == repr(expected.compute())
    metric.reset()
    add_nothing(metric)
    assert metric.compute().targets == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": torch.tensor([50.0, 0.5])}, r"\[0, 1\].*50.0, 0.5"),
        ({"label": torch.tensor([0, 4])}, "4 label names.*0 to 4"),
        ({"label": torch.tensor([-1, 0])}, "-1 to 0"),
        ({"reason": torch.tensor([0, 99])}, "99"),
        ({"hit": torch.tensor([True])}, r"each \[R\]"),
    ],
)
def test_rows_that_make_no_sense_are_refused_and_nothing_is_added(change: dict[str, Tensor], message: str) -> None:
    metric = GroundingMetric(LABELS)
    rows = {"gamma": torch.rand(2), "hit": torch.ones(2).bool(), "label": torch.zeros(2).long()}
    with pytest.raises(ValueError, match=message):
        metric.update(**{**rows, "reason": torch.zeros(2).long(), **change})
    assert len(metric.rows()) == 0
