"""Rank correlation over many tensors at once, without putting them together where they are large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.projection.matching import pieces

SORTED = 1 << 20
"""Up to so many numbers ranks come from sorting."""
SHIFT = 11
"""Bits of a float32 that are left away in the histogram: bins have a relative width of 2^-12."""
BINS = (1 << (31 - SHIFT)) + 1
"""Of |x|: zero, and the leading 20 bits below the sign; 8 MiB of counts."""


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho."""

    value: float | None
    """None: all numbers of one side are equal, or fell into one bin, so that no order was seen; `error` is 1 then."""
    error: float
    """It is off by this at most; 0 where ranks come from sorting."""


def spearman(a: Sequence[Tensor], b: Sequence[Tensor], *, sort_up_to: int = SORTED) -> RankCorrelation:
    """Spearman's correlation of |a| and |b| over all entries, equal ones sharing the mean of their ranks.

        rho = sum_j (r_j - m) (q_j - m) / sqrt(sum_j (r_j - m)^2 sum_j (q_j - m)^2),    m = (n + 1) / 2

    Above `sort_up_to` entries ranks come from histograms: all entries of a bin share the mean of their ranks, and zeros have a bin of their
    own. With c entries in a bin its ranks have moved by at most E = sum (c^3 - c) / 12 in squares, zeros apart, and with R the sum of
    squares from the histogram and rho' its correlation

        |rho - rho'| <= (sqrt(E_a R_b) + sqrt(R_a E_b) + sqrt(E_a E_b)) / sqrt(R_a R_b)
                        + |rho'| (1 - sqrt(R_a R_b / ((R_a + E_a) (R_b + E_b)))).

    Args:
        a: Tensors; NaN is not allowed.
        b: Of the same shapes, in the same order.
        sort_up_to: Entries.

    Returns:
        rho, and the bound.

    Cost: sorting n numbers twice, in about 40 bytes each, up to `sort_up_to`; beyond, two passes in a tenth of the time, and 100 MiB.
    Accuracy: exact, or within the bound: 1e-4 for entries that are spread over three decades, more where many entries have one
        value that is not zero.

    Example:
        >>> round(spearman([torch.tensor([1.0, -2.0, 3.0])], [torch.tensor([10.0, 20.0, 5.0])]).value, 6)
        -0.5
    """
    n = sum(tensor.numel() for tensor in a)
    if n == 0:
        return RankCorrelation(None, 0.0)
    if n <= sort_up_to:
        r, q = (_ranks(torch.cat([_sizes(x).to(a[0].device) for x in side])) for side in (a, b))
        return RankCorrelation(_correlation(_Products().plus(r, q)), 0.0)
    (mean_a, slack_a), (mean_b, slack_b) = _binned(a), _binned(b)
    found = _Products()
    for x, y in zip(a, b, strict=True):
        for u, v in pieces(x, y):
            found = found.plus(mean_a[_bins(u).cpu()], mean_b[_bins(v).cpu()])
    rho = _correlation(found)
    if rho is None:
        return RankCorrelation(None, 0.0 if not slack_a and not slack_b else 1.0)
    aa, bb = found.aa, found.bb
    moved = math.sqrt(slack_a * bb) + math.sqrt(aa * slack_b) + math.sqrt(slack_a * slack_b)
    shrunk = 1 - math.sqrt(aa / (aa + slack_a) * bb / (bb + slack_b))
    return RankCorrelation(rho, moved / math.sqrt(aa * bb) + abs(rho) * shrunk)


@dataclass(frozen=True)
class _Products:
    """Sums of products of centred ranks."""

    aa: float = 0.0
    ab: float = 0.0
    bb: float = 0.0

    def plus(self, r: Tensor, q: Tensor) -> _Products:
        """Add entries."""
        return _Products(
            self.aa + torch.dot(r, r).item(), self.ab + torch.dot(r, q).item(), self.bb + torch.dot(q, q).item()
        )


def _correlation(sums: _Products) -> float | None:
    if not sums.aa or not sums.bb:
        return None
    return max(-1.0, min(1.0, sums.ab / math.sqrt(sums.aa) / math.sqrt(sums.bb)))


def _sizes(x: Tensor) -> Tensor:
    """|x|, flat, in float32 or float64."""
    return x.detach().reshape(-1).abs().to(torch.promote_types(x.dtype, torch.float32))


def _ranks(x: Tensor) -> Tensor:
    """Ranks less their mean, [n] float64; equal entries share a rank."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return _middles(counts)[inverse]


def _middles(counts: Tensor) -> Tensor:
    """Mean rank of each of the groups that follow each other, less the mean of all."""
    ends = counts.cumsum(0).double()
    return ends - counts.double() / 2 - ends[-1] / 2


def _binned(tensors: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Centred mean rank of each bin, on the CPU, and by how much ranks within bins may differ from it, in squares."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for tensor in tensors:
        for (piece,) in pieces(tensor):
            counts += torch.bincount(_bins(piece).cpu(), minlength=BINS)
    c = counts[1:].double()
    return _middles(counts), ((c**3 - c).sum() / 12).item()


def _bins(x: Tensor) -> Tensor:
    """Which bin |x| is in: 0 for zero, then by the leading bits of its float32 pattern, which grow with it."""
    bits = x.abs().float().view(torch.int32)
    return torch.where(x == 0, 0, (bits >> SHIFT) + 1).long()
