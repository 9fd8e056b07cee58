"""Hard negatives: delta (section 4.4)."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_xai.metrics.base import NegativeTargets
from lightning_xai.metrics.hard_negatives import HardNegativesMetric, hard_negatives


def test_delta_is_what_the_box_gets_from_the_replacement_more_than_from_the_true_words() -> None:
    true, replacements = torch.tensor([[[0.5, 9.0]], [[0.25, 9.0]]]), torch.tensor([[[-0.25, 7.0]], [[0.5, 7.0]]])
    box = torch.tensor([[[True, False]]]).expand(2, 1, 2)
    found = {name: value.tolist() for name, value in hard_negatives(NegativeTargets(true, replacements, box)).items()}
    assert found == {"positive": [0.5, 0.25], "negative": [-0.25, 0.5], "delta": [-0.75, 0.25]}


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_delta_that_is_not_finite_is_refused(broken: float) -> None:
    metric = HardNegativesMetric()
    with pytest.raises(ValueError, match="delta has to be finite"):
        metric.update(torch.tensor([0.5, broken]))
    assert len(metric.rows()) == 0
