"""The order of pairs against a search that adds up all interactions of what is present in each step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_xai.metrics.base import no_targets
from lightning_xai.metrics.pair_insertion_deletion import greedy_order, pair_insertion_deletion

PATCHES, TOKENS = 4, 6
OWN = torch.tensor([[False, True, True, True, False, False], [False, True, False, False, False, False]])


def present_sum(interactions: Tensor, prefix: Tensor, own: Tensor, there: set[int]) -> float:
    """What the pairs of present patches and tokens add up to; tokens that are not `own` are present."""
    total = 0.0
    for token in range(TOKENS):
        if not own[token] or PATCHES + token in there:
            total += float(prefix[token])
            total += sum(float(interactions[token, patch]) for patch in range(PATCHES) if patch in there)
    return total


def searched(interactions: Tensor, prefix: Tensor, own: Tensor, *, insertion: bool, most: bool) -> list[int]:
    parts = [*range(PATCHES), *(PATCHES + token for token in range(TOKENS) if own[token])]
    there: set[int] = set() if insertion else set(parts)
    order: list[int] = []
    while len(order) < len(parts):
        now = present_sum(interactions, prefix, own, there)
        gains = {
            part: abs_change * (1 if insertion else -1)
            for part in parts
            if part not in order
            for abs_change in [present_sum(interactions, prefix, own, there ^ {part}) - now]
        }
        best = max(gains, key=lambda part: gains[part] if most else -gains[part])
        there ^= {best}
        order.append(best)
    return order


@pytest.mark.parametrize("insertion", [True, False])
@pytest.mark.parametrize("most", [True, False])
def test_each_step_takes_the_part_that_changes_the_sum_of_present_pairs_most_or_least(
    insertion: bool, most: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    interactions = torch.randn(2, TOKENS, PATCHES, generator=generator, dtype=torch.float64)
    prefix = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    place = greedy_order(interactions, prefix, OWN, insertion=insertion, most=most)
    for row in range(2):
        expected = searched(interactions[row], prefix[row], OWN[row], insertion=insertion, most=most)
        found = [part for part in place[row].argsort(stable=True).tolist() if place[row, part] < PATCHES + TOKENS]
        assert found == expected


def test_parts_that_add_nothing_yet_come_in_the_order_of_all_that_they_add() -> None:
    # Nothing is present, so that no part alone changes anything; patch 2 and the last token have most in common.
    interactions = torch.zeros(1, 2, 3)
    interactions[0, 1, 2], interactions[0, 0, 0] = 5, 1
    own = torch.ones(1, 2, dtype=torch.bool)
    place = greedy_order(interactions, torch.zeros(1, 2), own, insertion=True, most=True)
    assert place.argsort()[0].tolist() == [2, 4, 0, 3, 1]


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps has to be at least 1; got 0"):
        pair_insertion_deletion(no_targets("caption"), steps=0)  # type: ignore[arg-type]
