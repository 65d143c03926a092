"""A curvature matrix in the coordinates in which a diagonal preconditioner is the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.operators.protocol import CurvatureOperator
from curvkit.parameters import ParameterSpace


class Preconditioned:
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
        if not isinstance(operator, CurvatureOperator):
            raise InvalidArgument(
                f"Preconditioned: operator={type(operator).__name__} is not a curvature operator: it needs space, n, dtype, device, matvec "
                "and matmat. Pass a Hessian, a GGN, or a class of your own with these."
            )
        self.space: ParameterSpace = operator.space
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device
        self._operator = operator
        self._scale = self._inverse_root(diagonal)  # [n], the diagonal of D^-1/2

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector.

        Args:
            v: [n], on the operator's device and in its dtype.

        Returns:
            B v, [n].

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.

        Cost: one product with A.
        """
        self._check(v, 1)
        return self._operator.matvec(v * self._scale) * self._scale

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors.

        Args:
            V: [n, k].

        Returns:
            B V, [n, k].

        Raises:
            InvalidArgument: If `V` does not fit, or the parameters have changed.

        Cost: one `matmat` of A.
        """
        self._check(V, 2)
        return self._operator.matmat(V * self._scale[:, None]) * self._scale[:, None]

    def _inverse_root(self, diagonal: Tensor) -> Tensor:
        if not isinstance(diagonal, Tensor):
            raise InvalidArgument(
                f"Preconditioned: diagonal={type(diagonal).__name__} is no tensor; it must be [{self.n}], {self.dtype} on {self.device}. "
                "Convert it with torch.as_tensor(...).to(operator.device, operator.dtype)."
            )
        if diagonal.shape != (self.n,) or diagonal.dtype != self.dtype or diagonal.device != self.device:
            raise InvalidArgument(
                f"Preconditioned: a diagonal of shape {tuple(diagonal.shape)}, {diagonal.dtype} on {diagonal.device} was given; it must be "
                f"[{self.n}], {self.dtype} on {self.device}. Join parameter-shaped pieces with operator.space.join, and convert with "
                ".to(operator.device, operator.dtype)."
            )
        diagonal = diagonal.detach()
        if not bool(torch.isfinite(diagonal).all()):
            raise InvalidArgument(
                "Preconditioned: the diagonal has NaN or infinite entries. Check the optimizer state that it was taken from."
            )
        smallest = diagonal.min().item()
        if not smallest > 0.0:
            raise InvalidArgument(
                f"Preconditioned: the smallest entry of the diagonal is {smallest:.3g}; all must be positive. Add the optimizer's eps, as "
                "in sqrt(v) + eps, or leave parameters without a second moment out of the space."
            )
        scale = diagonal.rsqrt()
        if not bool(torch.isfinite(scale).all()):
            raise InvalidArgument(
                f"Preconditioned: the smallest entry of the diagonal, {smallest:.3g}, is too small for 1 / sqrt of it in {self.dtype}. "
                "Add the optimizer's eps, or measure in float64."
            )
        return scale

    def _check(self, V: Tensor, ndim: int) -> None:
        if V.ndim != ndim or V.shape[0] != self.n or V.dtype != self.dtype or V.device != self.device:
            raise InvalidArgument(
                f"Preconditioned: a tensor of shape {tuple(V.shape)}, {V.dtype} on {V.device} was given; matvec takes [{self.n}], matmat "
                f"[{self.n}, k], {self.dtype} on {self.device}. Convert it with .to(operator.device, operator.dtype)."
            )
