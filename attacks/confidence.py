"""Confidence intervals of measured accuracies."""

from __future__ import annotations

import math

Z95 = 1.959963984540054
"""The two-sided 95 % quantile of the standard normal distribution."""


def wilson(successes_fraction: float, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % score interval of a proportion.

    Args:
        successes_fraction: the measured proportion, in [0, 1].
        n: number of samples; for 0 the interval is the whole of [0, 1].

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = successes_fraction, Z95**2
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = Z95 / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(one: float, n: int, other: float, m: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two proportions, of n and m samples.

    Source: Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    (low, high), (under, over) = wilson(one, n), wilson(other, m)
    return (
        one - other - math.hypot(one - low, over - other),
        one - other + math.hypot(high - one, other - under),
    )
