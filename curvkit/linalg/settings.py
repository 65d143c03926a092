"""What is wanted of a search for eigenvalues, what it may cost, and when a residual is small enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg.krylov import Which

SMALL = 1e-2
"""Residuals are judged relative to their eigenvalue, but not below SMALL times the largest |eigenvalue|."""


@dataclass(frozen=True)
class Settings:
    """What is wanted, and what it may cost.

    Raises:
        InvalidArgument: If a value is out of range whatever the matrix is.
    """

    num: int = 1
    """How many eigenvalues, k."""
    which: Which = "largest"
    """"largest", "smallest" (both algebraic), "both" ends, or largest "magnitude"."""
    tolerance: float = 1e-3
    """Of the residuals, relative to their eigenvalues, see `allowed`."""
    block_size: int = 1
    """Vectors per step, b; multiplicities up to b can be seen."""
    max_products: int = 500
    """Products in all, the k of the certificate included."""
    max_seconds: float | None = None
    """After this time the certificate is made from what is there; None: no limit."""
    max_rows: int | None = None
    """Most vectors of length n that may be held at once, working vectors included; None: no limit."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.which not in get_args(Which):
            raise InvalidArgument(
                f"lanczos: which={self.which!r} is not one of {', '.join(get_args(Which))}. For sharpness use 'largest'."
            )
        if self.num < 1 or self.block_size < 1:
            raise InvalidArgument(
                f"lanczos: num={self.num!r} and block_size={self.block_size!r} must be at least 1. Both are 1 by default."
            )
        if not 0.0 < self.tolerance < 1.0:
            raise InvalidArgument(
                f"lanczos: tolerance={self.tolerance!r} must lie in (0, 1). It is relative to the eigenvalue; the default is 1e-3."
            )
        if self.max_products < self.num + self.block_size:
            raise InvalidArgument(
                f"lanczos: max_products={self.max_products!r} is too few: one step takes {self.block_size} and the residuals "
                f"{self.num}. Allow at least {self.num + self.block_size}; a few dozen is usual."
            )
        if self.max_seconds is not None and not self.max_seconds > 0.0:
            raise InvalidArgument(f"lanczos: max_seconds={self.max_seconds!r} must be positive, or None for no limit.")


def allowed(values: Tensor, scale: float, tolerance: float) -> Tensor:
    """The largest residual with which an eigenvalue counts as converged.

    Args:
        values: [k] eigenvalues.
        scale: The largest |eigenvalue| of the matrix.
        tolerance: Relative.

    Returns:
        [k]: tolerance * max(|value|, scale / 100); without the second, an eigenvalue of zero could never converge.

    Example:
        >>> import torch
        >>> allowed(torch.tensor([10.0, 0.0], dtype=torch.float64), 10.0, 1e-3).tolist()
        [0.01, 0.0001]
    """
    return tolerance * values.abs().clamp(min=SMALL * scale)
