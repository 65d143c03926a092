"""An orthonormal basis that grows row by row, and inner products that do not lose digits."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ROWS = 8
PIECE = 1 << 20


def dot(x: Tensor, y: Tensor) -> float:
    """Inner product x'y, accumulated in float64.

    Args:
        x: [n].
        y: [n].

    Returns:
        A Python float; NaN or infinite if an entry is.

    Cost: n multiplications; O(1) memory beyond 16 MiB, whatever n is.

    Example:
        >>> dot(torch.ones(3), torch.ones(3))
        3.0
    """
    total = 0.0
    for start in range(0, x.numel(), PIECE):
        piece = slice(start, start + PIECE)
        total += torch.dot(x[piece].double(), y[piece].double()).item()
    return total


def norm(x: Tensor) -> float:
    """Euclidean norm, accumulated in float64.

    Args:
        x: [n].

    Returns:
        sqrt(x'x).

    Example:
        >>> norm(torch.tensor([3.0, 4.0]))
        5.0
    """
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()


class Basis:
    """Orthonormal vectors as the rows of a matrix that grows in chunks, so that no memory is taken before it is used.

    Rows are never overwritten: whoever holds the number of rows at some time can still read them later.

    Args:
        n: Length of a row.
        dtype: Of the rows.
        device: Of the rows.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.dtype, self.device = n, dtype, device
        self.size = 0
        self._chunks: list[Tensor] = []

    def append(self, row: Tensor) -> None:
        """Add a row of unit length that is orthogonal to the others.

        Args:
            row: [n].
        """
        place = self.size % CHUNK_ROWS
        if place == 0:
            self._chunks.append(torch.empty(CHUNK_ROWS, self.n, dtype=self.dtype, device=self.device))
        self._chunks[-1][place].copy_(row)
        self.size += 1

    def coefficients(self, w: Tensor) -> Tensor:
        """Q w, one inner product per row.

        Args:
            w: [n].

        Returns:
            [size].
        """
        return torch.cat([chunk @ w for chunk in self._filled(self.size)]) if self.size else w.new_zeros(0)

    def orthogonalize(self, w: Tensor) -> Tensor:
        """Take the components along the rows out of `w`, in place, by classical Gram-Schmidt applied twice.

        Args:
            w: [n]; overwritten with (I - Q'Q) w.

        Returns:
            [size] the coefficients Q w that were taken out, both passes added.

        Cost: 4 size n multiplications.
        Source: Giraud, Langou & Rozloznik (2005): two passes are enough for orthogonality to rounding.
        """
        taken = w.new_zeros(self.size)
        for _ in range(2):
            pass_ = self.coefficients(w)
            start = 0
            for chunk in self._filled(self.size):
                w.addmv_(chunk.T, pass_[start : start + chunk.shape[0]], alpha=-1.0)
                start += chunk.shape[0]
            taken += pass_
        return taken

    def combine(self, weights: Tensor, size: int | None = None) -> Tensor:
        """Linear combinations of the first rows.

        Args:
            weights: [size, k].
            size: How many rows; None for all.

        Returns:
            [k, n], one combination per row.
        """
        weights = weights.to(self.device, self.dtype)
        made = torch.zeros(weights.shape[1], self.n, dtype=self.dtype, device=self.device)
        start = 0
        for chunk in self._filled(self.size if size is None else size):
            made.addmm_(weights[start : start + chunk.shape[0]].T, chunk)
            start += chunk.shape[0]
        return made

    def _filled(self, size: int) -> list[Tensor]:
        whole, rest = divmod(size, CHUNK_ROWS)
        return [*self._chunks[:whole], *([self._chunks[whole][:rest]] if rest else [])]
