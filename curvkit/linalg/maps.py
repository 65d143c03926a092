"""A symmetric matrix as the thing that multiplies vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument


@runtime_checkable
class LinearMap(Protocol):
    """A symmetric linear map of R^n: all that the algorithms of this package ask of a matrix."""

    @property
    def n(self) -> int:
        """Number of rows and columns."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors taken and returned."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the vectors taken and returned."""
        ...

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n]."""
        ...

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors, [n, k] -> [n, k]; never dearer than k products."""
        ...


class FunctionMap:
    """A linear map given by a function.

    The function must be linear and symmetric; `curvkit.testing.check_operator` tests that.

    Args:
        n: Number of rows and columns.
        multiply: [n] -> [n], of the same dtype and device.
        dtype: Of the vectors.
        device: Of the vectors.

    Raises:
        InvalidArgument: If n < 1, or at a product if the function writes to its argument or returns something else than a vector.

    Example:
        >>> A = FunctionMap(3, lambda v: 2 * v)
        >>> A.matvec(torch.ones(3)).tolist()
        [2.0, 2.0, 2.0]
    """

    def __init__(
        self,
        n: int,
        multiply: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if n < 1:
            raise InvalidArgument(f"FunctionMap: n={n!r} must be at least 1. Pass the number of rows of the matrix.")
        self.n, self.dtype, self.device = n, dtype, torch.device(device)
        self._multiply = multiply

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n]."""
        _check_shape(self, v, 1)
        return self._checked(v)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply the columns one by one, [n, k] -> [n, k]."""
        _check_shape(self, V, 2)
        return torch.stack([self._checked(v) for v in V.unbind(1)], dim=1)

    def _checked(self, v: Tensor) -> Tensor:
        """The product, or a refusal of what is none."""
        version = 0 if v.is_inference() else v._version
        product = self._multiply(v)
        if not v.is_inference() and v._version != version:
            raise InvalidArgument(
                "FunctionMap: the function writes to its argument, so that the vectors of the caller change. Return a new tensor, "
                "for example v.mul(2) in place of v.mul_(2)."
            )
        if not isinstance(product, Tensor) or product.shape != v.shape or product.dtype != v.dtype:
            got = f"{product.dtype} {list(product.shape)}" if isinstance(product, Tensor) else type(product).__name__
            raise InvalidArgument(
                f"FunctionMap: the function returned {got} for {v.dtype} {list(v.shape)}. It must return the same kind."
            )
        return product


class DenseMap:
    """A matrix that is held whole, for small problems and for tests.

    Args:
        matrix: [n, n], floating point, symmetric to rounding.

    Raises:
        InvalidArgument: If it is not square, not floating point, not finite or not symmetric.

    Example:
        >>> DenseMap(torch.eye(2)).matvec(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
            raise InvalidArgument(
                f"DenseMap: a matrix of shape {tuple(matrix.shape)} is not square. Pass a tensor of shape [n, n]."
            )
        if not matrix.dtype.is_floating_point:
            raise InvalidArgument(f"DenseMap: the matrix has dtype {matrix.dtype}. Pass a real floating-point tensor.")
        if not bool(torch.isfinite(matrix).all()):
            raise InvalidArgument("DenseMap: the matrix has NaN or infinite entries. Pass a finite one.")
        asymmetry, size = (matrix - matrix.T).abs().max().item(), matrix.abs().max().item()
        if asymmetry > 8 * torch.finfo(matrix.dtype).eps * size:
            raise InvalidArgument(
                f"DenseMap: entries (i, j) and (j, i) differ by up to {asymmetry:.3g}, the largest entry is {size:.3g}. "
                "Only symmetric matrices have the real spectrum that is computed here; pass (A + A.T) / 2 if that is meant."
            )
        self._matrix = matrix
        self.n, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n]."""
        _check_shape(self, v, 1)
        return self._matrix @ v

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors at once, [n, k] -> [n, k]."""
        _check_shape(self, V, 2)
        return self._matrix @ V


def _check_shape(A: LinearMap, V: Tensor, ndim: int) -> None:
    if V.ndim != ndim or V.shape[0] != A.n:
        expected = f"[{A.n}]" if ndim == 1 else f"[{A.n}, k]"
        raise InvalidArgument(
            f"{type(A).__name__}: a tensor of shape {list(V.shape)} was given, the map has n = {A.n}. Pass one of shape {expected}."
        )
