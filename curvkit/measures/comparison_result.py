"""What a comparison says: the quantities at each point, their differences to the first, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from curvkit.measures.compared import Difference, Measured
from curvkit.measures.verdicts import RULE, Verdict, judge


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same quantities at several points of one function; a partial result while `complete` is false.

    All points share the data and the probes, so that differences carry less doubt than the numbers they are of.
    """

    points: tuple[Measured, ...]
    """In the order that was asked for; the first is the reference."""
    seed: int
    seconds: float

    def __repr__(self) -> str:
        """What follows for each point."""
        found = "; ".join(
            f"{it.point.name}: {it_said}" for it, it_said in zip(self.differences, self.verdicts, strict=True)
        )
        return f"Comparison(against {self.reference.name}; {found})"

    @property
    def reference(self) -> Measured:
        """The first point."""
        return self.points[0]

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """Of the others to the reference, in order."""
        return tuple(Difference(point, self.reference) for point in self.points[1:])

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each difference."""
        return tuple(judge(it) for it in self.differences)

    @property
    def complete(self) -> bool:
        """Whether everything was measured."""
        return all(point.stage == "complete" for point in self.points)

    @property
    def converged(self) -> bool:
        """Whether every search for eigenvalues met its tolerance."""
        return all(point.converged for point in self.points)

    @property
    def products(self) -> int:
        """Hessian products of all points."""
        return sum(point.products for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, without vectors: what `--json` prints under "result".

        Returns:
            Mappings, lists, numbers and strings.
        """
        rows = zip(self.differences, self.verdicts, strict=True)
        return {
            "quantity": "curvature of the Hessian at several points",
            "reference": self.reference.name,
            "points": [point.to_dict() for point in self.points],
            "differences": [
                {**it.to_dict(), "verdict": {"kind": verdict.kind, "text": verdict.text}} for it, verdict in rows
            ],
            "rule": RULE,
            "complete": self.complete,
            "products": self.products,
            "seconds": self.seconds,
            "seed": self.seed,
        }
