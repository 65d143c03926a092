"""What a few probes show of the products themselves: whether they are those of a symmetric matrix, and what rounding does to a trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvkit.errors import CurvkitError
from curvkit.linalg import student
from curvkit.linalg.basis import dot, norm
from curvkit.linalg.certificate import ASYMMETRY, PERTURBATION, ROUNDING, OtherArithmetic, assumed_error
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.recorded import Shape, derived
from curvkit.results.trace_estimate import ProductCheck

PROBES = 3
"""Probes whose products are looked at: three pairs for the symmetry, three differences for the rounding."""


class Witness:
    """A map that keeps its first products with vectors of signs, until they have been looked at.

    Args:
        A: Symmetric, of order n.

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> seen = Witness(DenseMap(torch.eye(2)))
        >>> seen.matvec(torch.tensor([1.0, -1.0])).tolist(), seen.matvec(torch.tensor([0.5, 0.5])).tolist(), len(seen.vectors)
        ([1.0, -1.0], [0.5, 0.5], 1)
    """

    def __init__(self, A: LinearMap) -> None:
        self.A = A
        self.n, self.dtype, self.device = A.n, A.dtype, A.device
        self.vectors: list[Tensor] = []
        self.products: list[Tensor] = []
        self.check: ProductCheck | None = None

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n]."""
        y = self.A.matvec(v)
        self._keep(v, y)
        return y

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors, [n, k] -> [n, k]."""
        Y = self.A.matmat(V)
        for v, y in zip(V.unbind(1), Y.unbind(1), strict=True):
            self._keep(v, y)
        return Y

    def derived(self, label: str, vectors: Sequence[Tensor], make: Callable[[], Tensor], shape: Shape) -> Tensor:
        """Make something small from products: while they are looked at, the products themselves; see `recorded.derived`."""
        watching = self.check is None and len(self.products) < PROBES
        return make() if watching else derived(self.A, label, vectors, make, shape)

    @property
    def ready(self) -> bool:
        """Whether there are products enough, and they have not been looked at."""
        return self.check is None and len(self.products) == PROBES

    def rounding(self, value: float) -> float | None:
        """What rounding adds to the half-width.

        Args:
            value: Of the trace. Three probes may all be nearly orthogonal to the one direction that matters, so that d is small by chance;
                the error is not taken as less than that of the products times the value.

        Returns:
            The larger of the two; None where it was not measured.
        """
        if self.check is None or self.check.rounding is None:
            return None
        return (
            max(self.check.rounding, self.check.product_error * abs(value)) if value == value else self.check.rounding
        )

    def look(self, other: OtherArithmetic, *, beside: int) -> None:
        """Compare the products that were kept with one another and with those of other arithmetic, and let go of them.

            asymmetry = max |x_i'A x_j - x_j'A x_i|,    d_i = x_i'(A~ x_i - A x_i),    rounding = |mean d| + t s / sqrt(m)

        E d = tr(A~ - A): a trace from products with A, whatever the method, is off by that. With perturbed maps in place of a reference, d
        is a random error of the size of the true one, and the rounding is four times the largest |d|; with neither it is the error that
        the map states of itself, as products by differences do, or unknown.

        Args:
            other: The same matrix by other arithmetic, if there is any.
            beside: Products with A that were made for this alone.

        Raises:
            CurvkitError: If the products are so small that the dtype does not resolve them.

        Cost: 3 products of `other`, where there is one.
        Accuracy: signs are independent of the rounding of another probe's product, so that x_i'e_j is about ||e_j||, seldom more.
        """
        X, Y = self.vectors, self.products
        self.vectors, self.products = [], []
        sizes = [norm(y) for y in Y]
        size, spent, rounding, error = max(sizes), beside, None, assumed_error(self.A)
        measured = error
        differences = _differences(X, Y, other)
        if differences:
            spent += len(differences)
            d = torch.tensor([dot(x.to(e.dtype), e) for x, e in zip(X, differences, strict=True)], dtype=torch.float64)
            relative = max((norm(e) / s for e, s in zip(differences, sizes, strict=True) if s > 0.0), default=0.0)
            if other.reference is not None:
                m = len(d)
                rounding = abs(d.mean().item()) + student.quantile(m - 1) * (d.std() / m**0.5).item()
            else:
                rounding, relative = PERTURBATION * d.abs().max().item(), PERTURBATION * relative
            error, measured = max(error, relative), relative
        elif hasattr(self.A, "product_error"):
            rounding = error * size
        _refuse_tiny(Y, differences)
        asymmetry = max(abs(dot(X[i], Y[j]) - dot(X[j], Y[i])) for i, j in itertools.combinations(range(len(X)), 2))
        self.check = ProductCheck(spent, rounding, measured, asymmetry, ASYMMETRY / ROUNDING * error * size)

    def _keep(self, v: Tensor, y: Tensor) -> None:
        if self.check is None and len(self.products) < PROBES and bool((v.abs() == 1.0).all()):
            self.vectors.append(v.clone())
            self.products.append(y.clone())


def _differences(X: list[Tensor], Y: list[Tensor], other: OtherArithmetic) -> list[Tensor]:
    """A~ x - A x for each x; nothing where there is no other arithmetic. Perturbed maps take turns."""
    if other.reference is not None:
        exact = other.reference
        Z = exact.matmat(torch.stack(X, dim=1).to(exact.dtype))
        return [z - y.to(exact.dtype) for z, y in zip(Z.unbind(1), Y, strict=True)]
    maps = itertools.cycle(other.perturbed)
    return [P.matvec(x) - y for P, x, y in zip(maps, X, Y, strict=False)]


def _refuse_tiny(Y: list[Tensor], differences: list[Tensor]) -> None:
    """Numbers below `tiny` lose their digits one by one, and then vanish; a product is safe where eps of it is above that."""
    info, size = torch.finfo(Y[0].dtype), max(y.abs().max().item() for y in Y)
    vanished = max((e.abs().max().item() for e in differences), default=0.0) if size == 0.0 else size
    least = info.tiny / info.eps
    if 0.0 < vanished < least:
        raise CurvkitError(
            f"trace: the largest entries of products are {vanished:.1g}, where {Y[0].dtype} loses digits: they must be above {least:.0e}. "
            "Multiply the function by a constant, and divide the trace by it, or compute in float64."
        )
