"""Test that one sample's distribution lies above another's: almost stochastic order, and the curves compared.

F dominates G stochastically where every quantile of F is at least that of G. Real samples nearly always break that
somewhere. The violation ratio says by how much: the share of the squared 2-Wasserstein distance of F and G that comes
from the quantiles at which G is larger. F dominates G almost, at threshold epsilon, where the ratio is below epsilon.

After del Barrio, Cuesta-Albertos and Matrán, "An optimal transportation approach for assessing almost stochastic order"
(2018), as Dror, Shlomov and Reichart, "Deep Dominance - How to Properly Compare Deep Neural Models" (ACL 2019), use it
to compare models. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = ["StochasticOrder", "almost_stochastic_order", "sorted_sample", "survival_curve", "violation_ratio"]

Values = Sequence[float] | NDArray[np.floating]
_Floats = NDArray[np.float64]

_UNDECIDED = 0.5


@dataclass(frozen=True)
class StochasticOrder:
    """The test of whether a first sample comes from a distribution above that of a second one.

    Attributes:
        violation_ratio: of the samples, in [0, 1]; 0: the first is the larger one at every quantile, 1: the second is.
        epsilon_min: upper confidence bound of the ratio at level `alpha`, in [0, 1]: the smallest threshold at which
            the first dominates the second. 1 where the samples are too small to say anything at this level.
        interval: the `alpha` and `1 - alpha` quantiles of the bootstrapped ratios.
        epsilon: the threshold that was asked for.
    """

    violation_ratio: float
    epsilon_min: float
    interval: tuple[float, float]
    epsilon: float

    @property
    def dominates(self) -> bool:
        """The verdict: the first almost dominates the second at threshold `epsilon`, at the level of the bound."""
        return self.epsilon_min < self.epsilon


def almost_stochastic_order(
    first: Values,
    second: Values,
    *,
    epsilon: float = 0.2,
    alpha: float = 0.005,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> StochasticOrder:
    """Test whether `first` is stochastically larger than `second`, up to violations of a share `epsilon`.

    The null hypothesis is that the violation ratio is `epsilon` or more. It is rejected where

        epsilon_min = ratio - sqrt((n + m) / (n m)) * sigma * Phi^-1(alpha)  <  epsilon,

    where sigma^2 is the variance of sqrt(n m / (n + m)) (ratio* - ratio) over resamples of both samples with their own
    sizes (so that the factor cancels). Phi^-1(alpha) is negative: epsilon_min lies above the ratio. That F does not
    dominate G does not mean that G dominates F; ask for both.

    Resampling takes all values as independent. Two models measured on the same pairs usually rise and fall together,
    which makes the test cautious; several pairs of one image do so too, which makes it bold.

    The formula takes the ratio as normally distributed, but near 0 and 1 it is skewed: for normal samples of 200 to
    300 values with true ratios of 0.04 to 0.17, the bound at alpha 0.05 lay below the truth in 6 to 9 % of repetitions,
    at alpha 0.005 in 2 to 4 %. The upper end of `interval` takes no such thing for granted, and stayed below 5 % and
    1.4 %: where much depends on the verdict, see that it lies below `epsilon` too.

    Departure from the papers: where not even samples that do not overlap at all could reach the level, the bound is 1.
    Two equal continuous distributions give such samples with probability n! m! / (n + m)!; all resamples then have
    ratio 0, sigma is 0, and the formula alone would call one observation above another one significant. At alpha 0.005
    this concerns up to 4 observations on each side; and always a side with a single one, which has no spread.

    Args:
        first: [n], in any order; higher is better.
        second: [m], in any order.
        epsilon: threshold in (0, 0.5]. The default goes with the paper's comparison of models, 0.01 with that of
            fine-tuned and unmodified ones ("Explaining caption-image interactions in CLIP models with second-order
            attributions", section 4.2). At 0.5 the test only asks which of the two is the larger one.
        alpha: significance level in (0, 0.5); the defaults of both go together, and so do 0.01 and 0.001. Divide by
            the number of tests where there are several: two for a comparison in both directions.
        bootstrap_samples: resamples, at least 2. `interval` is rough with fewer than about ten divided by `alpha`.
        seed: of the resampling; the same seed gives the same result, whatever the order of the values.

    Raises:
        ValueError: a sample is empty, not [n], or not finite, or an option is out of range.

    >>> order = almost_stochastic_order([0.5, 0.6, 0.7, 0.8, 0.9], [0.0, 0.1, 0.2, 0.3, 0.4])
    >>> order.violation_ratio, order.epsilon_min, order.dominates
    (0.0, 0.0, True)
    >>> almost_stochastic_order([0.5], [0.4]).epsilon_min
    1.0
    """
    if not 0 < epsilon <= _UNDECIDED:
        raise ValueError(f"epsilon: expected a threshold in (0, 0.5], got {epsilon}; swap the samples to ask beyond it")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: expected a significance level in (0, 0.5), got {alpha}")
    if bootstrap_samples < 2:
        raise ValueError(f"bootstrap_samples: expected at least 2, to have a spread; got {bootstrap_samples}")
    above, below = sorted_sample(first, "first"), sorted_sample(second, "second")
    grid, generator = _MergedGrid(above.size, below.size), np.random.default_rng(seed)
    ratio = grid.ratio(above, below)
    resampled = [
        grid.ratio(_resampled(above, generator), _resampled(below, generator)) for _ in range(bootstrap_samples)
    ]
    bound = 1.0
    if _large_enough(above.size, below.size, alpha):
        bound = min(max(ratio - float(np.std(resampled, ddof=1)) * NormalDist().inv_cdf(alpha), 0.0), 1.0)
    low, high = np.quantile(resampled, [alpha, 1 - alpha]).tolist()
    return StochasticOrder(violation_ratio=ratio, epsilon_min=bound, interval=(low, high), epsilon=epsilon)


def violation_ratio(first: Values, second: Values) -> float:
    """Distance of `first` from being stochastically larger than `second`: 0 is order, 1 the opposite order.

        ratio = int_V (F^-1(t) - G^-1(t))^2 dt / int_0^1 (F^-1(t) - G^-1(t))^2 dt,    V = {t: F^-1(t) < G^-1(t)}

    The quantile functions F^-1 and G^-1 of the samples are constant between multiples of 1/n and 1/m, so the integrals
    are sums over the merged grid, without any step to choose. The two directions add up to 1. For samples with the same
    distribution the ratio is 0/0; it then is 0.5, which keeps that sum and is never below a threshold.

    Args:
        first: [n], in any order.
        second: [m], in any order.

    Raises:
        ValueError: a sample is empty, not [n], or not finite.

    >>> violation_ratio([0.0, 3.0], [1.0, 1.0])  # 1 below at one half of the quantiles, 2 above at the other
    0.2
    """
    above, below = sorted_sample(first, "first"), sorted_sample(second, "second")
    return _MergedGrid(above.size, below.size).ratio(above, below)


def survival_curve(values: Values, points: Values) -> NDArray[np.float64]:
    """The share of `values` above each point, as the paper plots gamma (Figure 5).

    A sample is stochastically larger than another where its curve nowhere lies below.

    Args:
        values: [n], in any order.
        points: [k], in any order.

    Returns:
        [k], fractions; a value that equals the point is not above it.

    Raises:
        ValueError: there are no values, or values or points are not finite or have another shape.

    >>> survival_curve([0.2, 0.5, 0.9, 0.9], [0.0, 0.5, 0.9]).tolist()
    [1.0, 0.5, 0.0]
    """
    ordered = sorted_sample(values, "values")
    sorted_sample(points, "points", at_least=0)
    return np.asarray((ordered.size - np.searchsorted(ordered, points, side="right")) / ordered.size)


def sorted_sample(values: Values, name: str, *, at_least: int = 1) -> NDArray[np.float64]:
    """A sample in ascending order, or a ValueError that says what is wrong with it.

    >>> sorted_sample([0.5, 0.25], "gammas").tolist()
    [0.25, 0.5]
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size < at_least:
        raise ValueError(f"{name}: expected numbers [n] with n at least {at_least}, got the shape {sample.shape}")
    if not np.isfinite(sample).all():
        wrong = int(np.count_nonzero(~np.isfinite(sample)))
        raise ValueError(f"{name}: {wrong} of {sample.size} values are not finite; leave out what was not measured")
    return np.sort(sample)


class _MergedGrid:
    """Places where the quantile functions of samples of two sizes may step: the same for all such samples."""

    def __init__(self, n: int, m: int) -> None:
        # In units of 1 / (n m), the steps are whole numbers.
        ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
        self._widths = np.diff(ends, prepend=0).astype(np.float64)
        self._first, self._second = (ends - 1) // m, (ends - 1) // n

    def ratio(self, first: _Floats, second: _Floats) -> float:
        """The violation ratio of sorted samples."""
        # Halved, no difference of two finite numbers overflows. Scaled by a power of two (without rounding) its
        # square neither overflows nor vanishes.
        difference = first[self._first] / 2 - second[self._second] / 2
        largest = max(float(difference.max()), -float(difference.min()))
        if largest == 0:
            return _UNDECIDED
        difference = np.ldexp(difference, -math.frexp(largest)[1])
        parts = self._widths * difference**2
        against = float(parts[difference < 0].sum())
        return against / (against + float(parts[difference > 0].sum()))


def _resampled(ordered: _Floats, generator: np.random.Generator) -> _Floats:
    """As many draws with replacement from a sorted sample, sorted: each value as often as it was drawn."""
    drawn = np.bincount(generator.integers(ordered.size, size=ordered.size), minlength=ordered.size)
    return np.repeat(ordered, drawn)


def _large_enough(n: int, m: int, alpha: float) -> bool:
    """True if samples of two equal continuous distributions do not overlap with probability `alpha` or less."""
    likelihood = math.lgamma(n + 1) + math.lgamma(m + 1) - math.lgamma(n + m + 1)
    return min(n, m) > 1 and likelihood <= math.log(alpha)
