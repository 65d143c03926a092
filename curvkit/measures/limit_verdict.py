"""What may be said of a learning rate beside the limit of stability, and what not."""

from __future__ import annotations

Interval = tuple[float, float]

BELOW, ABOVE = 0.8, 1.2
"""Ratios between these count as "at the limit": full-batch training moves about it. Adam, AdamW and RMSprop on a small network were read at
0.83 to 1.12 of it once they had reached it, gradient descent within 1 %."""
DECAYED = 0.01
"""A learning rate below this share of its highest says nothing: the ratio has been driven to zero by the schedule."""
IDLE = 0.1
"""Mass of the eigenvector on coordinates without a second moment from which there is no verdict. With mass m, holding these coordinates
fixed leaves at least (1 - 2 m) / (1 - m) of the eigenvalue where curvature along them is not negative: 8/9 of it at m = 0.1, a change
smaller than the width of a verdict."""
CAVEAT = (
    "a limit of full-batch training on a quadratic with frozen state: a heuristic for mini-batches, where training settles lower "
    "(arXiv 2604.14108)"
)


def verdict(ratio: Interval, *, converged: bool) -> tuple[str | None, str | None]:
    """Put a ratio into words, if its interval allows.

    Args:
        ratio: Interval of lr / largest stable lr.
        converged: Whether the eigenvalue is known to its tolerance; one that is not may still be larger.

    Returns:
        The verdict and no reason, or no verdict and why.

    Example:
        >>> verdict((0.95, 1.05), converged=True)
        ('at the full-batch limit', None)
        >>> verdict((0.7, 0.9), converged=True)
        (None, 'the interval of the ratio, 0.7 to 0.9, lies on both sides of 0.8')
    """
    low, high = ratio
    if low > ABOVE:
        return "above the full-batch limit", None
    if not converged:
        return None, "the eigenvalue has not converged: it may be larger"
    if high < BELOW:
        return "below the full-batch limit", None
    if low >= BELOW and high <= ABOVE:
        return "at the full-batch limit", None
    edge = BELOW if low < BELOW else ABOVE
    return None, f"the interval of the ratio, {low:.3g} to {high:.3g}, lies on both sides of {edge:g}"
