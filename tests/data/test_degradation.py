"""What is taken away from images and captions, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from lightning_xai.data.degradation import cut_through_ties, degrade_image, important_pixels, important_tokens


def test_the_number_of_tokens_is_the_floor_or_the_ceiling_and_they_are_the_largest() -> None:
    rounding = ((False, np.floor), (True, np.ceil))
    for tokens, fraction, (round_up, count) in product((1, 2, 5, 12), (0.0, 0.1, 0.25, 0.5, 0.9, 1.0), rounding):
        generator = np.random.default_rng(tokens)
        scores, own = generator.normal(size=16).astype(np.float32), np.zeros(16, dtype=bool)
        own[1 : 1 + tokens] = True
        chosen = important_tokens(torch.tensor(scores), torch.tensor(own), fraction, round_up=round_up).numpy()
        expected = sorted(scores[own], reverse=True)[: int(count(fraction * tokens))]
        assert sorted(scores[chosen], reverse=True) == expected
        assert not (chosen & ~own).any()


SHARES = [(0.29, 29), (0.57, 57), (0.07, 7)]


def test_a_share_that_binary_fractions_miss_is_still_exact() -> None:
    for fraction, count in SHARES:
        scores, own = torch.arange(100.0), torch.ones(100, dtype=torch.bool)
        for round_up in (False, True):
            assert int(important_tokens(scores, own, fraction, round_up=round_up).sum()) == count


def test_scores_of_marks_and_padding_do_not_count_even_where_they_are_not_finite() -> None:
    scores = torch.tensor([torch.nan, -3.0, -1.0, -2.0, -4.0, torch.inf, 0.0])
    own = torch.tensor([False, True, True, True, True, False, False])
    assert important_tokens(scores, own, 0.5).nonzero()[:, 0].tolist() == [2, 3]


def test_captions_of_a_batch_are_cut_each_by_its_own_length() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    own = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    expected = [[False, False, True, True], [True, False, False, False], [False] * 4]
    assert important_tokens(scores, own, 0.5).tolist() == expected


def test_of_equal_scores_the_first_are_taken() -> None:
    own = torch.ones(1000, dtype=torch.bool)
    chosen = important_tokens(torch.zeros(1000), own, 0.25)  # long enough for a sort that is not stable to show
    assert chosen[:250].all()
    assert not chosen[250:].any()


CUTS = [
    ([1.0, 2.0, 2.0, 3.0], [1, 1, 1, 1], 0.5, True),
    ([1.0, 2.0, 2.0, 3.0], [1, 1, 1, 1], 0.75, False),
    ([1.0, 2.0, 2.0, 3.0], [1, 1, 0, 1], 0.7, False),  # the other one is no token of the caption's own
    ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1], 0.0, False),  # nothing is taken
    ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1], 1.0, False),  # nothing is left
    ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], 0.5, False),
]


def test_a_cut_through_equal_scores_is_noticed() -> None:
    for scores, own, fraction, tied in CUTS:
        assert bool(cut_through_ties(torch.tensor(scores), torch.tensor(own, dtype=torch.bool), fraction)) == tied


SIZES = [(8, 8), (7, 9), (224, 224)]


def test_an_image_loses_exactly_its_share_of_pixels_those_with_the_largest_values() -> None:
    for size in SIZES:
        heat = torch.randn(size, generator=torch.Generator().manual_seed(0))
        chosen = important_pixels(heat, 0.25)
        assert int(chosen.sum()) == size[0] * size[1] // 4
        assert heat[chosen].min() > heat[~chosen].max()


def test_replaced_pixels_show_the_mean_of_their_channel_and_others_stay() -> None:
    pixels = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before, heat = pixels.clone(), torch.zeros(8, 8)
    heat[2:4, 1:5] = 1.0
    degraded = degrade_image(pixels, heat, 8 / 64)
    means = torch.tensor([round(channel) for channel in pixels.numpy().mean(axis=(1, 2)).tolist()])
    assert degraded.dtype == torch.uint8
    assert (degraded[:, 2:4, 1:5] == means[:, None, None]).all()
    kept = heat == 0
    assert torch.equal(degraded[:, kept], pixels[:, kept])
    assert torch.equal(pixels, before)


def test_a_color_of_ones_own_is_taken_as_it_is() -> None:
    pixels, fill = torch.rand(3, 4, 4), torch.tensor([0.1, 0.2, 0.3])
    degraded = degrade_image(pixels, torch.rand(4, 4), 1.0, fill)
    assert torch.equal(degraded, fill[:, None, None].expand(3, 4, 4))
    assert torch.equal(degrade_image(pixels, torch.rand(4, 4), 0.0, fill), pixels)


NONSENSE: list[tuple[Callable[[], object], str]] = [
    (lambda: important_tokens(torch.zeros(3), torch.ones(4, dtype=torch.bool), 0.5), r"\[3\] and \[4\]"),
    (lambda: important_tokens(torch.zeros(3), torch.ones(3), 0.5), "torch.float32"),
    (lambda: important_pixels(torch.zeros(3, 3), 1.5), r"in \[0, 1\]; got 1.5"),
    (lambda: important_pixels(torch.zeros(3, 3), float("nan")), r"in \[0, 1\]; got nan"),
    (lambda: important_pixels(torch.tensor([[0.0, torch.nan]]), 0.5), "NaN or infinity"),
    (lambda: degrade_image(torch.zeros(3, 4, 4), torch.zeros(2, 2), 0.5), r"\[3, 4, 4\], \[2, 2\] and none"),
    (lambda: degrade_image(torch.zeros(3, 2, 2), torch.zeros(2, 2), 0.5, torch.zeros(1)), r"and \[1\]"),
]


def test_nonsense_is_refused_with_what_came() -> None:
    for call, message in NONSENSE:
        with pytest.raises(ValueError, match=message):
            call()
