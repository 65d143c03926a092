"""Extreme eigenvalues of a symmetric matrix from its products: Lanczos with full reorthogonalization.

`steps` is the loop, an iterator of frozen states. `search` adds the stopping rule and the certificate, residuals recomputed with
true products; `eigenpairs` is its last word. The projected matrix T = Q'AQ is kept whole, so that a restart, a block
and a new direction after a breakdown are all the same Rayleigh-Ritz step on a growing orthonormal basis.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg import missed
from curvkit.linalg.basis import Basis, dot, norm
from curvkit.linalg.krylov import (
    Capacity,
    RandomVectors,
    Which,
    append_block,
    extend,
    gram,
    residual_estimates,
    start_block,
    wanted,
)
from curvkit.linalg.maps import LinearMap
from curvkit.results.eigenpairs import Eigenpairs

ROUNDING = 8.0
"""The rounding error of a product is taken as ROUNDING eps ||A||; measured for Hessian products in float32: 3.4 eps."""
BREAKDOWN = 10.0
"""What is left of a product below BREAKDOWN eps ||T|| is rounding: the space is invariant."""
SPANNED = 32
"""Up to this order the whole space is spanned, so that multiplicities are exact."""
SMALL = 1e-2
"""Residuals are judged relative to their eigenvalue, but not below SMALL times the largest |eigenvalue|."""
CONFIDENCE = 0.99
"""Probability of the claim that no eigenvalue lies beyond the bounds."""


@dataclass(frozen=True)
class Settings:
    """What is wanted, and what it may cost.

    Raises:
        InvalidArgument: If a value is out of range whatever the matrix is.
    """

    num: int = 1
    """How many eigenvalues, k."""
    which: Which = "largest"
    """"largest", "smallest" (both algebraic), "both" ends, or largest "magnitude"."""
    tolerance: float = 1e-3
    """Of the residuals, relative to their eigenvalues, see `allowed`."""
    block_size: int = 1
    """Vectors per step, b; multiplicities up to b can be seen."""
    max_products: int = 500
    """Products in all, the k of the certificate included."""
    max_seconds: float | None = None
    """After this time the certificate is made from what is there; None: no limit."""
    max_rows: int | None = None
    """Most vectors of length n that may be held at once, working vectors included; None: no limit."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.which not in get_args(Which):
            raise InvalidArgument(
                f"lanczos: which={self.which!r} is not one of {', '.join(get_args(Which))}. For sharpness use 'largest'."
            )
        if self.num < 1 or self.block_size < 1:
            raise InvalidArgument(
                f"lanczos: num={self.num!r} and block_size={self.block_size!r} must be at least 1. Both are 1 by default."
            )
        if not 0.0 < self.tolerance < 1.0:
            raise InvalidArgument(
                f"lanczos: tolerance={self.tolerance!r} must lie in (0, 1). It is relative to the eigenvalue; the default is 1e-3."
            )
        if self.max_products < self.num + self.block_size:
            raise InvalidArgument(
                f"lanczos: max_products={self.max_products!r} is too few: one step takes {self.block_size} and the residuals "
                f"{self.num}. Allow at least {self.num + self.block_size}; a few dozen is usual."
            )
        if self.max_seconds is not None and not self.max_seconds > 0.0:
            raise InvalidArgument(f"lanczos: max_seconds={self.max_seconds!r} must be positive, or None for no limit.")


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


def allowed(values: Tensor, scale: float, tolerance: float) -> Tensor:
    """The largest residual with which an eigenvalue counts as converged.

    Args:
        values: [k] eigenvalues.
        scale: The largest |eigenvalue| of the matrix.
        tolerance: Relative.

    Returns:
        [k]: tolerance * max(|value|, scale / 100); without the second, an eigenvalue of zero could never converge.

    Example:
        >>> allowed(torch.tensor([10.0, 0.0]), 10.0, 1e-3).tolist()
        [0.009999999776482582, 9.999999747378752e-05]
    """
    return tolerance * values.abs().clamp(min=SMALL * scale)


def steps(
    A: LinearMap, settings: Settings | None = None, *, start: Tensor | None = None, seed: int | None = None
) -> Iterator[LanczosState]:
    """Iterate block Lanczos, one state per block of products, until the space is spanned.

    The first vector is s / ||s|| + u, normalised, with s = `start` and u a random direction, or u alone: it always has a random part,
    so that no eigenvector is missed for sure. Each block W = A Q_j is orthogonalized twice against all rows of the basis; a
    remainder below 10 eps ||T|| is rounding, and a random direction takes its place. When the basis is full, the best
    Ritz vectors and the remainder are kept (thick restart). Budgets and tolerance are for whoever consumes the states.

    Args:
        A: Symmetric, of order n.
        settings: `num`, `which`, `block_size` and `max_rows` are read; None takes the defaults.
        start: [n], a direction rich in the wanted eigenvectors, for example the gradient.
        seed: Of the random directions; None draws one.

    Yields:
        A state after each block.

    Raises:
        InvalidArgument: If the settings do not fit the matrix.
        CurvkitError: If a product has NaN or infinite entries.

    Cost: b products and 4 m b n multiplications per step, m being the size of the basis.
    Source: Golub & Van Loan, Matrix Computations, 4th ed., ch. 10; restart: Wu & Simon (2000).

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> *_, last = steps(DenseMap(torch.diag(torch.tensor([3.0, 1.0, -2.0]))), seed=0)
        >>> round(last.values.item(), 5)
        3.0
    """
    settings = settings or Settings()
    num, which, block_size = settings.num, settings.which, settings.block_size
    _check_fit(A, settings, start)
    capacity = Capacity.within(settings.max_rows, n=A.n, num=num, block_size=block_size)
    random = RandomVectors(A, seeds.settle(seed))
    left, random_share = start_block(start, block_size, random)
    basis, T = Basis(A.n, A.dtype, A.device, capacity=capacity.rows), torch.zeros(0, 0, dtype=torch.float64)
    eps, scale, products, count, restarts = torch.finfo(A.dtype).eps, 0.0, 0, 0, 0
    plain, chain = block_size == 1, None  # plain: T is still tridiagonal, all of it from the start vector
    while basis.size < A.n:
        block, replaced = append_block(left, basis, BREAKDOWN * eps * scale, random)
        plain = plain and not (replaced and count > 0)
        W = A.matvec(block[0])[:, None] if len(block) == 1 else A.matmat(torch.stack(block, dim=1))  # [n, b]
        left = [w.clone() for w in W.unbind(1)]
        products, count = products + len(block), count + 1
        columns = torch.stack([basis.orthogonalize(w) for w in left]).double().cpu()
        _check_finite(columns, products)
        T = extend(T, columns)
        theta, S = torch.linalg.eigh(T)
        scale = theta.abs().max().item()
        chosen, spanned, inner = wanted(theta, num, which), basis.size == A.n, gram(left)
        if plain:
            beta = inner[0, 0].item() ** 0.5
            chain = missed.tridiagonal_chain(
                T,
                beta if beta > BREAKDOWN * eps * scale and not spanned else 0.0,
                random_share=random_share,
                n=A.n,
                product_error=ROUNDING * eps,
            )
        residuals = (
            torch.zeros(len(chosen), dtype=torch.float64) if spanned else residual_estimates(inner, S[:, chosen])
        )
        yield LanczosState(
            theta[chosen],
            residuals,
            theta[-1].item(),
            theta[0].item(),
            products,
            count,
            restarts,
            spanned,
            chain,
            basis,
            S[:, chosen],
        )
        if basis.size + block_size > capacity.rows and not spanned:
            best = wanted(theta, capacity.kept, which)
            basis.restart(basis.combine(S[:, best]))
            T, restarts, plain = torch.diag(theta[best]), restarts + 1, False


def search(
    A: LinearMap, settings: Settings | None = None, *, start: Tensor | None = None, seed: int | None = None
) -> Iterator[Eigenpairs]:
    """Run `steps` until the residuals are small, then recompute them with true products.

    Stops when each recomputed residual ||A v - theta v|| is at most `allowed`, about `tolerance` |theta|, or when the budget is spent;
    agreement of successive values is never a reason to stop. If the recomputed residuals do not confirm the estimates, it goes
    on with a four times smaller aim, three times at most.

    Args:
        A: Symmetric, of order n.
        settings: What is wanted; None takes the defaults.
        start: [n], a direction rich in the wanted eigenvectors.
        seed: Of the random directions; None draws one.

    Yields:
        Partial results with estimated residuals and no vectors, and last the result with recomputed residuals.

    Raises:
        InvalidArgument: If the settings do not fit the matrix, or the tolerance is below the rounding of its dtype.
        CurvkitError: If a product has NaN or infinite entries.
    """
    settings = settings or Settings()
    least = ROUNDING * torch.finfo(A.dtype).eps
    if settings.tolerance < least:
        raise InvalidArgument(
            f"lanczos: tolerance={settings.tolerance!r} is below {least:.2g}, the rounding of products in {A.dtype}. "
            "Allow more, or compute in float64."
        )
    began, spent, aim = time.monotonic(), 0, settings.tolerance
    for state in steps(A, settings, start=start, seed=seed):
        partial = _partial(A, state, settings, spent)
        yield partial
        last = state.spanned or partial.products + settings.block_size + settings.num > settings.max_products
        last = last or (settings.max_seconds is not None and time.monotonic() - began > settings.max_seconds)
        if last or state.settled(settings.num, aim):
            pairs = _certified(A, state, partial)
            spent, aim = spent + settings.num, aim / 4
            if (
                last
                or pairs.all_converged
                or aim < settings.tolerance / 64
                or pairs.products + settings.num >= settings.max_products
            ):
                yield pairs
                return


def eigenpairs(
    A: LinearMap, num: int = 1, *, start: Tensor | None = None, seed: int | None = None, **options: Any
) -> Eigenpairs:
    """Compute extreme eigenpairs with recomputed residuals: the last result of `search`.

    Args:
        A: Symmetric, of order n.
        num: How many eigenvalues, k.
        start: [n], a direction rich in the wanted eigenvectors.
        seed: Of the random directions; None draws one.
        **options: The other fields of `Settings`.

    Returns:
        The pairs; `converged` says which of them met the tolerance.

    Raises:
        InvalidArgument: If an option is out of range.
        CurvkitError: If a product has NaN or infinite entries.

    Cost: the products that it says, and O(m n) memory for a basis of m rows.
    Accuracy: `intervals` holds an eigenvalue each; `upper_bound` with probability 0.99 over the start.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> pairs = eigenpairs(DenseMap(torch.diag(torch.arange(100.0).double())), 2, seed=0)
        >>> [round(value) for value in pairs.values.tolist()], pairs.all_converged
        ([99, 98], True)
    """
    *_, last = search(A, Settings(num=num, **options), start=start, seed=seed)
    return last


def _partial(A: LinearMap, state: LanczosState, settings: Settings, spent: int) -> Eigenpairs:
    """What a state says, its residuals being estimates."""
    rounding = ROUNDING * torch.finfo(A.dtype).eps * state.scale
    if state.spanned:
        upper, lower, confidence = state.highest + rounding, state.lowest - rounding, 1.0
    elif state.chain:
        upper, lower = missed.upper_bound(state.chain, CONFIDENCE), missed.lower_bound(state.chain, CONFIDENCE)
        confidence = CONFIDENCE
    else:
        upper, lower, confidence = None, None, None
    return Eigenpairs(
        values=state.values,
        residuals=state.residuals,
        converged=state.residuals <= allowed(state.values, state.scale, settings.tolerance),
        vectors=None,
        recomputed=False,
        which=settings.which,
        tolerance=settings.tolerance,
        scale=state.scale,
        rounding=rounding,
        products=state.products + spent,
        upper_bound=upper,
        lower_bound=lower,
        confidence=confidence,
        multiplicities_below=A.n + 1 if state.spanned else settings.block_size,
    )


def _certified(A: LinearMap, state: LanczosState, partial: Eigenpairs) -> Eigenpairs:
    """The same with Rayleigh quotients and residuals from one true product per vector."""
    rows = state.vectors()  # [k, n]
    products = A.matmat(rows.T).T if len(rows) > 1 else A.matvec(rows[0])[None]
    values = torch.tensor([dot(v, Av) / dot(v, v) for v, Av in zip(rows, products, strict=True)], dtype=torch.float64)
    residuals = torch.tensor(
        [norm(Av - theta * v) / norm(v) for v, Av, theta in zip(rows, products, values.tolist(), strict=True)],
        dtype=torch.float64,
    )
    order = values.argsort(descending=True)
    return replace(
        partial,
        values=values[order],
        residuals=residuals[order],
        converged=residuals[order]
        <= allowed(values[order], state.scale, partial.tolerance).clamp(min=partial.rounding),
        vectors=rows[order].T,
        recomputed=True,
        products=partial.products + len(rows),
    )


def _check_fit(A: LinearMap, settings: Settings, start: Tensor | None) -> None:
    if max(settings.num, settings.block_size) > A.n:
        raise InvalidArgument(
            f"lanczos: num={settings.num} and block_size={settings.block_size} must not exceed the order of the matrix, {A.n}. "
            "Ask for fewer eigenvalues."
        )
    if start is not None and start.shape != (A.n,):
        raise InvalidArgument(
            f"lanczos: start has shape {tuple(start.shape)}, the matrix has order {A.n}. Pass a vector [{A.n}]."
        )


def _check_finite(columns: Tensor, count: int) -> None:
    """Check Q'A q, to which every entry of A q contributes."""
    if not bool(torch.isfinite(columns).all()):
        raise CurvkitError(
            f"lanczos: product {count} with the matrix has NaN or infinite entries. The function or its derivatives overflow there: "
            "check weights and data for NaN, or compute in float64."
        )
