"""A matrix without what it does on a subspace, and the diagonal of what was taken away."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.errors import CurvkitError
from curvkit.linalg.basis import Basis, norm
from curvkit.linalg.certificate import ASYMMETRY, ROUNDING, assumed_error
from curvkit.linalg.hutchinson import refuse_not_finite
from curvkit.linalg.maps import LinearMap


class Complement:
    """P A P with P = I - Q'Q, a linear map again.

    Args:
        A: Symmetric, of order n.
        basis: The orthonormal rows Q; they must not change while the map is used.

    Cost: one product with A, and 4 r n multiplications for r rows.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> basis = Basis(2, torch.float32, torch.device("cpu"), capacity=1)
        >>> basis.append(torch.tensor([1.0, 0.0]))
        >>> Complement(DenseMap(torch.tensor([[5.0, 1.0], [1.0, 2.0]])), basis).matvec(torch.ones(2)).tolist()
        [0.0, 2.0]
    """

    def __init__(self, A: LinearMap, basis: Basis) -> None:
        self.A, self.basis = A, basis
        self.n, self.dtype, self.device = A.n, A.dtype, A.device

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n]."""
        return self._projected(self.A.matvec(self._projected(v)))

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors, [n, k] -> [n, k]."""
        W = torch.stack([self._projected(v) for v in V.unbind(1)], dim=1)
        return torch.stack([self._projected(y) for y in self.A.matmat(W).unbind(1)], dim=1)

    def _projected(self, v: Tensor) -> Tensor:
        """P v; once, since what the rounding leaves along Q is of no size beside that of v."""
        return v - self.basis.combine(self.basis.coefficients(v)[:, None])[0]


def known_diagonal(A: LinearMap, basis: Basis) -> Tensor:
    """The diagonal of A - P A P, P = I - Q'Q, for any orthonormal rows Q.

        diag(Q'QA + AQ'Q - Q'QAQ'Q) = sum_a (2 q_a * (A q_a) - q_a * (Q'Q A q_a))

    Args:
        A: Symmetric, of order n.
        basis: The r rows Q.

    Returns:
        [n].

    Raises:
        CurvkitError: If a product has NaN or infinite entries, or the products are not those of a symmetric matrix.

    Cost: r products and 4 r^2 n multiplications; four vectors of memory beside the basis.
    Accuracy: exact up to rounding, whatever the rows are; with P A P sampled without bias, the sum is unbiased for diag A.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> basis = Basis(2, torch.float32, torch.device("cpu"), capacity=1)
        >>> basis.append(torch.tensor([1.0, 0.0]))
        >>> known_diagonal(DenseMap(torch.tensor([[5.0, 1.0], [1.0, 2.0]])), basis).tolist()   # P A P has 2 as its last entry
        [5.0, 0.0]
    """
    r, total = basis.size, torch.zeros(basis.n, dtype=basis.dtype, device=basis.device)
    H, scale = torch.zeros(r, r, dtype=torch.float64), 0.0
    for a, unit in enumerate(torch.eye(r, dtype=torch.float64)):
        q = basis.combine(unit[:, None])[0]
        y = A.matvec(q)
        H[:, a] = column = basis.coefficients(y).double().cpu()
        refuse_not_finite(column, f"with basis vector {a + 1}", measure="diagonal")
        scale = max(scale, norm(y))
        total += q * (2 * y - basis.combine(column[:, None])[0])
    if r:
        refuse_asymmetric(A, (H - H.T).abs().max().item(), scale)
    return total


def refuse_asymmetric(A: LinearMap, asymmetry: float, scale: float) -> None:
    """Refuse products of no symmetric matrix, whose diagonal these formulas do not give.

    Args:
        A: The map; what rounding its products have is read from it.
        asymmetry: Largest |u'Av - v'Au| that was seen, for unit vectors.
        scale: Of the matrix: the longest product of a unit vector.

    Raises:
        CurvkitError: If that is more than rounding.
    """
    limit = ASYMMETRY * assumed_error(A) / ROUNDING * scale
    if asymmetry > limit:
        raise CurvkitError(
            f"diagonal: the products are not those of a symmetric matrix (u'Av and v'Au differ by {asymmetry:.2g}, {limit:.1g} is allowed "
            "for rounding). Either a second derivative in this model is wrong, as that of a custom function marked once_differentiable, or "
            "products do not repeat. Leave these parameters out by patterns, or compute in float64 if the model is badly scaled."
        )
