"""XDiag: the diagonal by vectors that serve once as the probe and otherwise in the sketch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.linalg.basis import Basis, norm
from curvkit.linalg.complement import refuse_asymmetric
from curvkit.linalg.deflation import BREAKDOWN
from curvkit.linalg.hutchinson import refuse_not_finite
from curvkit.linalg.maps import LinearMap

PURPOSE = "xdiag"
LEFT = 1e-10
"""A vector whose share in the span of the products is below this, squared, could be left out without changing the span."""


@dataclass(frozen=True, eq=False)
class Exchangeable:
    """Sketch, products and small matrices after k vectors; `diagonals` are its k estimates."""

    signs: tuple[Tensor, ...]
    """w_1 ... w_k, each [n] int8."""
    basis: Basis
    """The first r rows are Q = orth(A w_1, ..., A w_k)."""
    images: Basis
    """The first r rows are QA; they are not orthonormal."""
    R: Tensor
    """[r, k] float64, A w_i = Q'R_i."""
    H: Tensor
    """[r, r] float64, QAQ'."""
    products: int

    @property
    def num_vectors(self) -> int:
        """How many vectors there are, k."""
        return self.R.shape[1]

    def diagonals(self) -> Iterator[Tensor]:
        """Leave each vector out of the sketch in turn, and sample with it what is left of the matrix.

        Yields:
            [n], d_i for each i; their mean is the estimate. One tensor, overwritten each time.

        Cost: 5 r n multiplications each, and 2 r^2 n before the first; eight vectors of memory beside the rows.
        """
        d, whole = (torch.zeros(self.basis.n, dtype=self.basis.dtype, device=self.basis.device) for _ in range(2))
        for a in range(len(self.H)):
            self._add_known(whole, a)
        for i, s in enumerate(left_out_directions(self.R).T):
            self._sample(d, i, s)
            yield d.add_(whole)

    def _add_known(self, whole: Tensor, a: int) -> None:
        """Add row a's part of diag(Q'QA + AQ'Q - Q'QAQ'Q) to `whole`."""
        unit = torch.zeros(len(self.H), 1, dtype=torch.float64)
        unit[a] = 1.0
        q, projected = self.basis.combine(torch.cat([unit, self.H[:, a : a + 1]], dim=1), len(self.H))
        whole += self.images.combine(unit, len(self.H))[0].mul_(2.0).sub_(projected).mul_(q)

    def _sample(self, d: Tensor, i: int, s: Tensor) -> None:
        """Fill `d` with d_i, but for what all have in common."""
        R, H = self.R[:, i], self.H
        c = self.basis.coefficients(d.copy_(self.signs[i]), len(H)).cpu()
        c = c - s * (s @ c)  # Q_i w_i in the coordinates of Q
        e = R - H @ c  # Q A P_i w_i
        e = e - s * (s @ e)
        t, projected, left = self.basis.combine(torch.stack([s, H @ s, R - e], dim=1), len(H))
        image, taken = self.images.combine(torch.stack([s, c], dim=1), len(H))
        d.mul_(left.sub_(taken))  # w_i * P_i A P_i w_i
        d -= image.sub_(projected).mul_(2.0).add_(t, alpha=(s @ H @ s).item()).mul_(t)


def steps(A: LinearMap, *, seed: int, most: int) -> Iterator[Exchangeable]:
    """Estimate a diagonal from k vectors, each of which is left out of the sketch in turn.

        d_i = diag(A - P_i A P_i) + w_i * (P_i A P_i w_i),    P_i = I - Q_i'Q_i,    Q_i = orth(A w_j, j != i)

    with signs w_i, and the estimate is the mean of the d_i.

    Args:
        A: Symmetric, of order n.
        seed: Vector i depends on (seed, i) alone.
        most: k at which it ends, at most n.

    Yields:
        The state after each vector, that is after two products; it stays as it is.

    Raises:
        CurvkitError: If a product has NaN or infinite entries, or the products are not those of a symmetric matrix.

    Cost: two products per vector, one where A w_i lies in the span of those before, and 8 k n multiplications; 2 k n numbers of memory,
        and k n bytes.
    Accuracy: each d_i is unbiased, because Q_i does not depend on w_i; exact where the rank of A is below k, but for signs
        whose products happen to be dependent.
    Source: Epperly, Tropp & Webber (2024), XDiag. Differs: what is sampled is P A P, not P A, since A is symmetric, which costs no
        product and has smaller rows; and Q grows by a row with each vector.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> *_, state = steps(DenseMap(torch.ones(3, 3)), seed=0, most=2)
        >>> [[round(entry, 4) for entry in d.tolist()] for d in state.diagonals()], state.products
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], 3)
    """
    basis, images = (Basis(A.n, A.dtype, A.device, capacity=most) for _ in range(2))
    R, H = (torch.zeros(0, 0, dtype=torch.float64) for _ in range(2))
    signs: tuple[Tensor, ...] = ()
    products, scale, asymmetry = 0, 0.0, 0.0
    for index in range(most):
        omega = seeds.signs(A.n, seed, PURPOSE, index, dtype=A.dtype, device=A.device)
        signs = (*signs, omega.to(torch.int8))
        y = A.matvec(omega).clone()
        products, length = products + 1, norm(y)
        refuse_not_finite(torch.tensor(length), f"with vector {index + 1}", measure="diagonal")
        R = _column(R, basis.orthogonalize(y))
        left = norm(y)
        if left > BREAKDOWN * torch.finfo(A.dtype).eps * length:
            y /= left
            basis.orthogonalize(y)
            y /= norm(y)
            R = _row(R, torch.zeros(index + 1, dtype=torch.float64))
            R[-1, -1] = left
            basis.append(y)
            image = A.matvec(y)
            products += 1
            column, against = basis.coefficients(image).double().cpu(), images.coefficients(y).double().cpu()
            refuse_not_finite(column, f"with basis vector {basis.size}", measure="diagonal")
            images.append(image)
            scale = max(scale, norm(image))
            asymmetry = max([asymmetry, *(column[:-1] - against).abs().tolist()])
            H = _row(_column(H, column[:-1]), column)
        refuse_asymmetric(A, asymmetry, scale)
        yield Exchangeable(signs, basis, images, R, H, products)


def left_out_directions(R: Tensor) -> Tensor:
    """Directions of the sketch that are lost when a vector is left out.

        Q_i'Q_i = Q'(I - s_i s_i')Q,    s_i' = e_i' R^+, normalised

    Args:
        R: [r, k] float64 of full row rank, A w_i = Q'R_i.

    Returns:
        [r, k], the s_i; 0 where the other vectors span all that the sketch does.

    Example:
        >>> left_out_directions(torch.eye(2).double()).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> left_out_directions(torch.ones(1, 2).double()).tolist()   # either one has the whole span
        [[0.0, 0.0]]
    """
    r, k = R.shape
    if r == k:  # upper triangular
        S = torch.linalg.solve_triangular(R.T, torch.eye(k, dtype=R.dtype), upper=False) if k else R
        return S / torch.linalg.vector_norm(S, dim=0)
    if r == 0:
        return R
    S = torch.linalg.pinv(R, rtol=0.0).T  # [r, k]
    needed = 1.0 - (S * R).sum(0) <= LEFT  # s_i'R_i = 1 where no other vector contributes to s_i
    return torch.where(needed, S / torch.linalg.vector_norm(S, dim=0), 0.0)


def _column(M: Tensor, column: Tensor) -> Tensor:
    """One more column."""
    return torch.cat([M, column.double().cpu()[:, None]], dim=1)


def _row(M: Tensor, row: Tensor) -> Tensor:
    """One more row."""
    return torch.cat([M, row.double().cpu()[None]])
