"""What benchmarks/short_side.py says of a version of the data."""

from __future__ import annotations

import torch
from short_side import Measured, row


def test_a_row_compares_embeddings_and_the_phrases_that_both_measured() -> None:
    plain = Measured(
        163.0, torch.eye(2), {"gamma": {"a": 0.5, "b": 0.9, "c": 0.1}, "rho": {"a": 1.0, "b": 1.0, "c": 0}}
    )
    turned = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    other = Measured(58.0, turned, {"gamma": {"a": 0.7, "b": 0.8}, "rho": {"a": 0.0, "b": 1.0}})
    expected = "| small | 58 | 0.90000; 0.80000 | 0.1500; 0.200 | 1 of 2 | 100.0% | 50.0% |"
    assert row("small", plain, other) == expected
