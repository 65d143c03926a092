"""The parts of a Rayleigh-Ritz step on a growing orthonormal basis: the next block, the projected matrix, the residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.linalg.basis import Basis, dot, norm
from curvkit.linalg.maps import LinearMap

Which = Literal["largest", "smallest", "both", "magnitude"]

CLOSE = 1e-3
"""A random direction of which less than this is left after orthogonalization is drawn again."""


def wanted(values: Tensor, num: int, which: Which) -> Tensor:
    """Choose which of some ascending eigenvalues are asked for.

    Args:
        values: [m] ascending.
        num: How many; fewer are returned if m is smaller.
        which: "largest" and "smallest" are algebraic; "both" takes from either end, one more of the largest if `num` is odd;
            "magnitude" takes the largest absolute values.

    Returns:
        Indices, by descending value.

    Example:
        >>> wanted(torch.tensor([-3.0, 0.0, 1.0, 2.0]), 2, "both").tolist()
        [3, 0]
    """
    m = values.shape[0]
    num = min(num, m)
    if which == "magnitude":
        chosen = values.abs().argsort(descending=True)[:num].tolist()
    else:
        low = {"largest": 0, "smallest": num, "both": num // 2}[which]
        chosen = [*range(low), *range(m - (num - low), m)]
    return torch.tensor(sorted(chosen, reverse=True), dtype=torch.long)


class RandomVectors:
    """Random directions of R^n, numbered, so that the i-th is the same whatever came before.

    Args:
        A: Gives n, dtype and device.
        seed: Of the directions.
    """

    def __init__(self, A: LinearMap, seed: int) -> None:
        self._A, self._seed, self._index = A, seed, 0

    def next(self) -> Tensor:
        """Draw the next direction, [n] of unit length, uniform on the sphere."""
        drawn = seeds.normal(self._A.n, self._seed, "lanczos", self._index, dtype=self._A.dtype, device=self._A.device)
        self._index += 1
        return drawn / norm(drawn)


def start_block(start: Tensor | None, size: int, random: RandomVectors) -> tuple[list[Tensor], float]:
    """Make the first block: (s / ||s|| + u) / 2 and then random directions.

    Args:
        start: [n], s; a zero or non-finite vector counts as none.
        size: Rows of the block.
        random: Gives u.

    Returns:
        `size` vectors [n], not normalised, and the random share of the first: 1/2, or 1 without `start`.
    """
    rows, share = [random.next() for _ in range(size)], 1.0
    length = norm(start) if start is not None else 0.0
    if start is not None and 0.0 < length < float("inf"):
        rows[0], share = (start.to(rows[0]) / length + rows[0]) / 2, 0.5
    return rows, share


def append_block(
    left: Sequence[Tensor], basis: Basis, breakdown: float, random: RandomVectors
) -> tuple[list[Tensor], bool]:
    """Append an orthonormal basis of what is left of the last products; where nothing is left, random directions.

    Args:
        left: b vectors [n], orthogonal to `basis` up to rounding; overwritten.
        basis: Grows by b rows, or by fewer if it then spans R^n.
        breakdown: A remainder of at most this length is rounding.
        random: Gives replacements.

    Returns:
        The new rows, and whether one of them is a replacement.
    """
    added: list[Tensor] = []
    replaced = False
    for row in left[: basis.n - basis.size]:
        length = norm(row)
        if added or length <= 1e3 * breakdown:  # not yet orthogonal to its own block, or mostly cancelled
            basis.orthogonalize(row)
            length = norm(row)
        if not length > breakdown:
            replaced = True
            row, length = _random_row(basis, random), 1.0
        basis.append(row.div_(length))
        added.append(row)
    return added, replaced


def _random_row(basis: Basis, random: RandomVectors) -> Tensor:
    """A random unit vector orthogonal to the basis; drawn again while it lies too close to its span."""
    while True:
        row = random.next()
        basis.orthogonalize(row)
        length = norm(row)
        if length >= CLOSE:
            row /= length
            basis.orthogonalize(row)
            return row.div_(norm(row))


def extend(T: Tensor, columns: Tensor) -> Tensor:
    """Add the coefficients of new products to the projected matrix T = Q'AQ.

    Args:
        T: [m, m] float64.
        columns: [b, m + b] float64: Q'A q for the b new rows q.

    Returns:
        [m + b, m + b], symmetric; its new diagonal block is symmetrised.
    """
    m, b = T.shape[0], columns.shape[0]
    grown = torch.zeros(m + b, m + b, dtype=torch.float64)
    grown[:m, :m] = T
    grown[m:, :m] = columns[:, :m]
    grown[:m, m:] = columns[:, :m].T
    grown[m:, m:] = (columns[:, m:] + columns[:, m:].T) / 2
    return grown


def gram(left: Sequence[Tensor]) -> Tensor:
    """Inner products among what is left of the last products.

    Args:
        left: b vectors [n].

    Returns:
        [b, b] float64.
    """
    if len(left) == 1:
        return torch.tensor([[norm(left[0]) ** 2]], dtype=torch.float64)
    return torch.tensor([[dot(x, y) for y in left] for x in left], dtype=torch.float64)


def residual_estimates(inner: Tensor, weights: Tensor) -> Tensor:
    """Length of what is left of A y - theta y for Ritz vectors y = Q's, from A Q' = Q'T + left' [0 ... I].

    Args:
        inner: [b, b], `gram` of what is left, which is orthogonal to the basis.
        weights: [m, k] float64, the columns s.

    Returns:
        [k] float64: || left' s_last ||, with the last b entries of s.
    """
    last = weights[-inner.shape[0] :]
    return (last * (inner @ last)).sum(0).clamp(min=0.0).sqrt()


@dataclass(frozen=True)
class Capacity:
    """How many basis rows fit, and how many survive a restart."""

    rows: int
    kept: int

    @classmethod
    def within(cls, max_rows: int | None, *, n: int, num: int, block_size: int) -> Capacity:
        """Divide a number of vectors of length n among the basis, a restart or certificate, and the working vectors.

        Args:
            max_rows: Vectors that may be held at once; None: no limit.
            n: Order of the matrix.
            num: Eigenvalues wanted.
            block_size: Vectors per step.

        Returns:
            The capacity; a restart keeps `num` Ritz vectors and a third of the rest.

        Raises:
            InvalidArgument: If it is too small for any progress.
        """
        if max_rows is None:
            return cls(n + block_size, num)
        least = num + block_size + 3
        working = 2 * block_size  # the block and what is left of its product
        spare = {"certificate": 3 * num + 2, "step": block_size + 2, "restart": num + 1}
        rows = max_rows - working - max(spare["certificate"], spare["step"])
        rows = min(
            n + block_size, rows, 3 * (max_rows - working - spare["restart"]) // 4
        )  # a restart keeps up to a third more
        if rows < min(least, n):
            needed = working + max(
                least + spare["certificate"], least + spare["step"], -(-4 * least // 3) + spare["restart"]
            )
            raise InvalidArgument(
                f"lanczos: {max_rows} vectors of length {n} fit the memory budget; {num} eigenvalue(s) with blocks of {block_size} "
                f"need at least {needed}. Raise the budget, or ask for fewer eigenvalues."
            )
        return cls(rows, min(num + max(2, (rows - num) // 3), rows - block_size))
