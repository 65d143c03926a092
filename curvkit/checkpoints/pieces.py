"""Blocks of a tensor that several processes wrote: where they lie, and whether they cover it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from curvkit.checkpoints.documents import brief
from curvkit.errors import RefusedCheckpoint

COMPARISONS = 500_000
"""Pairs of pieces that are compared at most, which takes a second; the pieces of a mesh need none."""


@dataclass(frozen=True)
class Place:
    """Where an item lies.

    Args:
        file: Name relative to the directory.
        offset: Of its first byte.
        length: Bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A block of a tensor that one process wrote.

    Args:
        offsets: Of its first number, per dimension.
        sizes: Per dimension.
        place: Where it lies; None for an empty one.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place | None


@dataclass(frozen=True)
class Split:
    """A tensor and its pieces, which cover it without gaps and without overlap.

    Args:
        dtype: torch's name.
        shape: Sizes.
        pieces: In the order of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Budget:
    """Counts comparisons, so that metadata made for it cannot keep a reader busy for hours.

    Args:
        source: For the message: the metadata.
    """

    def __init__(self, source: str) -> None:
        self.source, self.left = source, COMPARISONS

    def spend(self, count: int) -> None:
        """Take some away.

        Args:
            count: Of comparisons.

        Raises:
            RefusedCheckpoint: If none are left.
        """
        self.left -= count
        if self.left < 0:
            why = "its tensors are in pieces of no order that a mesh of processes has"
            raise RefusedCheckpoint(damaged(self.source, why))


def damaged(source: str, why: str) -> str:
    """What to say of metadata that contradict themselves.

    Args:
        source: The file.
        why: A clause.

    Returns:
        A message.

    Cost: none.

    Example:
        >>> damaged("a/.metadata", "a size in it is none")
        'a/.metadata: the metadata is damaged or cut short: a size in it is none. Take another copy or an earlier checkpoint.'
    """
    return f"{source}: the metadata is damaged or cut short: {why}. Take another copy or an earlier checkpoint."


def check_cover(name: str, shape: tuple[int, ...], pieces: list[Piece], budget: Budget) -> None:
    """Check that pieces, each within the shape, do not overlap and have as many numbers as the tensor.

    Args:
        name: Of the tensor.
        shape: Of the tensor.
        pieces: Of the tensor, without empty ones.
        budget: Of comparisons, for all tensors of the metadata together.

    Raises:
        RefusedCheckpoint: If numbers are missing, or are there twice.

    Cost: linear in the number of pieces; where they are no grid, times that of those side by side.
    """
    total, there = math.prod(shape), sum(math.prod(piece.sizes) for piece in pieces)
    if there < total:
        raise RefusedCheckpoint(
            f"{budget.source}: {brief(name)} has {total:,} numbers, and the pieces that were written have {there:,}. The save was not "
            "finished, or a process wrote elsewhere; missing numbers are not replaced by zeros. Take an earlier checkpoint."
        )
    if there > total or (len(pieces) > 1 and not _grid(shape, pieces) and _overlapping(pieces, budget)):
        raise RefusedCheckpoint(damaged(budget.source, f"pieces of {brief(name)} overlap"))


def _grid(shape: tuple[int, ...], pieces: list[Piece]) -> bool:
    """Whether pieces are all the cells of one grid, as those of a mesh are; such a grid has neither gaps nor overlaps."""
    cells = 1
    for axis, size in enumerate(shape):
        steps = sorted({(piece.offsets[axis], piece.sizes[axis]) for piece in pieces})
        if steps[0][0] != 0 or any(a + n != b for (a, n), (b, _) in pairwise([*steps, (size, 0)])):
            return False
        cells *= len(steps)
    return cells == len(pieces) == len({piece.offsets for piece in pieces})


def _overlapping(pieces: list[Piece], budget: Budget) -> bool:
    """Sweep along the dimension with the most places to begin."""
    axis = max(range(len(pieces[0].sizes)), key=lambda d: len({piece.offsets[d] for piece in pieces}))
    active: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offsets[axis]):
        budget.spend(len(active))
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > piece.offsets[axis]]
        if any(_meet(piece, other) for other in active):
            return True
        active.append(piece)
    return False


def _meet(a: Piece, b: Piece) -> bool:
    return all(o < p + t and p < o + s for o, s, p, t in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))
