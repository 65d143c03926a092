"""The trace from products with random signs, and its shares from the same products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import CurvkitError
from curvkit.linalg.basis import PIECE
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.recorded import derived
from curvkit.results.trace_estimate import TraceParts

PURPOSE = "trace probe"


@dataclass(frozen=True, eq=False)
class Draws:
    """What a method knows of the trace after some products."""

    value: float
    """NaN while nothing is known."""
    stderr: float
    probes: int
    products: int
    step: int
    """Products of its next step."""
    rank: int = 0
    parts: TraceParts | None = None
    exact: bool = False


class Samples:
    """Rows of part sums, one per probe, that grow without moving what was handed out.

    Args:
        lengths: Coordinates of each part.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.size = 0
        self._rows = torch.zeros(64, len(self.lengths), dtype=torch.float64)

    def append(self, row: Tensor) -> None:
        """Add the part sums of one probe, [p]."""
        if self.size == len(self._rows):
            self._rows = torch.cat([self._rows, torch.zeros_like(self._rows)])
        self._rows[self.size] = row
        self.size += 1

    @property
    def rows(self) -> Tensor:
        """[m, p], a view that later rows leave alone."""
        return self._rows[: self.size]

    def draws(self, *, products: int, step: int, known: Tensor | None = None, rank: int = 0) -> Draws:
        """State the mean over the probes, and what it rests on.

        Args:
            products: So far.
            step: Products of the next step.
            known: [p] float64, added to the mean; None for nothing.
            rank: Dimensions behind `known`.

        Returns:
            The state.
        """
        known = torch.zeros(len(self.lengths), dtype=torch.float64) if known is None else known
        totals, m = self.rows.sum(1), self.size
        value = (totals.mean() + known.sum()).item() if m else float("nan")
        stderr = (totals.std() / m**0.5).item() if m > 1 else float("nan")
        return Draws(value, stderr, m, products, step, rank, TraceParts(self.lengths, known, self.rows))


def steps(
    A: LinearMap,
    *,
    lengths: Sequence[int],
    seed: int,
    block_size: int = 1,
    drawn: Samples | None = None,
    most: int | None = None,
) -> Iterator[Draws]:
    """Sample x'Ax with random signs x, without an end or up to a number of them.

        tr A = E x'Ax,    x in {-1, +1}^n;    the share of a part P of the coordinates: E sum_(j in P) x_j (Ax)_j

    Args:
        A: Symmetric, of order n.
        lengths: Coordinates of each part, n in all.
        seed: Probe i depends on (seed, i) alone.
        block_size: Probes per step, multiplied together.
        drawn: Samples of the first probes, to go on from; None: none.
        most: Probes at which a last, smaller block ends; None: without an end.

    Yields:
        The state after each step.

    Raises:
        CurvkitError: If a product has NaN or infinite entries.

    Cost: one product per probe; O(block_size n) memory.
    Accuracy: Var x'Ax = 2 (||A||_F^2 - sum_j a_jj^2), nothing for a diagonal matrix.
    Source: Hutchinson (1990).

    Example:
        >>> from curvkit.linalg import DenseMap
        >>> next(steps(DenseMap(torch.diag(torch.tensor([1.0, 2.0]))), lengths=[2], seed=0)).value
        3.0
    """
    samples = Samples(lengths) if drawn is None else drawn
    while most is None or samples.size < most:
        size = block_size if most is None else min(block_size, most - samples.size)
        for row in sampled(A, samples.size, lengths=lengths, seed=seed, block_size=size):
            samples.append(row)
        following = block_size if most is None else min(block_size, max(most - samples.size, 1))
        yield samples.draws(products=samples.size, step=following)


def sampled(A: LinearMap, index: int, *, lengths: Sequence[int], seed: int, block_size: int) -> list[Tensor]:
    """Multiply the next block of probes and sum by parts.

    Args:
        A: Symmetric, of order n.
        index: Of the first probe.
        lengths: Coordinates of each part.
        seed: Of the probes.
        block_size: How many probes.

    Returns:
        For each probe, [p] float64: the sums of x * (Ax).

    Raises:
        CurvkitError: If a product has NaN or infinite entries.
    """
    X = [probe(A, seed, index + i) for i in range(block_size)]

    def made() -> Tensor:
        Y = [A.matvec(X[0])] if block_size == 1 else list(A.matmat(torch.stack(X, dim=1)).unbind(1))
        return torch.stack([part_sums(x, y, lengths) for x, y in zip(X, Y, strict=True)])

    rows = list(derived(A, "part sums", X, made, (block_size, len(lengths))))
    for i, row in enumerate(rows):
        refuse_not_finite(row, f"with probe {index + i + 1}")
    return rows


def probe(A: LinearMap, seed: int, index: int) -> Tensor:
    """The signs of probe `index`, [n]."""
    return seeds.signs(A.n, seed, PURPOSE, index, dtype=A.dtype, device=A.device)


def part_sums(x: Tensor, y: Tensor, lengths: Sequence[int]) -> Tensor:
    """Inner products x'y over consecutive runs of coordinates, accumulated in float64.

    Args:
        x: [n].
        y: [n].
        lengths: Of the p runs, n in all.

    Returns:
        [p] float64 on the CPU.

    Example:
        >>> part_sums(torch.ones(3), torch.arange(3.0), [1, 2]).tolist()
        [0.0, 3.0]
    """
    sums = []
    for a, b in zip(x.split(list(lengths)), y.split(list(lengths)), strict=True):
        pieces = zip(a.split(PIECE), b.split(PIECE), strict=True)  # an empty part is one empty piece
        sums.append(sum(torch.dot(p.double(), q.double()) for p, q in pieces))
    return torch.stack(sums).cpu()


def refuse_not_finite(numbers: Tensor, which: str, *, measure: str = "trace") -> None:
    """Check sums to which every entry of a product contributes.

    Args:
        numbers: The sums.
        which: Of the products, for the message.
        measure: What is measured, for the message.

    Raises:
        CurvkitError: If one is NaN or infinite.
    """
    if not bool(torch.isfinite(numbers).all()):
        raise CurvkitError(
            f"{measure}: the product {which} has NaN or infinite entries. The function or its derivatives overflow there: check weights "
            "and data for NaN, or compute in float64."
        )
