"""Hard negatives: delta, and the share of negative ones (section 4.4)."""

from __future__ import annotations

import torch

from lightning_xai.metrics.hard_negatives import attribution_difference


def test_delta_is_what_the_replacement_has_more_than_the_true_words() -> None:
    negative, positive = torch.tensor([-0.25, 0.5, 0.5]), torch.tensor([0.5, 0.25, 0.5])
    assert attribution_difference(negative, positive).tolist() == [-0.75, 0.25, 0.0]
