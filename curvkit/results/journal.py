"""What a long computation remembers of its products, so that a run that was cut short goes on where it was."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """One result that was kept."""

    tensor: Tensor
    """On the CPU."""
    seconds: float = 0.0
    """That it took to make."""
    error: float = 0.0
    """What its map said of the error of its products then, relative to ||A||."""
    turned: bool = False
    """The tensor is the transpose of the result, whose columns lay one after the other in memory."""


class Journal(Protocol):
    """Where results are kept under what they were made from, and facts that are decided once.

    A key names a map and has a digest of the vector, so that what is recalled belongs to exactly this vector; if anything differs, nothing
    is found and it is made again. So an algorithm goes the same way with a journal, with one that has gaps, and without one.
    """

    def recalled(self, key: str) -> Kept | None:
        """What was kept under a key; None for nothing."""
        ...

    def keep(self, key: str, kept: Kept) -> None:
        """Keep a result. It may be on the disk only some time later, or never."""
        ...

    def fact(self, name: str) -> Any:
        """What was decided in an earlier run, as plain values; None for nothing."""
        ...

    def decide(self, name: str, value: Any) -> None:
        """Keep a decision: a seed, a plan, plain values."""
        ...

    def clock(self) -> float:
        """Seconds on a monotonic clock that what is recalled moves on by the time that it took to make."""
        ...


class NothingKept:
    """The journal of a run that keeps nothing.

    Example:
        >>> NothingKept().recalled("hessian/0") is None
        True
    """

    def recalled(self, key: str) -> Kept | None:
        """Nothing."""
        return None

    def keep(self, key: str, kept: Kept) -> None:
        """Let go of it."""

    def fact(self, name: str) -> Any:
        """Nothing."""
        return None

    def decide(self, name: str, value: Any) -> None:
        """Let go of it."""

    def clock(self) -> float:
        """The monotonic clock."""
        return time.monotonic()


NOTHING_KEPT = NothingKept()
