"""The trace of a Hessian by a number of probes that is fixed beforehand, so that several points can share them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.linalg import hutchinson, student
from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.certificate import OtherArithmetic
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.trace_check import Witness
from curvkit.measures.paired import Gap
from curvkit.results.trace_estimate import ProductCheck


@dataclass(frozen=True, eq=False)
class ProbedTrace:
    """The mean of x'Hx over probes x that another point has seen, too; or the sum of all diagonal entries."""

    value: float
    stderr: float
    """0 if exact, NaN for one probe."""
    samples: Tensor
    """[m] float64, x_i'Hx_i; probe i depends on the seed and i alone. Empty if exact."""
    exact: bool = False
    check: ProductCheck | None = None
    """Symmetry and rounding of the products; None: not yet."""
    rounding: float = 0.0
    """What rounding adds to the half-width; 0 where it was not measured."""

    @property
    def probes(self) -> int:
        """How many, m."""
        return len(self.samples)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval; of rounding alone if exact."""
        return self.rounding + (0.0 if self.exact else student.half_width(self.stderr, self.probes))

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half_width

    def gap(self, reference: ProbedTrace) -> Gap:
        """Subtract the trace at the reference, probe by probe.

            d_i = x_i'(H - H') x_i,    tr H - tr H' = E d,    s = std(d) / sqrt(m)

        Args:
            reference: From probes of the same seed; those that both have are taken.

        Returns:
            The difference. Its interval is widened for few probes as that of a trace, and by the rounding of both.
        """
        rounding = self.rounding + reference.rounding
        if self.exact and reference.exact:
            value = self.value - reference.value
            return Gap(value, value - rounding, value + rounding, 0.0, 0.0)
        m = min(self.probes, reference.probes)
        if m < 2:
            return Gap(self.value - reference.value)
        d = self.samples[:m] - reference.samples[:m]
        value, stderr = d.mean().item(), (d.std() / m**0.5).item()
        half = student.half_width(stderr, m) + rounding
        both = (self.samples[:m].var() + reference.samples[:m].var()).item()
        return Gap(value, value - half, value + half, stderr, (both / m) ** 0.5, m)


def probed_trace_steps(
    A: LinearMap,
    probes: int,
    *,
    seed: int,
    other: OtherArithmetic,
    block_size: int = 1,
    max_seconds: float | None = None,
) -> Iterator[ProbedTrace]:
    """Sample a trace by so many probes, or compute it where as many products give every diagonal entry.

    Args:
        A: Symmetric, of order n.
        probes: m; exact if n <= m.
        seed: Probe i depends on (seed, i) alone.
        other: The same matrix by other arithmetic, to see rounding.
        block_size: Probes that are multiplied together.
        max_seconds: After this time what is there suffices.

    Yields:
        The state after each block of probes.

    Raises:
        CurvkitError: If a product has NaN or infinite entries.

    Cost: m products at most, and three of `other`.

    Example:
        >>> from curvkit.linalg import FunctionMap
        >>> A = FunctionMap(100, lambda v: 2 * v)
        >>> *_, found = probed_trace_steps(A, 30, seed=0, other=OtherArithmetic())
        >>> found.value, found.stderr, found.probes
        (200.0, 0.0, 30)
    """
    if A.n <= probes:
        *_, last = linalg_trace.search(
            A, linalg_trace.Settings(method="exact", max_products=A.n), seed=seed, other=other
        )
        none = torch.zeros(0, dtype=torch.float64)
        yield ProbedTrace(last.value, 0.0, none, exact=True, check=last.check, rounding=last.rounding or 0.0)
        return
    watched, began = Witness(A), time.monotonic()
    for draws in hutchinson.steps(watched, lengths=[A.n], seed=seed, block_size=block_size, most=probes):
        if watched.ready:
            watched.look(other, beside=0)
        samples = draws.parts.samples.sum(1) if draws.parts is not None else torch.zeros(0, dtype=torch.float64)
        rounding = watched.rounding(draws.value) or 0.0
        yield ProbedTrace(draws.value, draws.stderr, samples, check=watched.check, rounding=rounding)
        if max_seconds is not None and time.monotonic() - began > max_seconds and draws.probes > 1:
            return
