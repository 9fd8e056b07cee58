"""What all means have in common: the same to the last bit however their items come, and untouched by precision."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor
from torchmetrics import Metric

from lightning_xai.metrics.confidence import ConfidenceMetric
from lightning_xai.metrics.exact_means import ExactMeans, to_fixed
from lightning_xai.metrics.hard_negatives import HardNegativesMetric
from lightning_xai.metrics.localization import LocalizationMetric
from lightning_xai.metrics.other_objects import OtherObjectsMetric

ITEMS = 101
Columns = dict[str, Tensor]


def random_values(seed: int, missing: bool = True) -> Tensor:
    """[N] float64 of all magnitudes and both signs, some of them missing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ITEMS, generator=generator, dtype=torch.float64)
    values = values * 10 ** torch.randint(-6, 4, (ITEMS,), generator=generator)
    values[torch.rand(ITEMS, generator=generator) < (0.2 if missing else 0)] = math.nan
    return values


class Plain(ExactMeans):
    """ExactMeans itself, fed by columns as its descendants are."""

    def __init__(self) -> None:
        super().__init__(("first", "second"))

    def update(self, first: Tensor, second: Tensor) -> None:  # type: ignore[override]
        super().update({"second": second, "first": first})


MAKERS: dict[str, tuple[Callable[[], Metric], Columns]] = {
    "plain": (Plain, {"first": random_values(0), "second": random_values(1)}),
    "confidence": (
        ConfidenceMetric,
        {
            "original": random_values(2, missing=False),
            "image_kept": random_values(3, missing=False),
            "text_kept": random_values(4),
        },
    ),
    "localization": (LocalizationMetric, {"iou": random_values(5).abs() / 1e4}),
    "other_objects": (
        OtherObjectsMetric,
        {"own": random_values(6, missing=False), "other": random_values(7, missing=False)},
    ),
    "hard_negatives": (HardNegativesMetric, {"delta": random_values(8, missing=False)}),
}
ALL = pytest.mark.parametrize("name", MAKERS)


def filled(name: str, *parts: Any) -> Metric:
    """A metric after an update with each of these parts of its columns; with everything at once by default."""
    make, columns = MAKERS[name]
    metric = make()
    for part in parts or (slice(None),):
        metric.update(**{column: values[part] for column, values in columns.items()})
    return metric


def results_of_own_share() -> dict[str, list[str]]:
    """A third of the items in one piece here, the others one by one and backwards there; then all on the second."""
    results: dict[str, list[str]] = {}
    for name in MAKERS:
        if dist.get_rank() == 0:
            uneven, one_sided = filled(name, slice(ITEMS // 3)), filled(name, slice(0))
        else:
            uneven, one_sided = filled(name, *([row] for row in reversed(range(ITEMS // 3, ITEMS)))), filled(name)
        results[name] = [repr(uneven.compute()), repr(one_sided.compute())]
    return results


def test_two_processes_give_the_results_of_one_to_the_last_bit() -> None:
    expected = {name: [repr(filled(name).compute())] * 2 for name in MAKERS}  # repr: floats in full, NaN equals itself
    assert run_distributed(results_of_own_share) == [expected, expected]


@ALL
def test_order_and_batches_change_no_bit(name: str) -> None:
    order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(9)).tolist()
    shuffled = [order[start : start + 7] for start in range(0, ITEMS, 7)]
    assert repr(filled(name, *shuffled).compute()) == repr(filled(name).compute())


def test_means_are_the_exact_ones_of_numbers_rounded_to_a_millionth_of_a_millionth() -> None:
    columns = MAKERS["plain"][1]
    means = filled("plain").compute()
    assert list(means) == ["first", "second"]
    for name, values in columns.items():
        there = [value for value in values.tolist() if not math.isnan(value)]
        assert 50 < len(there) < ITEMS
        exact = sum(Fraction(round(value * 2**40), 2**40) for value in there) / len(there)
        assert means[name] == float(exact)
        assert means[name] == pytest.approx(math.fsum(there) / len(there), abs=1e-12)


def test_fixed_point_rounds_to_the_nearest_and_takes_any_precision() -> None:
    step = 2.0**-40
    values = torch.tensor([0.0, step, -step, 1.4 * step, 1.6 * step, -1.6 * step, 1.0], dtype=torch.float64)
    assert to_fixed(values).tolist() == [0, 1, -1, 1, 2, -2, 2**40]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert to_fixed(torch.tensor([0.375, -3.0], dtype=dtype)).tolist() == [3 * 2**37, -3 * 2**40]


def test_eight_million_ones_do_not_overflow() -> None:
    metric = ExactMeans(["one"])
    for _ in range(8):
        metric.update({"one": torch.ones(1_000_000)})
    assert metric.compute() == {"one": 1.0}


@ALL
def test_nothing_has_the_same_keys_and_nan(name: str) -> None:
    empty = filled(name, slice(0)).compute()
    assert list(empty) == list(filled(name).compute())
    assert all(math.isnan(value) for value in empty.values())


@ALL
def test_a_reset_forgets_everything_and_a_pickle_nothing(name: str) -> None:
    metric = filled(name, slice(50))
    copy = pickle.loads(pickle.dumps(metric))
    expected = repr(metric.compute())
    assert repr(copy.compute()) == expected
    metric.reset()
    for part in (slice(50, None), slice(50)):
        metric.update(**{column: values[part] for column, values in MAKERS[name][1].items()})
    assert repr(metric.compute()) == repr(filled(name).compute()) != expected


@ALL
def test_forward_gives_the_batch_and_keeps_the_whole(name: str) -> None:
    make, columns = MAKERS[name]
    metric = make()
    for part in (slice(40), slice(40, None)):
        batch = metric(**{column: values[part] for column, values in columns.items()})
        assert repr(batch) == repr(filled(name, part).compute())
    assert repr(metric.compute()) == repr(filled(name).compute())


@ALL
def test_precision_changes_of_the_model_do_not_reach_the_sums(name: str) -> None:
    make, columns = MAKERS[name]
    model = torch.nn.Module()
    model.metric = metric = make()
    for convert in (model.half, model.bfloat16, lambda: model.to(torch.bfloat16), lambda: metric.set_dtype(torch.half)):
        metric.reset()
        metric.update(**{column: values[:50] for column, values in columns.items()})
        convert()
        metric.update(**{column: values[50:] for column, values in columns.items()})
        assert repr(metric.compute()) == repr(filled(name).compute())


def test_updates_work_in_every_gradient_mode_and_keep_no_graph() -> None:
    metric, columns = Plain(), MAKERS["plain"][1]
    with torch.inference_mode():
        metric.update(**{column: values[:30] for column, values in columns.items()})
    metric.update(**{column: values[30:60].clone().requires_grad_() for column, values in columns.items()})
    with torch.no_grad():
        metric.update(**{column: values[60:] for column, values in columns.items()})
    assert repr(metric.compute()) == repr(filled("plain").compute())
    assert not metric.totals.requires_grad


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first": torch.ones(2)}, r"expected first, second, each \[N\].*\{'first': \[2\]\}"),
        ({"first": torch.ones(2), "other": torch.ones(2)}, "'other'"),
        ({"first": torch.ones(2), "second": torch.ones(3)}, r"\[2\].*\[3\]"),
        ({"first": torch.ones(2), "second": torch.ones(2, 1)}, r"\[2, 1\]"),
        ({"first": torch.ones(2, 2), "second": torch.ones(2, 2)}, r"\[2, 2\]"),
        ({"first": torch.tensor(1.0), "second": torch.tensor(1.0)}, r"each \[N\]"),
        ({"first": torch.ones(2), "second": torch.tensor([1.0, -torch.inf])}, "finite.*inf"),
        ({"first": torch.ones(2), "second": torch.tensor([1.0, -(2.0**20)])}, "below 2.20; got up to 1048576"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_and_nothing_is_added(values: Columns, message: str) -> None:
    metric = ExactMeans(["first", "second"])
    metric.update({"first": torch.ones(2), "second": torch.ones(2)})
    with pytest.raises(ValueError, match=message):
        metric.update(values)
    assert metric.compute() == {"first": 1.0, "second": 1.0}
    assert metric.totals.shape == metric.items.shape == (2,)
