"""Sums over the entries of two diagonals, layer by layer, from which their agreement follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.projection.chance import AgainstChance
from curvkit.projection.matching import pieces

CONSTANT = 1e-14
"""Entries that differ from their mean by this part of it, in the root of the mean square, are the same but for rounding."""


@dataclass(frozen=True)
class Moments:
    """Of the entries a_j and b_j of one parameter, or of several."""

    n: int
    mean_a: float
    mean_b: float
    aa: float
    """sum (a_j - mean_a)^2."""
    ab: float
    bb: float
    square_b: float
    """sum b_j^2."""
    apart: float
    """sum (a_j - b_j)^2."""
    noise_a: float
    """Sum of squared standard errors; NaN: unknown."""
    noise_b: float
    signs_a: tuple[int, int, int]
    """How many are below zero, zero and above."""
    signs_b: tuple[int, int, int]
    same: int
    """Entries of the same sign."""

    @property
    def pearson(self) -> float | None:
        """Correlation; None where all entries of a side are the same."""
        flat_a, flat_b = self.n * (CONSTANT * self.mean_a) ** 2, self.n * (CONSTANT * self.mean_b) ** 2
        if self.aa <= flat_a or self.bb <= flat_b:
            return None
        return max(-1.0, min(1.0, self.ab / math.sqrt(self.aa) / math.sqrt(self.bb)))

    @property
    def ceiling(self) -> float | None:
        """Correlation that noise leaves to two independent estimates of one diagonal, sqrt((1 - S_a / aa) (1 - S_b / bb))."""
        if self.pearson is None:
            return None
        left = [1 - self.noise_a / self.aa, 1 - self.noise_b / self.bb]
        return math.nan if any(map(math.isnan, left)) else math.sqrt(max(0.0, left[0]) * max(0.0, left[1]))

    @property
    def relative_error(self) -> float | None:
        """Distance ||a - b|| / ||b||."""
        return math.sqrt(self.apart / self.square_b) if self.square_b else None

    @property
    def noise(self) -> float | None:
        """Root of the mean of ||a - b||^2 that standard errors alone account for, relative to ||b||."""
        return math.sqrt((self.noise_a + self.noise_b) / self.square_b) if self.square_b else None

    @property
    def sign(self) -> AgainstChance:
        """Share of the entries with the same sign; by chance, with one side in any other order, sum_s p_s q_s."""
        chance = (
            math.fsum(p * q for p, q in zip(self.signs_a, self.signs_b, strict=True)) / self.n**2 if self.n else None
        )
        return AgainstChance(self.same / self.n if self.n else None, chance)


def moments(a: Tensor, b: Tensor, stderr_a: Tensor | float, stderr_b: Tensor | float) -> Moments:
    """Sum over one parameter.

    Args:
        a: The entries.
        b: Of the same shape.
        stderr_a: Standard errors, or one for all.
        stderr_b: Likewise.

    Returns:
        The sums, in float64.

    Cost: two passes; 50 MiB at most.
    """
    n = a.numel()
    mean_a, mean_b = (x.sum(dtype=torch.float64).item() / n if n else 0.0 for x in (a, b))
    sums, signs = torch.zeros(5, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)
    for u, v in pieces(a, b):
        x, y = u.double(), v.double()
        below, above = (u < 0, v < 0), (u > 0, v > 0)
        same = (below[0] & below[1]) | (above[0] & above[1]) | ((u == 0) & (v == 0))
        counted = (below[0], u == 0, above[0], below[1], v == 0, above[1], same)
        signs += torch.stack([mask.count_nonzero() for mask in counted]).cpu()
        apart, square_b = (x - y).square().sum(), y.square().sum()
        x, y = x - mean_a, y - mean_b
        sums += torch.stack([x.square().sum(), (x * y).sum(), y.square().sum(), square_b, apart]).cpu()
    aa, ab, bb, square_b, apart = sums.tolist()
    noise_a, noise_b = _squares(stderr_a, n), _squares(stderr_b, n)
    counts: list[int] = signs.tolist()
    of_a, of_b = (counts[0], counts[1], counts[2]), (counts[3], counts[4], counts[5])
    return Moments(n, mean_a, mean_b, aa, ab, bb, square_b, apart, noise_a, noise_b, of_a, of_b, counts[6])


def together(parts: Sequence[Moments]) -> Moments:
    """Sums over several parameters from those over each.

        sum (a_j - mean)(b_j - mean') = sum_l [ (sum within l) + n_l (mean_l - mean) (mean'_l - mean') ]

    Args:
        parts: At least one entry among them.

    Returns:
        The sums.

    Source: Chan, Golub & LeVeque (1979).
    """
    n = sum(part.n for part in parts)
    mean_a, mean_b = math.fsum(p.n * p.mean_a for p in parts) / n, math.fsum(p.n * p.mean_b for p in parts) / n
    off = [(p.n, p.mean_a - mean_a, p.mean_b - mean_b) for p in parts]

    def total(field: str) -> float:
        return math.fsum(getattr(part, field) for part in parts)

    def count(field: str) -> tuple[int, int, int]:
        below, zero, above = (sum(getattr(part, field)[sign] for part in parts) for sign in range(3))
        return below, zero, above

    return Moments(
        n,
        mean_a,
        mean_b,
        total("aa") + math.fsum(m * x * x for m, x, _ in off),
        total("ab") + math.fsum(m * x * y for m, x, y in off),
        total("bb") + math.fsum(m * y * y for m, _, y in off),
        total("square_b"),
        total("apart"),
        total("noise_a"),
        total("noise_b"),
        count("signs_a"),
        count("signs_b"),
        sum(part.same for part in parts),
    )


def _squares(stderr: Tensor | float, n: int) -> float:
    if not isinstance(stderr, Tensor):
        return stderr * stderr * n
    return math.fsum(piece.double().square().sum().item() for (piece,) in pieces(stderr))
