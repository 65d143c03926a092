"""When sampling a trace ends, whatever is sampled: the interval, the looks at it, and the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from curvkit.linalg import student
from curvkit.linalg.certificate import OtherArithmetic
from curvkit.linalg.hutchinson import Draws
from curvkit.linalg.trace_settings import LEFT_OUT, Settings
from curvkit.results.trace_estimate import ProductCheck, TraceEstimate

Told = tuple[Draws, str, str]
"""What is known, by which method, and why that one."""


class Watched(Protocol):
    """What knows of the rounding of the samples; `trace_check.Witness` is one."""

    n: int
    check: ProductCheck | None

    @property
    def ready(self) -> bool:
        """Whether there is something to be looked at."""
        ...

    def look(self, other: OtherArithmetic, *, beside: int) -> None:
        """Look at it."""
        ...

    def rounding(self, value: float) -> float | None:
        """What rounding adds to the half-width; None where it was not measured."""
        ...


def stopped(
    told: Iterator[Told], settings: Settings, watched: Watched, other: OtherArithmetic, clock: Callable[[], float]
) -> Iterator[TraceEstimate]:
    """Sample until the interval is narrow enough, or a limit is reached.

    The interval is the estimate ± `student.half_width`, and what rounding adds to it. It is looked at after 30 probes and then each time
    their number has grown by a quarter, and at the end of the budget; at those looks alone an estimate is called converged, if the
    half-width is at most max(tolerance |value|, absolute_tolerance). If rounding alone is more than that, sampling ends where the doubt
    from the probes is no larger than rounding, and nothing is called converged.

    Args:
        told: What a method knows after each of its steps; without an end.
        settings: What is wanted.
        watched: Of the products or samples.
        other: The same matrix by other arithmetic, to see rounding.
        clock: Seconds; those until the first of `told` count.

    Yields:
        Partial results, and last the one at which the rule or the budget stopped.
    """
    began, before, rank = clock(), 0, 0
    for draws, method, reason in told:
        late = settings.max_seconds is not None and clock() - began > settings.max_seconds
        if watched.ready and not late:
            watched.look(other, beside=0)
        last = late or draws.exact or draws.products + draws.step > settings.max_products
        last = last or (method == "xtrace" and (draws.probes == watched.n or _full(settings, draws.probes)))
        found = stated(draws, settings, method, reason, watched)
        before, rank = (before if draws.rank == rank or method == "xtrace" else 0), draws.rank
        due = draws.exact or (draws.probes >= student.LEAST and (last or student.is_due(draws.probes, before)))
        before = draws.probes
        found = replace(found, converged=due and found.half_width <= found.allowed)
        yield found
        rounding = found.rounding or 0.0
        hopeless = due and found.half_width - rounding <= rounding > found.allowed
        if last or found.converged or hopeless:
            return


def stated(draws: Draws, settings: Settings, method: str, reason: str, watched: Watched) -> TraceEstimate:
    """Add the interval; not yet whether it is narrow enough.

    Args:
        draws: What is known.
        settings: What is wanted.
        method: By which it is known.
        reason: Why that one.
        watched: Of the products or samples.

    Returns:
        The estimate, not converged.
    """
    rounding = watched.rounding(draws.value)
    half = (rounding or 0.0) + (0.0 if draws.exact else student.half_width(draws.stderr, draws.probes))
    unknown = draws.value != draws.value
    return TraceEstimate(
        value=draws.value,
        stderr=draws.stderr,
        low=-float("inf") if unknown else draws.value - half,
        high=float("inf") if unknown else draws.value + half,
        confidence=1.0 if draws.exact and rounding is None else student.CONFIDENCE,
        probes=draws.probes,
        products=draws.products,
        method=method,
        reason=reason,
        converged=False,
        tolerance=settings.tolerance,
        absolute_tolerance=settings.absolute_tolerance,
        exact=draws.exact,
        rank=draws.rank,
        parts=draws.parts,
        rounding=rounding,
        check=watched.check,
    )


def _full(settings: Settings, vectors: int) -> bool:
    """Whether XTrace has no room for another vector."""
    return settings.max_rows is not None and 2 * (vectors + 1) + LEFT_OUT > settings.max_rows
