"""How far two sets agree by chance alone, of which only the sizes are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument

TAIL = 20.0
"""A count is followed up to sqrt(TAIL m) from its mean, m its number of draws: beyond lies at most 2 exp(-2 TAIL) = 1e-17 of it."""
EXPANSION_ERROR = 1e-6
"""From here on down the mean over many layers comes from an expansion with a proven bound."""


@dataclass(frozen=True)
class AgainstChance:
    """A share, and what it would be for sets that were drawn at random with the same sizes."""

    value: float | None
    """None: a share of nothing, as where both sets are empty."""
    chance: float | None
    """Its expectation for independent random sets, each uniform among those of its size."""
    within_layers: float | None = None
    """Its expectation where each set's size in every layer is given, too; None: not applicable, as in the row of one layer."""
    spread: float | None = None
    """Standard deviation by chance, as `chance` has it; None: not computed."""


@dataclass(frozen=True)
class Cell:
    """Coordinates among which two sets are drawn, and how many each of them takes."""

    size: int
    a: int
    b: int

    @property
    def mean(self) -> float:
        """Of the number m of coordinates in both, a b / n."""
        return self.a * self.b / self.size if self.size else 0.0

    @property
    def variance(self) -> float:
        """Of that number, a b (n - a) (n - b) / (n^2 (n - 1))."""
        n = self.size
        return self.mean * (n - self.a) / n * (n - self.b) / (n - 1) if n > 1 else 0.0

    @property
    def draws(self) -> int:
        """The least number of draws without replacement that the count rests on: of a set or of the rest, whichever is smallest."""
        return min(self.a, self.b, self.size - self.a, self.size - self.b)


def jaccard_by_chance(cells: Sequence[Cell]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the Jaccard index |A and B| / |A or B| of two independent random sets.

        J = m / (s - m),    s = |A| + |B|,    m = sum_l m_l,    m_l ~ Hypergeometric(n_l, a_l, b_l)

    One cell: all coordinates, of which A is any a and B any b with equal probability. Several: the same within each of them.

    Args:
        cells: Disjoint.

    Returns:
        E J and the standard deviation of J; None if both sets are empty.

    Raises:
        InvalidArgument: If a set is larger than its cell.

    Accuracy: 1e-12 where the distribution of m is summed over: for one cell, or few coordinates. Elsewhere within 1e-6, proven by

        E J = mu / r + s sigma^2 / r^3 + s E[d^3 / (r^3 (r - d))],    d = m - mu,    r = s - mu,    r - d >= s - sum_l min(a_l, b_l)

    with E|d|^3 <= sqrt(sigma^2 (3 v^2 + v)), v = sum_l a_l (b_l / n_l) (1 - b_l / n_l): a draw without replacement varies no more
    than one with it (Hoeffding 1963, theorem 4). The standard deviation is then s sigma / r^2, to first order.
    Cost: sqrt(n) operations for one cell, at most some 10^6 for many.

    Example:
        >>> jaccard_by_chance([Cell(4, 2, 2)])[0]   # m = 0, 1, 2 with probabilities 1/6, 4/6, 1/6
        0.388888888888...
    """
    for cell in cells:
        if not (0 <= cell.a <= cell.size and 0 <= cell.b <= cell.size):
            raise InvalidArgument(
                f"jaccard_by_chance: {cell} has a set larger than itself, or below zero. Pass sizes in [0, {cell.size}]."
            )
    s = sum(cell.a + cell.b for cell in cells)
    if s == 0:
        return None, None
    drawn = [cell for cell in cells if cell.draws > 0]  # elsewhere m_l is certain
    mu, variance = math.fsum(cell.mean for cell in cells), math.fsum(cell.variance for cell in cells)
    r = s - mu
    if len(drawn) > 1 and _remainder(cells, s, r, variance) <= EXPANSION_ERROR:
        return mu / r + s * variance / r**3, s * math.sqrt(variance) / r**2
    start, p = _count(drawn)
    certain = sum(cell.a * cell.b // cell.size for cell in cells if cell.size and not cell.draws)
    m = start + certain + torch.arange(len(p), dtype=torch.float64)
    J = m / (s - m)
    mean = (p * J).sum().item()
    return mean, (p * (J - mean).square()).sum().sqrt().item()


def _remainder(cells: Sequence[Cell], s: int, r: float, variance: float) -> float:
    """Bound of what the expansion to second order leaves out."""
    v = math.fsum(cell.mean * (1 - cell.b / cell.size) for cell in cells if cell.size)
    third = math.sqrt(variance * (3 * v * v + v))
    return s * third / (r**3 * (s - sum(min(cell.a, cell.b) for cell in cells)))


def _count(cells: Sequence[Cell]) -> tuple[int, Tensor]:
    """Distribution of sum_l m_l: its first value, and the probabilities from there on; what cannot be told from zero is cut off."""
    start, p, mean, draws = 0, torch.ones(1, dtype=torch.float64), 0.0, 0
    for cell in sorted(cells, key=lambda cell: cell.draws):
        first, q = _hypergeometric(cell)
        p = _convolved(p, q)
        mean, draws = mean + cell.mean, draws + cell.draws
        half = math.sqrt(TAIL * draws)
        low = max(0, math.floor(mean - half) - start - first)
        high = max(low + 1, math.ceil(mean + half) - start - first + 1)
        start, p = start + first + low, p[low:high]
    return start, p / p.sum()


def _convolved(p: Tensor, q: Tensor) -> Tensor:
    """Distribution of a sum of two; rounding, of 1e-16, may not make a probability negative."""
    if min(len(p), len(q)) == 1:
        return p * q
    size = len(p) + len(q) - 1
    return torch.fft.irfft(torch.fft.rfft(p, size) * torch.fft.rfft(q, size), size).clamp(min=0.0)


def _hypergeometric(cell: Cell) -> tuple[int, Tensor]:
    """Probabilities of m_l from its first value on, by P(m + 1) / P(m) = (a - m) (b - m) / ((m + 1) (n - a - b + m + 1))."""
    n, a, b, half = cell.size, cell.a, cell.b, math.sqrt(TAIL * cell.draws)
    low = max(0, a + b - n, math.floor(cell.mean - half))
    high = min(a, b, math.ceil(cell.mean + half))
    m = torch.arange(low, high, dtype=torch.float64)
    steps = ((a - m).log() + (b - m).log() - (m + 1).log() - (n - a - b + m + 1).log()).cumsum(0)
    logs = torch.cat([steps.new_zeros(1), steps])
    p = (logs - logs.max()).exp()
    return low, p / p.sum()
