"""Hard negatives: delta, and the share of negative ones (section 4.4)."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from lightning_xai.metrics.hard_negatives import HardNegativesMetric, attribution_difference


def test_delta_is_what_the_replacement_has_more_than_the_true_words() -> None:
    negative, positive = torch.tensor([-0.25, 0.5, 0.5]), torch.tensor([0.5, 0.25, 0.5])
    assert attribution_difference(negative, positive).tolist() == [-0.75, 0.25, 0.0]


def test_means_agree_with_plain_python() -> None:
    delta = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 50
    metric = HardNegativesMetric()
    metric.update(delta)
    found = metric.compute()
    assert found["delta_negative"] == sum(value < 0 for value in delta.tolist()) / 60
    assert found["delta_mean"] == pytest.approx(statistics.fmean(delta.tolist()), abs=1e-12)


def test_no_difference_is_not_negative() -> None:
    metric = HardNegativesMetric()
    metric.update(torch.tensor([0.0, -0.0, -1e-30, 1.0]))
    assert metric.compute() == {"delta_negative": 0.25, "delta_mean": 0.25}


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_delta_that_is_not_finite_is_refused(broken: float) -> None:
    metric = HardNegativesMetric()
    with pytest.raises(ValueError, match="delta has to be finite"):
        metric.update(torch.tensor([0.5, broken]))
    assert len(metric.rows()) == 0
