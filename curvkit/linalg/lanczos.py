"""Extreme eigenvalues of a symmetric matrix from its products: Lanczos with full reorthogonalization.

`steps` is the loop, an iterator of frozen states. `search` adds the stopping rule and the certificate, residuals recomputed with
true products; `eigenpairs` is its last word. The projected matrix T = Q'AQ is kept whole, so that a restart, a block
and a new direction after a breakdown are all the same Rayleigh-Ritz step on a growing orthonormal basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg import missed
from curvkit.linalg.basis import Basis
from curvkit.linalg.certificate import (
    AS_COMPUTED,
    CONFIDENCE,
    ROUNDING,
    OtherArithmetic,
    assumed_error,
    asymmetry_limit,
    certified,
    partial,
)
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
from curvkit.linalg.recorded import clock_of
from curvkit.linalg.settings import Settings, allowed
from curvkit.linalg.state import SPANNED, LanczosState
from curvkit.results.eigenpairs import Eigenpairs

__all__ = [
    "CONFIDENCE",
    "ROUNDING",
    "SPANNED",
    "LanczosState",
    "OtherArithmetic",
    "Settings",
    "Which",
    "allowed",
    "asymmetry_limit",
    "eigenpairs",
    "search",
    "steps",
    "wanted",
]

BREAKDOWN = 10.0
"""What is left of a product below BREAKDOWN eps ||T|| is rounding: the space is invariant."""


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
    asymmetry = 0.0
    while basis.size < A.n:
        block, replaced = append_block(left, basis, BREAKDOWN * eps * scale, random)
        plain = plain and not (replaced and count > 0)
        W = A.matvec(block[0])[:, None] if len(block) == 1 else A.matmat(torch.stack(block, dim=1))  # [n, b]
        left = [w.clone() for w in W.unbind(1)]
        del W
        products, count = products + len(block), count + 1
        columns = torch.stack([basis.orthogonalize(w) for w in left]).double().cpu()
        _check_finite(columns, products)
        T = extend(T, columns)
        theta, S = torch.linalg.eigh(T)
        scale = theta.abs().max().item()
        _check_range(scale)
        chosen, spanned, inner = wanted(theta, num, which), basis.size == A.n, gram(left)
        if plain:
            asymmetry = max(asymmetry, columns[0, : max(len(T) - 2, 0)].abs().amax().item() if len(T) > 2 else 0.0)
            chain = missed.tridiagonal_chain(
                T,
                0.0 if spanned else inner[0, 0].item() ** 0.5,
                random_share=random_share,
                n=A.n,
                product_error=assumed_error(A),
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
            asymmetry,
            chain,
            basis,
            S[:, chosen],
        )
        if basis.size + block_size > capacity.rows and not spanned:
            best = wanted(theta, capacity.kept, which)
            basis.restart(basis.combine(S[:, best]))
            T, restarts, plain = torch.diag(theta[best]), restarts + 1, False


def search(
    A: LinearMap,
    settings: Settings | None = None,
    *,
    start: Tensor | None = None,
    seed: int | None = None,
    other: OtherArithmetic = AS_COMPUTED,
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
        other: The same matrix by other arithmetic, for residuals and rounding.

    Yields:
        Partial results with estimated residuals and no vectors, and last the result with recomputed residuals.

    Raises:
        InvalidArgument: If the settings do not fit the matrix, or the tolerance is below the rounding of its dtype.
        CurvkitError: If a product has NaN or infinite entries.
    """
    settings = settings or Settings()
    least = assumed_error(A)
    if settings.tolerance < least:
        arithmetic = getattr(A, "arithmetic", A.dtype)
        raise InvalidArgument(
            f"lanczos: tolerance={settings.tolerance!r} is below {least:.2g}, the rounding of products in {arithmetic}. "
            "Allow more, or compute in float64."
        )
    clock = clock_of(A)
    began, spent, aim = clock(), 0, settings.tolerance
    still = settings.block_size + other.products(settings.num)  # products of one more step and its certificate
    for state in steps(A, settings, start=start, seed=seed):
        estimate = partial(A, state, settings, spent)
        yield estimate
        last = state.spanned or estimate.products + still > settings.max_products
        last = last or (settings.max_seconds is not None and clock() - began > settings.max_seconds)
        if last or state.settled(settings.num, aim):
            pairs = certified(A, state, estimate, other)
            _check_finite(pairs.residuals, pairs.products)
            spent, aim = pairs.products - state.products, aim / 4
            hopeless = aim < settings.tolerance / 64 or pairs.products + still > settings.max_products
            hopeless = hopeless or pairs.rounding > settings.tolerance * pairs.scale  # more steps do not make it less
            if last or pairs.all_converged or hopeless:
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


def _check_range(scale: float) -> None:
    """Squares of norms must neither vanish nor overflow in float64."""
    if 0.0 < scale < 1e-140 or scale > 1e140:
        raise CurvkitError(
            f"lanczos: the matrix has a norm of {scale:.0e}, whose square is outside of the range of float64. "
            "Multiply the function by a constant, and divide the eigenvalues by it."
        )


def _check_finite(columns: Tensor, count: int) -> None:
    """Check Q'A q, or a residual, to which every entry of A q contributes."""
    if not bool(torch.isfinite(columns).all()):
        raise CurvkitError(
            f"lanczos: product {count} with the matrix has NaN or infinite entries. The function or its derivatives overflow there: "
            "check weights and data for NaN, or compute in float64."
        )
