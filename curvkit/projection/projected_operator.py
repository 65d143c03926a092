"""A curvature matrix within the directions that a projection keeps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg.basis import norm
from curvkit.linalg.certificate import assumed_error
from curvkit.operators import CurvatureOperator
from curvkit.operators.scaled import refuse_no_operator
from curvkit.parameters import ParameterSpace
from curvkit.projection.named_vectors import distance, drawn, inner, length, rounding
from curvkit.projection.protocol import Projection


class Projected:
    """B = P A P with a projection P: the curvature within what P keeps.

        tr(P A P) + tr((I - P) A (I - P)) = tr A

    Where P is a mask, P A P is the block of A of the coordinates that are kept, with zeros around it: its trace is the sum of A's diagonal
    over them. B has the eigenvalue 0 for each dimension that P takes out; so a largest eigenvalue of 0 may come from these alone, and that
    of the block may be negative. An eigenvector of another eigenvalue lies in what P keeps. The unit of B is that of A.

    Args:
        operator: A; any `CurvatureOperator`.
        projection: P; any `Projection` of tensors with the names and shapes of `operator.space`, linear and symmetric as
            `curvkit.testing.check_projection` says. It must not change while the operator is used.
        scale: Largest |eigenvalue| of A, for `product_error`; None takes that of the eigenpairs that a complement is made of, and where
            there are none what the products show.

    Raises:
        InvalidArgument: If the operator is none, the scale is negative or not finite, the projection does not take updates of its space, or
            what it does to a random update is not what an orthogonal projection does.

    Cost: of a product, that of A and twice P; O(n) memory.
    Accuracy: a product is as wrong as that of A, which goes with ||A||, and P A P may be far smaller: `product_error` allows for that as
        far as ||A|| is known. Products in float64, of `Projected(DoubleHessian(A), P)`, show it.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> from curvkit.operators import Hessian
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> H = Hessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))   # [[2, 4], [4, 8]]
        >>> def first(update):
        ...     return {"weight": update["weight"] * torch.tensor([[1.0, 0.0]])}
        >>> Projected(H, first).matvec(torch.ones(2)).tolist()
        [2.0, 0.0]
    """

    def __init__(self, operator: CurvatureOperator, projection: Projection, *, scale: float | None = None) -> None:
        refuse_no_operator("Projected", operator)
        if not callable(projection):
            raise InvalidArgument(
                f"Projected: projection={type(projection).__name__} cannot be called; it must map an update, tensors by name, to "
                "another. Pass a FlatMask, a SharpComplement, or a class of your own with __call__(update)."
            )
        self.space: ParameterSpace = operator.space
        self.n, self.dtype, self.device = operator.n, operator.dtype, operator.device
        self.projection = projection
        self._operator = operator
        self._met = _known(projection) if scale is None else _checked(scale)  # longest A v so far
        self._left = 0.0  # longest P A P v
        self._refuse_no_projection()

    @property
    def product_error(self) -> float:
        """Error of a product relative to ||B||: that of A, at least 8 eps, times ||A|| / ||B||.

        Of ||A|| the larger of the scale and of the longest A P v so far is taken, of ||B|| the longest P A P v, for unit vectors v.
        """
        return assumed_error(self._operator) * (self._met / self._left if self._left > 0.0 else 1.0)

    @property
    def arithmetic(self) -> object:
        """Of the products with A, as messages name it."""
        return getattr(self._operator, "arithmetic", self.dtype)

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector.

        Args:
            v: [n], on the operator's device and in its dtype.

        Returns:
            P A P v, [n].

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.

        Cost: one product with A.
        """
        self._check(v, 1)
        return self._seen(v, self._operator.matvec(self._projected(v)))

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors.

        Args:
            V: [n, k].

        Returns:
            P A P V, [n, k].

        Raises:
            InvalidArgument: If `V` does not fit, or the parameters have changed.

        Cost: one `matmat` of A.
        """
        self._check(V, 2)
        if not V.shape[1]:
            return torch.empty_like(V)
        product = self._operator.matmat(torch.stack([self._projected(v) for v in V.unbind(1)], dim=1))
        return torch.stack([self._seen(v, y) for v, y in zip(V.unbind(1), product.unbind(1), strict=True)], dim=1)

    def _seen(self, v: Tensor, product: Tensor) -> Tensor:
        """P A P v from A P v; how long both are is kept."""
        found, size = self._projected(product), norm(v)
        if size > 0.0:
            self._met, self._left = max(self._met, norm(product) / size), max(self._left, norm(found) / size)
        return found

    def _projected(self, v: Tensor) -> Tensor:
        """P v."""
        return self.space.flatten(self.projection(self.space.unflatten(v)))

    def _refuse_no_projection(self) -> None:
        """Project a random update twice."""
        space = self.space
        like = space.unflatten(torch.zeros(self.n, dtype=self.dtype, device=self.device))
        u = drawn(like, 0, "projected operator", 0)
        once = self.projection(u)
        kept = {name: (tuple(p.shape), p.dtype, p.device) for name, p in once.items()}
        if kept != {name: (tuple(p.shape), p.dtype, p.device) for name, p in like.items()}:
            raise InvalidArgument(
                f"Projected: the projection does not return the names, shapes, dtype and device of its update: {_first(kept, like)}. "
                "Pass one of the same parameters that keeps all four; curvkit.testing.check_projection says what is wrong with it."
            )
        allowed = rounding(like) * length(u)
        left = distance(self.projection(once), once)
        if not left <= allowed:
            raise InvalidArgument(
                f"Projected: projecting twice is not projecting once: they differ by {left:.3g} for a random update, at most {allowed:.3g} "
                "is rounding. Pass a projection; two that are applied in turn are one only where they commute, see Intersection."
            )
        off = abs(inner(u, once) - length(once) ** 2)
        if not off <= allowed * length(u):
            raise InvalidArgument(
                f"Projected: the projection is not symmetric: u'Pu and ||Pu||^2 differ by {off:.3g} for a random update, at most "
                f"{allowed * length(u):.3g} is rounding. Pass an orthogonal projection; with another one P A P is not symmetric."
            )

    def _check(self, V: Tensor, ndim: int) -> None:
        if V.ndim != ndim or V.shape[0] != self.n or V.dtype != self.dtype or V.device != self.device:
            raise InvalidArgument(
                f"Projected: a tensor of shape {tuple(V.shape)}, {V.dtype} on {V.device} was given; matvec takes [{self.n}], matmat "
                f"[{self.n}, k], {self.dtype} on {self.device}. Convert it with .to(operator.device, operator.dtype)."
            )


def _known(projection: Any) -> float:
    """The largest scale of the eigenpairs that a projection, or two that it joins, are made of; 0 where there are none."""
    parts = (projection, getattr(projection, "first", None), getattr(projection, "second", None))
    pairs: list[Any] = [getattr(part, "eigenpairs", None) for part in parts]
    return max((each.scale for each in pairs if each is not None), default=0.0)


def _checked(scale: float) -> float:
    if not 0.0 <= scale < math.inf:
        raise InvalidArgument(
            f"Projected: scale={scale!r} must be finite and not negative. It is the largest |eigenvalue| of the operator; None if in doubt."
        )
    return scale


def _first(kept: dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]], like: dict[str, Tensor]) -> str:
    """The first name at which a result differs from its update."""
    for name, given in like.items():
        if name not in kept:
            return f"{name!r} is missing"
        if kept[name] != (tuple(given.shape), given.dtype, given.device):
            shape, dtype, device = kept[name]
            return f"{name!r} is of shape {shape}, {dtype} on {device} and was of {tuple(given.shape)}, {given.dtype} on {given.device}"
    return f"{next(name for name in kept if name not in like)!r} was not in the update"
