"""A curvature matrix in the coordinates in which a diagonal preconditioner is the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.operators.protocol import CurvatureOperator
from curvkit.operators.scaled import Scaled, fitting, refuse_no_operator


class Preconditioned(Scaled):
    """B = D^-1/2 A D^-1/2, what an optimizer sees of the curvature A that divides its steps by a positive diagonal D.

        B w = lambda w    if and only if    D^-1 A u = lambda u,    u = D^-1/2 w

    So B is symmetric and has the eigenvalues of D^-1 A, which is not. For Adam without momentum D is sqrt(v) + eps, with v its second
    moment after correction of the bias: the largest eigenvalue of B times the learning rate is what must stay below 2 on a quadratic.
    The unit of B is that of A / D.

    Args:
        operator: A; any `CurvatureOperator`.
        diagonal: [n], the diagonal of D in the order of `operator.space`, in the operator's dtype and on its device; it is copied.

    Raises:
        InvalidArgument: If the operator is none, or the diagonal is of another shape, dtype or device, not finite or not positive.

    Cost: of a product, that of A and two multiplications by a vector; O(n) memory.
    Source: Cohen et al. (2022), "Adaptive gradient methods at the edge of stability", for the use with Adam.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> from curvkit.operators import Hessian
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> H = Hessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))   # [[2, 4], [4, 8]]
        >>> Preconditioned(H, torch.tensor([1.0, 4.0])).matvec(torch.tensor([1.0, 0.0])).tolist()
        [2.0, 2.0]
    """

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor) -> None:
        refuse_no_operator("Preconditioned", operator)
        super().__init__(operator, _inverse_root(fitting(operator, diagonal, of="Preconditioned", name="diagonal")))


def _inverse_root(diagonal: Tensor) -> Tensor:
    """1 / sqrt, if it is finite."""
    smallest = diagonal.min().item()
    if not smallest > 0.0:
        raise InvalidArgument(
            f"Preconditioned: the smallest entry of the diagonal is {smallest:.3g}; all must be positive. Add the optimizer's eps, as "
            "in sqrt(v) + eps, or leave parameters without a second moment out of the space."
        )
    scale = diagonal.rsqrt()
    if not bool(torch.isfinite(scale).all()):
        raise InvalidArgument(
            f"Preconditioned: the smallest entry of the diagonal, {smallest:.3g}, is too small for 1 / sqrt of it in {diagonal.dtype}. "
            "Add the optimizer's eps, or measure in float64."
        )
    return scale
