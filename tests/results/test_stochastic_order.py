from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from lightning_xai.results.stochastic_order import (
    almost_stochastic_order,
    survival_curve,
    violation_ratio,
)

Floats = NDArray[np.float64]

# fmt: off
A = [0.566, 0.243, 0.722, 0.417, 0.668, 0.806, 0.653, 0.665, 0.583, 0.590, 0.810, 0.467, 0.921, 0.709, 0.872, 0.791,
     0.605, 0.408, 0.211, 0.515, 0.570, 0.616, 0.378, 0.660, 0.312, 0.814, 0.197, 0.839, 0.756, 0.566, 0.570, 0.242,
     0.493, 0.664, 0.943, 0.580, 0.812, 0.522, 0.475, 0.390]
B = [0.193, 0.562, 0.141, 0.313, 0.389, 0.304, 0.395, 0.810, 0.580, 0.850, 0.189, 0.156, 0.207, 0.790, 0.898, 0.754,
     0.210, 0.415, 0.688, 0.844, 0.900, 0.783, 0.731, 0.777, 0.254, 0.236, 0.497, 0.736, 0.625, 0.581, 0.676, 0.015,
     0.795, 0.288, 0.455, 0.517, 0.233, 0.507, 0.531, 0.436, 0.669, 0.515, 0.420, 0.247, 0.498, 0.983, 0.791, 0.353,
     0.493, 0.869]
# fmt: on


def pair(seed: int, n: int, m: int) -> tuple[Floats, Floats]:
    """Samples whose quantile functions cross, with ties."""
    generator = np.random.default_rng(seed)
    return generator.beta(5, 4, n).round(2), generator.beta(2, 2, m).round(2)


def exact_ratio(first: list[Fraction], second: list[Fraction]) -> Fraction:
    """The integral in exact numbers, step by step along the merged grid."""
    first, second = sorted(first), sorted(second)
    n, m = len(first), len(second)
    ends = sorted({Fraction(i, n) for i in range(n + 1)} | {Fraction(j, m) for j in range(m + 1)})
    against = total = Fraction(0)
    for start, end in pairwise(ends):
        middle = (start + end) / 2
        difference = first[math.floor(middle * n)] - second[math.floor(middle * m)]
        total += (end - start) * difference**2
        against += (end - start) * difference**2 if difference < 0 else 0
    return against / total


def true_ratio(mean: float, deviation: float) -> float:
    """Of N(mean, deviation^2) against N(0, 1), whose quantiles at z differ by mean + (deviation - 1) z."""

    def squared(z: float) -> float:
        return float((mean + (deviation - 1) * z) ** 2 * stats.norm.pdf(z))

    crossing = -mean / (deviation - 1)
    against = integrate.quad(squared, -12, crossing)[0]
    return float(against / (against + integrate.quad(squared, crossing, 12)[0]))


def test_a_sample_shifted_upwards_violates_nothing_and_the_other_way_round_everything() -> None:
    values = np.random.default_rng(0).normal(size=57)
    assert violation_ratio(values + 0.25, values) == 0.0
    assert violation_ratio(values, values + 0.25) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Quantiles (0, 3) and (1, 1): -1 and +2 at one half each.
        ([0, 3], [1, 1], Fraction(1, 5)),
        # Quantiles 0 up to 1/2 and 4 beyond, against 1 up to 1/3 and 3 beyond: -1 for 1/3, -3 for 1/6, +1 for 1/2.
        ([0, 4], [1, 3, 3], Fraction(11, 14)),
        # 0 up to 3/4, 8 beyond, against 2: three times -2, once +6.
        ([8, 0, 0, 0], [2, 2], Fraction(1, 4)),
    ],
)
def test_few_points_by_hand(first: list[float], second: list[float], expected: Fraction) -> None:
    assert violation_ratio(first, second) == pytest.approx(float(expected), abs=1e-15)


@pytest.mark.parametrize(("n", "m"), [(1, 9), (7, 7), (30, 45)])
def test_the_ratio_is_exact_on_the_merged_grid(n: int, m: int) -> None:
    for seed in range(5):
        first, second = (np.round(values * 100).astype(int) for values in pair(seed, n, m))
        expected = exact_ratio([Fraction(int(v), 100) for v in first], [Fraction(int(v), 100) for v in second])
        assert violation_ratio(first / 100, second / 100) == pytest.approx(float(expected), abs=1e-12)


def test_equal_distributions_are_undecided_also_at_different_sizes() -> None:
    assert violation_ratio([0.1, 0.2], [0.2, 0.1]) == 0.5
    assert violation_ratio([0.1, 0.2], [0.2, 0.1, 0.1, 0.2]) == 0.5
    assert violation_ratio([0.3] * 7, [0.3] * 11) == 0.5


def test_a_monotone_line_leaves_the_ratio_and_a_falling_one_turns_it() -> None:
    first, second = pair(4, 21, 34)
    ratio = violation_ratio(first, second)
    assert violation_ratio(1024 * first, 1024 * second) == ratio
    assert violation_ratio(3.7 * first - 11, 3.7 * second - 11) == pytest.approx(ratio, rel=1e-9)
    assert violation_ratio(-first, -second) == pytest.approx(1 - ratio, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1.7e308])
def test_neither_huge_nor_tiny_values_lose_the_ratio(scale: float) -> None:
    assert violation_ratio([0 * scale, scale], [scale / 2, scale / 2, scale / 4, scale / 4]) == pytest.approx(1 / 5)
    assert violation_ratio([-scale, scale], [scale, scale]) == 1.0


def test_the_bound_is_the_papers_formula() -> None:
    order = almost_stochastic_order(A, B, alpha=0.05, bootstrap_samples=4000, seed=1)
    generator = np.random.default_rng(99)
    ratios = [violation_ratio(generator.choice(A, 40), generator.choice(B, 50)) for _ in range(4000)]
    factor = math.sqrt(40 * 50 / (40 + 50))
    sigma = np.std([factor * (ratio - order.violation_ratio) for ratio in ratios], ddof=1)
    expected = order.violation_ratio - sigma / factor * NormalDist().inv_cdf(0.05)
    assert 0.1 < expected < 0.9
    assert order.epsilon_min == pytest.approx(expected, rel=0.05)
    assert order.interval == pytest.approx(np.quantile(ratios, [0.05, 0.95]).tolist(), abs=0.04)


def test_it_agrees_with_deepsig() -> None:
    # deepsig 1.2.8 on A and B: compute_violation_ratio(A, B, dt=1e-5), and aso(A, B, num_bootstrap_iterations=5000,
    # dt=0.001, seed=1), at confidence levels 0.95 and 0.99. It sums over steps of dt and leaves out the first one.
    assert violation_ratio(A, B) == pytest.approx(0.011781464545498398, rel=1e-3)
    for alpha, expected in ((0.05, 0.3250992585556278), (0.01, 0.45499484903030896)):
        order = almost_stochastic_order(A, B, alpha=alpha, bootstrap_samples=5000)
        assert order.epsilon_min == pytest.approx(expected, rel=0.05)
    assert almost_stochastic_order(B, A, alpha=0.05).epsilon_min == 1.0


def test_the_bound_covers_the_true_ratio_about_as_often_as_its_level_says() -> None:
    truth, alpha, repetitions = true_ratio(0.5, 2), 0.2, 300
    assert truth == pytest.approx(0.1677, abs=1e-4)
    generator, missed = np.random.default_rng(6), 0
    for seed in range(repetitions):
        first, second = generator.normal(0.5, 2, 300), generator.normal(0, 1, 200)
        order = almost_stochastic_order(first, second, alpha=alpha, bootstrap_samples=100, seed=seed)
        missed += order.epsilon_min < truth
    # The share itself has a standard deviation of 0.024. A bound of the wrong sign misses in 0.79, the ratio itself in
    # about one half.
    assert missed / repetitions == pytest.approx(alpha, abs=0.07)


def test_clear_dominance_is_found_and_none_is_found_among_equals() -> None:
    generator = np.random.default_rng(7)
    better, same, again = generator.normal(1, 1, 300), generator.normal(0, 1, 300), generator.normal(0, 1, 300)
    assert almost_stochastic_order(better, same, epsilon=0.01, alpha=0.001).dominates
    assert not almost_stochastic_order(same, better).dominates
    assert not almost_stochastic_order(same, again).dominates
    assert not almost_stochastic_order(again, same).dominates
    assert not almost_stochastic_order(same, same, epsilon=0.5).dominates


@pytest.mark.parametrize(
    ("n", "m", "enough"),
    # 1 / C(8, 4) = 1/70 and 1 / C(10, 5) = 1/252 against 1/200; 1 / C(22, 2) = 1/231, 1 / C(21, 2) = 1/210, 1/190
    [(4, 4, False), (5, 5, True), (2, 18, False), (20, 2, True), (1, 500, False)],
)
def test_too_few_values_to_reach_the_level_give_no_bound(n: int, m: int, enough: bool) -> None:
    order = almost_stochastic_order(np.linspace(2, 3, n), np.linspace(0, 1, m), bootstrap_samples=20)
    assert order.violation_ratio == 0.0
    assert order.epsilon_min == (0.0 if enough else 1.0)
    assert order.dominates == enough


def test_constant_samples_are_ordered_by_their_values() -> None:
    high, low = [0.75] * 9, [0.25] * 11
    assert almost_stochastic_order(high, low).dominates
    assert almost_stochastic_order(low, high).epsilon_min == 1.0
    same = almost_stochastic_order(high, [0.75] * 12, epsilon=0.5)
    assert (same.violation_ratio, same.epsilon_min, same.interval, same.dominates) == (0.5, 0.5, (0.5, 0.5), False)


def test_the_seed_and_nothing_else_decides_the_resampling() -> None:
    order = almost_stochastic_order(A, B, seed=3)
    assert almost_stochastic_order(A[::-1], sorted(B), seed=3) == order
    assert almost_stochastic_order(A, B, seed=4).epsilon_min != order.epsilon_min
    np.random.seed(0)
    assert almost_stochastic_order(np.array(A), np.array(B), seed=3) == order


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"at least 1, got the shape \(0,\)"),
        ([[0.1, 0.2]], r"numbers \[n\].*\(1, 2\)"),
        ([0.1, math.nan, math.inf], "2 of 3 values are not finite; leave out"),
    ],
)
def test_what_is_no_sample_is_refused_by_name(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"second: .*{message}"):
        almost_stochastic_order([0.5], values)
    with pytest.raises(ValueError, match=f"first: .*{message}"):
        violation_ratio(values, [0.5])
    with pytest.raises(ValueError, match=f"values: .*{message}"):
        survival_curve(values, [0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon: .*\(0, 0.5\], got 0.0"),
        ({"epsilon": 0.6}, r"epsilon: .*got 0.6; swap"),
        ({"alpha": 0.95}, "alpha: .*got 0.95"),
        ({"bootstrap_samples": 1}, "bootstrap_samples: .*got 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        almost_stochastic_order(A, B, **options)  # type: ignore[arg-type]


def test_the_curve_counts_what_lies_above_each_point() -> None:
    values = np.random.default_rng(8).random(200).round(2)
    points = np.array([1.0, -0.1, 0.0, 0.5, 0.35, *values[:20]])
    expected = [sum(value > point for value in values.tolist()) / 200 for point in points.tolist()]
    assert survival_curve(values, points).tolist() == expected
    assert survival_curve(values, []).tolist() == []
    with pytest.raises(ValueError, match="points: 1 of 2 values are not finite"):
        survival_curve(values, [0.1, math.nan])
