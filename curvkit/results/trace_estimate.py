"""A trace with its interval, and the shares of it that belong to parts of the coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TraceParts:
    """Sums of the diagonal over p consecutive runs of coordinates, as known + the mean of samples."""

    lengths: tuple[int, ...]
    """[p] coordinates of each part."""
    known: Tensor
    """[p] float64: what was computed without sampling."""
    samples: Tensor
    """[m, p] float64: one row per probe; no rows where nothing was sampled."""

    @property
    def values(self) -> Tensor:
        """[p] float64, unbiased; their sum is the trace."""
        return self.known + (self.samples.mean(0) if len(self.samples) else 0.0)

    @property
    def stderr(self) -> Tensor:
        """[p] standard errors: 0 where nothing was sampled, NaN for a single probe."""
        m = len(self.samples)
        if m == 0:
            return torch.zeros_like(self.known)
        return self.samples.std(0) / m**0.5 if m > 1 else torch.full_like(self.known, torch.nan)

    def merged(self, counts: Sequence[int]) -> TraceParts:
        """Join neighbouring parts; errors of parts are correlated, so that they are joined probe by probe.

        Args:
            counts: How many consecutive parts each new one takes; they add up to p.

        Returns:
            The coarser parts.

        Example:
            >>> fine = TraceParts((1, 1, 1), torch.arange(3.0).double(), torch.zeros(0, 3).double())
            >>> fine.merged([1, 2]).values.tolist()
            [0.0, 3.0]
        """
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        lengths = tuple(sum(piece.tolist()) for piece in torch.tensor(self.lengths).split(list(counts)))
        known = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owner, self.known)
        samples = torch.zeros(len(self.samples), len(counts), dtype=torch.float64).index_add_(1, owner, self.samples)
        return TraceParts(lengths, known, samples)


@dataclass(frozen=True)
class ProductCheck:
    """What a few probes show of the products themselves."""

    products: int
    """That it took, beside those of the estimate and its budget."""
    rounding: float | None
    """How far rounding puts a trace from these products off, as the probes show it; None: not measured."""
    product_error: float
    """Error of a product relative to its length, in the worst of them; assumed where rounding was not measured."""
    asymmetry: float
    """Largest |u'Av - v'Au| of two probes."""
    asymmetry_limit: float
    """How much of that may be rounding."""


@dataclass(frozen=True, eq=False)
class TraceEstimate:
    """The trace of a symmetric matrix, with the doubt that comes from the probes, and from rounding where `check` has measured it.

    With the probability `confidence` over the draw of the probes the trace lies in [low, high].
    """

    value: float
    """Unbiased; in the unit of the matrix, loss / parameter^2 where it is a Hessian. NaN while nothing is known."""
    stderr: float
    """Standard error; 0 if exact, NaN if unknown (fewer than two probes)."""
    low: float
    high: float
    confidence: float
    """Of the interval; 1 if exact and its rounding was not measured."""
    probes: int
    """Random vectors that `stderr` rests on."""
    products: int
    """Products with the matrix, those of the check apart; with signs per example one for each probe."""
    method: str
    """"exact", "hutchinson", "deflated", "hutch++", "xtrace", "example-hutchinson" or "controlled"."""
    reason: str
    """Why this method."""
    converged: bool
    """The interval is as narrow as was asked for; if it is sampled, with 30 probes at least, when the rule looked at it."""
    tolerance: float
    """Half-width relative to |value| that was asked for."""
    absolute_tolerance: float | None = None
    """Half-width that suffices in any case; None: none."""
    exact: bool = False
    """Every diagonal entry was computed: nothing is in doubt but rounding, which is the interval where it was measured."""
    rank: int = 0
    """Dimensions whose trace was computed without sampling."""
    parts: TraceParts | None = field(default=None, repr=False)
    """Shares of parts of the coordinates; None where the method gives none."""
    rounding: float | None = None
    """What rounding adds to the half-width; None: not measured."""
    check: ProductCheck | None = None
    """Symmetry and rounding of the products; None: not looked at."""
    gradients: float | None = None
    """Work in gradients of the same data, where a product is one with signs per example; None: `products` say it."""

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    @property
    def allowed(self) -> float:
        """Half-width with which it counts as converged: max(tolerance |value|, absolute_tolerance)."""
        return max(self.tolerance * abs(self.value), self.absolute_tolerance or 0.0)
