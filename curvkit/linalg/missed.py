"""Could an eigenvalue beyond the last one found have been missed? A probability, from the random start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 30.0
"""Largest component of rounding errors along one eigenvector, in multiples of a random direction's, ||f|| / sqrt(n): up to 27 was
measured for Hessian products in float32 (a tanh network of 13 layers)."""


@dataclass(frozen=True)
class Chain:
    """A Lanczos run from one start vector up to its first restart or breakdown: T tridiagonal, A Q = Q T + beta_k q e_k'."""

    ritz: Tensor
    """[k] float64: eigenvalues of T, any order."""
    betas: Sequence[float]
    """beta_1 ... beta_k, the last one included."""
    random_share: float
    """Share of the start vector that is a random direction: q = (s + r u) / norm, u uniform on the sphere, this is r / (||s|| + r)."""
    n: int
    product_error: float
    """Error of one product relative to ||A||."""


def upper_bound(chain: Chain, confidence: float) -> float | None:
    """Bound the largest eigenvalue from above, with a probability over the random start.

    Let v be a unit eigenvector of lambda and c = v'q its component in the start vector q. From A Q = Q T + beta_k q_k e_k'

        |c|  <=  (beta_1 ... beta_k) / |(lambda - ritz_1) ... (lambda - ritz_k)|  +  e / (lambda - ritz_1)       (1)

    because q is the first row of Q and e_k' (lambda - T)^-1 e_1 = (beta_1 ... beta_{k-1}) / det(lambda - T). The second term
    is the rounding of the products, e. The right side falls for lambda > ritz_1, where ritz_1 is the largest. A start whose random
    share is r has |c| >= t = r (1 - confidence) sqrt(pi / 2n) with probability `confidence`, because the density of one coordinate
    of a uniform unit vector is at most sqrt(n / 2 pi) and a fixed shift cannot raise the mass near zero. So lambda is at
    most the point where the right side of (1) equals t.

    Args:
        chain: The run, before any restart.
        confidence: Probability of the claim, for example 0.99.

    Returns:
        The bound, in the unit of A; None if nothing useful follows.

    Accuracy: a theorem in exact arithmetic. Rounding is an assumption: e = product_error ||T|| sqrt(k) min(1, 30 / sqrt(n)), that is,
        errors of product_error ||T|| of which at most 30 times a random direction's share lies along v.
    Source: van Dorsselaer, Hochstenbach & van der Vorst (2000), probabilistic bounds from the Lanczos polynomial. Differs: a start
        that is random in part, and the rounding term.

    Example:
        >>> import torch
        >>> chain = Chain(torch.tensor([1.0, 3.0], dtype=torch.float64), [1.0, 0.0], 1.0, 30, 0.0)
        >>> round(upper_bound(chain, 0.99), 6)   # an invariant subspace: beta_2 = 0
        3.0
    """
    ritz, betas = chain.ritz, torch.tensor(chain.betas, dtype=torch.float64)
    size, top = ritz.abs().max().item(), ritz.max()
    least = chain.random_share * (1.0 - confidence) * math.sqrt(math.pi / (2 * chain.n))  # t
    e = chain.product_error * size * math.sqrt(len(ritz)) * min(1.0, ALIGNMENT / math.sqrt(chain.n))
    if not 0.0 < size < math.inf:
        return 0.0 if size == 0.0 and betas[-1] == 0.0 else None
    low, high = -16.0, 4.0  # the gap lambda - ritz_1 lies in size * [10^low, 10^high]
    for _ in range(3):
        gaps = size * torch.logspace(low, high, 400, dtype=torch.float64)
        log_decay = betas.log().sum() - (gaps[:, None] + (top - ritz)).log().sum(1)
        enough = (log_decay.exp() + e / gaps <= least).nonzero()
        if not len(enough):
            return None
        step, first = (high - low) / 399, int(enough[0])
        low, high = low + max(first - 1, 0) * step, low + first * step
    return top.item() + size * 10.0**high


def lower_bound(chain: Chain, confidence: float) -> float | None:
    """Bound the smallest eigenvalue from below: `upper_bound` of -A.

    Args:
        chain: The run, before any restart.
        confidence: Probability of the claim.

    Returns:
        The bound; None if nothing useful follows.
    """
    mirrored = upper_bound(
        Chain(-chain.ritz, chain.betas, chain.random_share, chain.n, chain.product_error), confidence
    )
    return None if mirrored is None else 0.0 - mirrored


def tridiagonal_chain(T: Tensor, last_beta: float, *, random_share: float, n: int, product_error: float) -> Chain:
    """Make the chain of a tridiagonal matrix.

    Args:
        T: [k, k] float64, symmetric and tridiagonal up to rounding.
        last_beta: Norm of what is left after the last step.
        random_share: Share of the start that is random.
        n: Order of A.
        product_error: Error of one product relative to ||A||.

    Returns:
        The chain with the eigenvalues of T.
    """
    betas = [abs(beta) for beta in torch.diagonal(T, -1).tolist()]
    return Chain(torch.linalg.eigvalsh(T), [*betas, last_beta], random_share, n, product_error)
