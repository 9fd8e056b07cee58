"""Drop and increase in confidence against plain loops (M2IB paper, Eqs. 17 and 18)."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from lightning_xai.metrics.confidence import ConfidenceMetric, confidence_drop, confidence_increase


def similarities(seed: int, count: int = 40) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_drop_and_increase_agree_with_a_plain_loop() -> None:
    original, kept = similarities(0), similarities(1)
    kept[::7] = original[::7]
    drops, increases = confidence_drop(original, kept).tolist(), confidence_increase(original, kept).tolist()
    for o, s, drop, increase in zip(original.tolist(), kept.tolist(), drops, increases, strict=True):
        assert drop == max(0.0, o - s)
        assert increase is (o < s)
    assert 0 < sum(increases) < 40 - 6


@pytest.mark.parametrize(
    ("original", "kept", "drop", "increase"),
    [(0.5, 0.5, 0.0, False), (0.5, 0.75, 0.0, True), (0.5, -0.25, 0.75, False), (-0.5, -0.25, 0.0, True)],
)
def test_known_pairs(original: float, kept: float, drop: float, increase: bool) -> None:
    assert confidence_drop(torch.tensor([original]), torch.tensor([kept])).tolist() == [drop]
    assert confidence_increase(torch.tensor([original]), torch.tensor([kept])).tolist() == [increase]


def test_images_and_texts_have_separate_means_and_captions_without_tokens_are_left_out() -> None:
    original, image, text = similarities(0), similarities(1), similarities(2)
    text[5:20] = math.nan
    metric = ConfidenceMetric()
    metric.update(original, image, text)
    means = metric.compute()
    for name, kept in (("image", image), ("text", text)):
        pairs = [(o, s) for o, s in zip(original.tolist(), kept.tolist(), strict=True) if not math.isnan(s)]
        assert len(pairs) == (40 if name == "image" else 25)
        expected = statistics.fmean(max(0.0, o - s) for o, s in pairs)
        assert means[f"{name}_drop"] == pytest.approx(expected, abs=1e-12)
        assert means[f"{name}_increase"] == sum(s > o for o, s in pairs) / len(pairs)
    assert len(means) == 4


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_pair_without_a_similarity_is_refused_rather_than_counted_as_no_increase(broken: float) -> None:
    metric = ConfidenceMetric()
    with pytest.raises(ValueError, match="finite"):
        metric.update(torch.tensor([0.5, broken]), torch.zeros(2), torch.zeros(2))
    assert len(metric.rows()) == 0
