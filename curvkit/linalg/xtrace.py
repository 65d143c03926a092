"""XTrace: every vector serves once as the probe and otherwise in the sketch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.linalg.basis import Basis, dot, norm
from curvkit.linalg.deflation import BREAKDOWN
from curvkit.linalg.hutchinson import Draws, refuse_not_finite
from curvkit.linalg.maps import LinearMap

PURPOSE = "trace xtrace"


def steps(A: LinearMap, *, seed: int) -> Iterator[Draws]:
    """Leave each of k vectors out of the sketch in turn, and sample with it what is left of the matrix.

        tr_i = tr Q_i A Q_i' + (n - r_i) u_i'A u_i / ||u_i||^2,    u_i = (I - Q_i'Q_i) w_i,    Q_i' = orth(A w_j, j != i)

    and the estimate is the mean of the tr_i, its standard error their standard deviation over sqrt(k), times n / (n - k).

    Args:
        A: Symmetric, of order n.
        seed: Vector i depends on (seed, i) alone.

    Yields:
        The state after each vector, that is after two products; until k reaches n.

    Raises:
        CurvkitError: If a product has NaN or infinite entries.

    Cost: two products per vector, and 6 k n multiplications; 2 k n numbers of memory.
    Accuracy: exact where the rank of A is below k. The tr_i are not independent, so that the standard error is an estimate without
        a theorem; its measured coverage is in docs/concepts/trace.md.
    Source: Epperly, Tropp & Webber (2024), XTrace with their normalisation. Differs: Q grows by a row with each vector, so that the
        number of vectors need not be known before; and the factor n / (n - k), without which the standard error of a flat spectrum was
        0.53 of the true one at k = 0.6 n.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> state = [s for s, _ in zip(steps(DenseMap(torch.ones(6, 6)), seed=0), range(3))][-1]
        >>> round(state.value, 4), state.products
        (6.0, 4)
    """
    basis, omegas, products = Basis(A.n, A.dtype, A.device, capacity=A.n), list[Tensor](), 0
    R, W, H = (torch.zeros(0, 0, dtype=torch.float64) for _ in range(3))  # [r, k], [r, k], [r, r]
    forms: list[float] = []  # w_i'A w_i
    for index in range(A.n):
        omega = seeds.normal(A.n, seed, PURPOSE, index, dtype=A.dtype, device=A.device)
        omega *= math.sqrt(A.n) / norm(omega)
        y = A.matvec(omega).clone()
        forms.append(dot(omega, y))
        refuse_not_finite(torch.tensor(forms[-1]), f"with vector {index + 1}")
        omegas.append(omega)
        products += 1
        length = norm(y)
        column = basis.orthogonalize(y).double().cpu()
        left = norm(y)
        new = left > BREAKDOWN * torch.finfo(A.dtype).eps * length
        R = _bordered(R, column, left if new else None)
        W = torch.cat([W, basis.coefficients(omega).double().cpu()[:, None]], dim=1)
        if new:
            y /= left
            basis.orthogonalize(y)
            y /= norm(y)
            row = torch.tensor([[dot(y, w) for w in omegas]], dtype=torch.float64)
            basis.append(y)
            W = torch.cat([W, row])
            column = basis.coefficients(A.matvec(y)).double().cpu()
            refuse_not_finite(column, f"with basis vector {basis.size}")
            H = torch.cat([torch.cat([H, column[:-1, None]], dim=1), column[None]])
            products += 1
        values = left_out(R, W, H, torch.tensor(forms, dtype=torch.float64), A.n)
        k = len(values)
        correlated = A.n / (A.n - k) if k < A.n else 1.0
        stderr = correlated * (values.std() / k**0.5).item() if k > 1 else float("nan")
        yield Draws(values.mean().item(), stderr, k, products, 2, basis.size)


def left_out(R: Tensor, W: Tensor, H: Tensor, forms: Tensor, n: int) -> Tensor:
    """The k estimates tr_i, from small matrices alone.

    Q_i'Q_i = Q'(I - s_i s_i')Q with s_i the i-th column of R^-T, normalised. Where the A w_j are dependent, leaving one out changes
    nothing, and s_i is 0.

    Args:
        R: [r, k], A w_i = Q'R_i.
        W: [r, k], Q w_i.
        H: [r, r], QAQ'.
        forms: [k], w_i'A w_i.
        n: Order of A.

    Returns:
        [k] float64.
    """
    r, k = R.shape
    S = torch.zeros_like(R)
    if r == k and k > 0:
        S = torch.linalg.solve_triangular(R.T, torch.eye(k, dtype=R.dtype), upper=False)  # R^-T
        S = S / torch.linalg.vector_norm(S, dim=0)
    D = W - S * (S * W).sum(0)  # coordinates of Q_i'Q_i w_i
    remainder = forms - 2 * (D * R).sum(0) + (D * (H @ D)).sum(0)  # u_i'A u_i
    dimensions = n - (r - 1 if r == k else r)
    lengths = n - D.square().sum(0)  # ||u_i||^2
    scale = dimensions / lengths if dimensions > 0 else torch.zeros_like(lengths)
    return torch.trace(H) - (S * (H @ S)).sum(0) + scale * remainder


def _bordered(R: Tensor, column: Tensor, corner: float | None) -> Tensor:
    """R with one more column, and one more row if there is a corner."""
    grown = torch.cat([R, column[:, None]], dim=1)
    if corner is None:
        return grown
    row = torch.zeros(1, grown.shape[1], dtype=R.dtype)
    row[0, -1] = corner
    return torch.cat([grown, row])
