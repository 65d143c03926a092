"""What is wanted of a trace, and what it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from curvkit.errors import InvalidArgument

Method = Literal["auto", "exact", "hutchinson", "deflated", "hutch++", "xtrace", "example-hutchinson", "controlled"]
ELSEWHERE = ("example-hutchinson", "controlled")
"""Methods that need the examples of a loss, not a matrix alone: see `curvkit.measures.trace`."""

RANK = 30
"""Dimensions of the subspace where none are asked for."""
LEFT_OUT = 4
"""Vectors at work beside the subspace."""


@dataclass(frozen=True)
class Settings:
    """What is wanted, and what it may cost.

    Raises:
        InvalidArgument: If a value is out of range whatever the matrix is.
    """

    method: Method = "auto"
    """"auto" decides by the predicted number of products, after 30 probes."""
    tolerance: float = 0.05
    """Half-width of the interval, relative to |value|."""
    absolute_tolerance: float | None = None
    """Half-width that suffices in any case, in the unit of the matrix; None: none. Needed where the trace may be zero."""
    rank: int | None = None
    """Dimensions of the subspace of "deflated" and "hutch++"; None: 30, or what budget and memory allow."""
    block_size: int = 1
    """Probes that are multiplied together, where a product of several is cheaper."""
    max_products: int = 500
    """Products in all, beside at most six that check others."""
    max_seconds: float | None = None
    """After this time the estimate is what is there; None: no limit."""
    max_rows: int | None = None
    """Most vectors of length n that may be held at once; None: no limit."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.method not in get_args(Method):
            raise InvalidArgument(
                f"trace: method={self.method!r} is not one of {', '.join(get_args(Method))}. Use 'auto' if in doubt."
            )
        if not 0.0 < self.tolerance < 1.0:
            raise InvalidArgument(
                f"trace: tolerance={self.tolerance!r} must lie in (0, 1). It is the half-width of the 95 % interval relative to the trace; "
                "the default is 0.05."
            )
        if self.absolute_tolerance is not None and not 0.0 < self.absolute_tolerance < float("inf"):
            raise InvalidArgument(
                f"trace: absolute_tolerance={self.absolute_tolerance!r} must be positive and finite, or None. It is a half-width in the "
                "unit of the matrix."
            )
        if self.rank is not None and self.rank < 1:
            raise InvalidArgument(f"trace: rank={self.rank!r} must be at least 1, or None for {RANK}.")
        if self.block_size < 1:
            raise InvalidArgument(f"trace: block_size={self.block_size!r} must be at least 1. It is 1 by default.")
        if self.max_products < 1:
            raise InvalidArgument(
                f"trace: max_products={self.max_products!r} must be at least 1. An interval that counts takes 30 or more."
            )
        if self.max_seconds is not None and not self.max_seconds > 0.0:
            raise InvalidArgument(f"trace: max_seconds={self.max_seconds!r} must be positive, or None for no limit.")

    def affordable_rank(self, n: int, *, per_dimension: int, asked: int = RANK) -> int:
        """Dimensions of a subspace that fit budget and memory.

        Args:
            n: Order of the matrix.
            per_dimension: Products that one dimension takes.
            asked: What is wanted where `rank` does not say it.

        Returns:
            `rank`, or else at most a third of the products; 0 if there is no room.
        """
        if self.rank is not None:
            return self.rank if self.rank <= self.largest_rank(n, per_dimension=per_dimension) else 0
        return min(asked, self.largest_rank(n, per_dimension=per_dimension), self.max_products // (3 * per_dimension))

    def largest_rank(self, n: int, *, per_dimension: int) -> int:
        """Dimensions of the largest subspace that may be asked for.

        Args:
            n: Order of the matrix.
            per_dimension: Products that one dimension takes.

        Returns:
            Such that one probe is left, and at most what the memory holds; 0 if there is no room.
        """
        room = n - 1 if self.max_rows is None else min(n - 1, self.max_rows - LEFT_OUT)
        return max(0, min(room, (self.max_products - 1) // per_dimension))
