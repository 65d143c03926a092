"""A curvature matrix between two diagonals, with diagonals added inside and outside."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.operators.protocol import CurvatureOperator
from curvkit.parameters import ParameterSpace


class Scaled:
    """B = S (A + I) S + O with diagonal matrices S >= 0 (the scale), I (inner) and O (outer).

        B v = s * (A (s * v) + i * s * v) + o * v

    B is symmetric. Where all of s is positive it has the eigenvalues of S^2 (A + I) + O; a zero in s takes that coordinate out of A.
    An optimizer that multiplies the gradient by a diagonal S^2 sees A in this way, with a penalty of the weights in I and decay that
    bypasses the gradient in O. The unit of B is that of S^2 A.

    Args:
        operator: A; any `CurvatureOperator`.
        scale: [n], the diagonal of S in the order of `operator.space`, in the operator's dtype and on its device; not negative. All three
            diagonals are copied.
        inner: [n], the diagonal of I, likewise; any sign; None for zero.
        outer: [n], the diagonal of O, likewise; any sign; None for zero.

    Raises:
        InvalidArgument: If the operator is none, or a diagonal is of another shape, dtype or device, not finite, or a negative scale.

    Cost: of a product, that of A and at most four multiplications by a vector; O(n) memory.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> from curvkit.operators import Hessian
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> H = Hessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))   # [[2, 4], [4, 8]]
        >>> Scaled(H, torch.tensor([1.0, 0.5]), outer=torch.tensor([3.0, 0.0])).matvec(torch.tensor([1.0, 0.0])).tolist()
        [5.0, 2.0]
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        scale: Tensor,
        *,
        inner: Tensor | None = None,
        outer: Tensor | None = None,
    ) -> None:
        refuse_no_operator(type(self).__name__, operator)
        self.space: ParameterSpace = operator.space
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device
        self._operator = operator
        self._scale = fitting(operator, scale, of=type(self).__name__, name="scale")
        self._inner = None if inner is None else fitting(operator, inner, of=type(self).__name__, name="inner")
        self._outer = None if outer is None else fitting(operator, outer, of=type(self).__name__, name="outer")
        least = self._scale.min().item()
        if least < 0.0:
            raise InvalidArgument(
                f"{type(self).__name__}: the smallest entry of scale is {least:.3g}; none may be negative. "
                "Pass the square root of the diagonal that multiplies the gradient."
            )

    @property
    def product_error(self) -> float:
        """Error of a product relative to ||B||, taken over from what A states relative to ||A||; 0 where A states none."""
        return getattr(self._operator, "product_error", 0.0)

    @property
    def arithmetic(self) -> object:
        """Of the products with A, as messages name it."""
        return getattr(self._operator, "arithmetic", self.dtype)

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
        scaled = v * self._scale
        product = self._operator.matvec(scaled)
        return self._joined(v, scaled, product, 1)

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
        scaled = V * self._scale[:, None]
        product = self._operator.matmat(scaled)
        return self._joined(V, scaled, product, 2)

    def _joined(self, V: Tensor, scaled: Tensor, product: Tensor, ndim: int) -> Tensor:
        """S (A S V + I S V) + O V from V, S V and A S V, of one column or several."""
        shape = (self.n, 1) if ndim == 2 else (self.n,)
        if self._inner is not None:
            product = product + self._inner.view(shape) * scaled
        product = product * self._scale.view(shape)
        return product if self._outer is None else product + self._outer.view(shape) * V

    def _check(self, V: Tensor, ndim: int) -> None:
        if V.ndim != ndim or V.shape[0] != self.n or V.dtype != self.dtype or V.device != self.device:
            raise InvalidArgument(
                f"{type(self).__name__}: a tensor of shape {tuple(V.shape)}, {V.dtype} on {V.device} was given; matvec takes [{self.n}], "
                f"matmat [{self.n}, k], {self.dtype} on {self.device}. Convert it with .to(operator.device, operator.dtype)."
            )


def refuse_no_operator(of: str, operator: object) -> None:
    """Refuse what cannot be multiplied with.

    Args:
        of: Who was given it, for the message.
        operator: Anything.

    Raises:
        InvalidArgument: If it is no `CurvatureOperator`.
    """
    if not isinstance(operator, CurvatureOperator):
        raise InvalidArgument(
            f"{of}: operator={type(operator).__name__} is not a curvature operator: it needs space, n, dtype, device, matvec "
            "and matmat. Pass a Hessian, a GGN, or a class of your own with these."
        )


def fitting(operator: CurvatureOperator, diagonal: Tensor, *, of: str, name: str) -> Tensor:
    """Copy a diagonal that fits an operator.

    Args:
        operator: Whose n, dtype and device it must have.
        diagonal: [n].
        of: Who was given it, for messages.
        name: Of the argument.

    Returns:
        A copy without a graph.

    Raises:
        InvalidArgument: If it is of another shape, dtype or device, or not finite.
    """
    n, dtype, device = operator.n, operator.dtype, operator.device
    called = f"{name} diagonal" if name in ("inner", "outer") else name
    if not isinstance(diagonal, Tensor):
        raise InvalidArgument(
            f"{of}: {name}={type(diagonal).__name__} is no tensor; it must be [{n}], {dtype} on {device}. "
            "Convert it with torch.as_tensor(...).to(operator.device, operator.dtype)."
        )
    if diagonal.shape != (n,) or diagonal.dtype != dtype or diagonal.device != device:
        raise InvalidArgument(
            f"{of}: {'an' if called[0] in 'io' else 'a'} {called} of shape {tuple(diagonal.shape)}, {diagonal.dtype} on {diagonal.device} "
            f"was given; it must be [{n}], {dtype} on {device}. Join parameter-shaped pieces with operator.space.join, and convert with "
            ".to(operator.device, operator.dtype)."
        )
    if not bool(torch.isfinite(diagonal).all()):
        raise InvalidArgument(
            f"{of}: the {called} has NaN or infinite entries. Check the optimizer state that it was taken from."
        )
    return diagonal.detach().clone()
