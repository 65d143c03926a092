"""What Lanczos knows after some products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.linalg import missed
from curvkit.linalg.basis import Basis
from curvkit.linalg.settings import allowed

SPANNED = 32
"""Up to this order the whole space is spanned, so that multiplicities are exact."""


@dataclass(frozen=True, eq=False)
class LanczosState:
    """What is known after some products: Ritz values, with the recurrence's estimates of their residuals.

    The numbers stay; the vectors can be computed until the next state is asked for, because a restart gives up the basis.
    """

    values: Tensor
    """[k] float64, descending: the wanted Ritz values; fewer than asked for while the basis is smaller."""
    residuals: Tensor
    """[k] float64: estimates, exact in exact arithmetic."""
    highest: float
    """Largest Ritz value so far, wanted or not."""
    lowest: float
    """Smallest Ritz value so far."""
    products: int
    steps: int
    """Blocks multiplied since the beginning."""
    restarts: int
    spanned: bool
    """True: the basis spans R^n, so nothing can be missing."""
    asymmetry: float
    """Largest |q_i'A q_j| with j > i + 1 in the run from the start vector, zero for a symmetric matrix up to rounding; 0 for blocks."""
    chain: missed.Chain | None
    """The run from the start vector up to the first restart or breakdown, for the bounds; None for blocks."""
    basis: Basis
    weights: Tensor
    """[m, k] float64: the Ritz vectors in terms of the basis."""

    @property
    def scale(self) -> float:
        """Largest |Ritz value| so far: the estimate of ||A||."""
        return max(abs(self.highest), abs(self.lowest))

    def vectors(self) -> Tensor:
        """Compute the Ritz vectors.

        Returns:
            [k, n], one unit vector per row.

        Cost: m k n multiplications; k n numbers.
        """
        rows = self.basis.combine(self.weights, self.weights.shape[0])
        return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    def settled(self, num: int, tolerance: float) -> bool:
        """Whether `num` values are there and their estimated residuals are small enough.

        Args:
            num: How many were asked for.
            tolerance: See `allowed`.

        Returns:
            False, too, before four steps and three vectors more than `num`: a start that happens to lie close to an invariant
            subspace must not end the search. Up to n = 32 the whole space is spanned first.
        """
        enough = self.steps >= 4 and self.weights.shape[0] >= num + 3 and self.basis.n > SPANNED
        return (self.spanned or enough) and bool((self.residuals <= allowed(self.values, self.scale, tolerance)).all())
