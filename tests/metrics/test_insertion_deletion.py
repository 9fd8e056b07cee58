from __future__ import annotations

import pytest
import torch

from lightning_xai.metrics.base import no_targets
from lightning_xai.metrics.insertion_deletion import insertion_deletion, strongest


def test_the_strongest_parts_are_a_share_of_a_rows_own_ones_and_ties_go_in_order() -> None:
    scores = torch.tensor([[2.0, 1.0, 2.0, -1.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    own = torch.tensor([[True, True, True, True, False], [False, True, True, False, False]])
    for share, first, second in ((0, [], []), (0.5, [0, 2], [1]), (0.75, [0, 1, 2], [1, 2]), (1, [0, 1, 2, 3], [1, 2])):
        chosen = strongest(scores, own, share)
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == [first, second], share


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps has to be at least 1; got 0"):
        insertion_deletion(no_targets("caption"), steps=0)  # type: ignore[arg-type]
