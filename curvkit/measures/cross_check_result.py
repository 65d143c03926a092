"""What comes of measuring the same thing with another library: both numbers, why they should differ, and whether they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curvkit.results import plain

Pair = tuple[float, float]


@dataclass(frozen=True)
class CrossCheck:
    """A result beside that of another library on the same model, loss and data."""

    quantity: str
    """"eigenvalues" or "trace"."""
    package: str
    """The library and its version."""
    ours: tuple[float, ...]
    """Descending."""
    intervals: tuple[Pair, ...]
    """Of each of `ours`."""
    theirs: tuple[float, ...]
    """Descending; as many as `ours`."""
    stderr: float | None
    """Standard error of their trace, from their own probes; NaN for one probe, None for eigenvalues, of which they give none."""
    rounding: float
    """What rounding may add to an interval, in the unit of `ours`."""
    products: int
    """Products of their search or sampling, each one of their iterations."""
    seconds: float
    seed: int
    expected: tuple[str, ...]
    """Where, by the way it works, their number differs from ours."""
    confirmed: bool
    """Whether, weighted as here, their products agree with our result; then a difference of the numbers is none of the matrix."""
    confirmation: str
    """What that rests on."""
    reasons: tuple[str, ...]
    """What explains a difference, if `confirmed`; empty: nothing that is known does."""

    @property
    def relative_difference(self) -> float:
        """The largest of |theirs - ours| / |ours|; infinite beside a zero of ours, unless both are."""
        return max(
            abs(b - a) / abs(a) if a else (float("inf") if b else 0.0)
            for a, b in zip(self.ours, self.theirs, strict=True)
        )

    @property
    def agrees(self) -> bool:
        """Whether each of their numbers lies in the interval of ours, but for rounding."""
        return all(
            low - self.rounding <= b <= high + self.rounding
            for (low, high), b in zip(self.intervals, self.theirs, strict=True)
        )

    @property
    def verdict(self) -> str:
        """One of "agree within our interval", "differ, as expected because ..." and "differ: unexpected"."""
        if self.agrees:
            return "agree within our interval"
        if self.confirmed and self.reasons:
            return f"differ, as expected because {'; and '.join(self.reasons)}"
        return "differ: unexpected"

    def __str__(self) -> str:
        """One sentence for people."""
        theirs, ours = (", ".join(f"{value:.6g}" for value in values) for values in (self.theirs, self.ours))
        error = f" ± {self.stderr:.2g}" if self.stderr is not None else ""
        return (
            f"{self.package} gives {theirs}{error}, beside {ours} here (relative difference {self.relative_difference:.1e}): "
            f"{self.verdict}. {self.confirmation}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The check as plain values: what `--json` prints under "cross_check".

        Returns:
            Mappings, lists, numbers and strings.
        """
        told = {"agrees": self.agrees, "relative_difference": self.relative_difference, "verdict": self.verdict}
        return {**plain(self), **plain(told)}
