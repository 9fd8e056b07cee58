from __future__ import annotations

import torch

from lightning_xai.metrics.base import CollageTargets
from lightning_xai.metrics.pointing_game import pointing_game


def test_share_and_hit_are_those_of_the_quarter_and_chance_is_a_quarter() -> None:
    inside = torch.zeros(4, 4)
    inside[:2, 2:] = 1
    maps = torch.full((4, 4, 4), -1.0)
    maps[0, 0, 3], maps[0, 3, 0] = 3, 1  # found, with a third as much elsewhere
    maps[1, 3, 3] = 2  # in another quarter
    maps[2] = 1  # says nothing
    found = pointing_game(CollageTargets(maps, inside.expand(4, -1, -1)))
    assert found["quarter_share"][:3].tolist() == [0.75, 0, 0.25]
    assert found["quarter_hit"][:3].tolist() == [1, 0, 0.25]
    assert found["quarter_share"][3].isnan(), "nothing is positive"
    assert found["quarter_hit"][3].isnan()
