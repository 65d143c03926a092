"""Intervals from independent samples, and when to look at them: coverage holds for the interval at which sampling stops."""

from __future__ import annotations

import functools
import math

CONFIDENCE = 0.95
"""Probability that an interval holds the truth."""
LEAST = 30
"""Nothing is called converged with fewer probes."""
RATIO = 1.25
"""The rule looks at the interval after 30 probes, then each time their number has grown by this factor."""
WIDENING = 24.0
"""Intervals are Student's times 1 + WIDENING / m. Signed quadratic forms are skewed, at worst about as chi-squared with one degree of
freedom, for which Student's interval covers 0.905 at m = 30; and stopping when it happens to be narrow takes its toll."""
SERIES = 200


def half_width(stderr: float, probes: int) -> float:
    """Half the length of the interval around a mean of independent samples.

        h = t_(m-1)(0.975) (1 + 24 / m) s / sqrt(m)

    Args:
        stderr: s / sqrt(m), the standard error of the mean.
        probes: m, how many samples it rests on.

    Returns:
        h; infinite for m < 2, where nothing is known.

    Accuracy: measured coverage of the interval at which `is_due` with a tolerance stopped, see docs/concepts/trace.md.
    Source: Student (1908); the widening is ours. By an Edgeworth expansion Student's interval misses more often than it should by c / m,
        with c from skewness and kurtosis, which a widening by a multiple of 1 / m repairs; its size was found by simulation.

    Example:
        >>> round(half_width(1.0, 30), 4), round(half_width(1.0, 10_000), 4)
        (3.6814, 1.9649)
    """
    if probes < 2:
        return math.inf
    return quantile(probes - 1) * (1.0 + WIDENING / probes) * stderr


def is_due(probes: int, before: int) -> bool:
    """Whether the stopping rule looks at the interval now.

    Args:
        probes: Their number now.
        before: Their number at the last look at which this was asked.

    Returns:
        True where 30, 38, 48, 60, 75, ... lies in (before, probes].

    Example:
        >>> [m for m in range(1, 100) if is_due(m, m - 1)]
        [30, 38, 48, 60, 75, 94]
    """
    look = LEAST
    while look <= before:
        look = math.ceil(look * RATIO)
    return look <= probes


def probes_needed(deviation: float, allowed: float) -> int:
    """Predict how many probes make the interval narrow enough.

    Args:
        deviation: s, of one sample.
        allowed: Half-width that is wanted.

    Returns:
        The least m >= 30 with half_width(s / sqrt(m), m) <= allowed; 10^9 at most.

    Example:
        >>> probes_needed(0.0, 1.0), probes_needed(1.0, 0.1)
        (30, 431)
    """
    low, high = LEAST, 10**9
    while low < high:
        middle = (low + high) // 2
        if half_width(deviation / math.sqrt(middle), middle) <= allowed:
            high = middle
        else:
            low = middle + 1
    return low


@functools.cache
def quantile(dof: int) -> float:
    """The 0.975 quantile of Student's t distribution.

    Args:
        dof: Degrees of freedom, nu >= 1.

    Returns:
        t with P(|T| <= t) = 0.95.

    Accuracy: 1e-9, relatively. Up to nu = 200 bisection of the finite series of P(|T| <= t), beyond that four terms of the
        expansion in 1 / nu.
    Source: Abramowitz & Stegun (1964), 26.7.3, 26.7.4 and 26.7.5.

    Example:
        >>> round(quantile(1), 4), round(quantile(29), 4), round(quantile(100_000), 4)
        (12.7062, 2.0452, 1.96)
    """
    z = 1.959963984540054
    t = (
        z
        + (z**3 + z) / (4 * dof)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * dof**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * dof**4)
    )
    if dof > SERIES:
        return t
    low, high = 1.0, 16.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, dof) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _central(t: float, dof: int) -> float:
    """P(|T| <= t), a finite sum in cos(angle)^2, angle = atan(t / sqrt(nu))."""
    angle = math.atan(t / math.sqrt(dof))
    square, term, total = math.cos(angle) ** 2, 1.0, 0.0
    if dof % 2 == 0:
        for k in range(1, dof // 2 + 1):
            total += term
            term *= square * (2 * k - 1) / (2 * k)
        return math.sin(angle) * total
    term = math.cos(angle)
    for k in range(1, (dof - 1) // 2 + 1):
        total += term
        term *= square * (2 * k) / (2 * k + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total)
