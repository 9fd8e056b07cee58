from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_xai.metrics.base import CaptionTargets, no_targets
from lightning_xai.metrics.insertion_deletion import insertion_deletion, strongest


def test_the_strongest_parts_are_a_share_of_a_rows_own_ones_and_ties_go_in_order() -> None:
    scores = torch.tensor([[2.0, 1.0, 2.0, -1.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    own = torch.tensor([[True, True, True, True, False], [False, True, True, False, False]])
    for share, first, second in ((0, [], []), (0.5, [0, 2], [1]), (0.75, [0, 1, 2], [1, 2]), (1, [0, 1, 2, 3], [1, 2])):
        chosen = strongest(scores, own, share)
        assert [row.nonzero()[:, 0].tolist() for row in chosen] == [first, second], share


def test_maps_without_an_order_have_no_area() -> None:
    empty = no_targets("caption")
    assert isinstance(empty, CaptionTargets)
    content = torch.tensor([[True, True, False], [True, False, False], [True, True, False], [False] * 3])
    targets = replace(
        empty,
        image_maps=torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[2.0, 2.0]], [[0.0, 1.0]]]),
        text_maps=torch.tensor([[3.0, 3.0, 0.0], [3.0, 0.0, 0.0], [3.0, 1.0, 0.0], [0.0] * 3]),
        content=content,
        embed_images=lambda shown: torch.ones(*shown.shape[:2], 1),
        embed_texts=lambda said: torch.ones(*said.shape[:2], 1),
    )
    found = {name: area.isnan().tolist() for name, area in insertion_deletion(targets, steps=2).items()}
    assert found["image_insertion"] == found["image_deletion"] == [False, False, True, False]
    assert found["text_insertion"] == found["text_deletion"] == [True, False, False, True], "one word has an order"
    assert found["insertion"] == found["deletion"] == [True, False, True, True]


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps has to be at least 1; got 0"):
        insertion_deletion(no_targets("caption"), steps=0)  # type: ignore[arg-type]
