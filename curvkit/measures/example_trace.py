"""The trace from samples in which every example has signs of its own, beside an exact part where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.estimators.ggn_structure import GGNStructure
from curvkit.estimators.recordings.coverage import Coverage, coverage
from curvkit.estimators.squares.example_squares import ExampleSquares
from curvkit.linalg import student
from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.certificate import AS_COMPUTED, OtherArithmetic
from curvkit.linalg.hutchinson import Samples, probe
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.stopping import Told, stopped
from curvkit.linalg.trace_check import PROBES, Witness
from curvkit.losses import hessian_in_outputs
from curvkit.measures.example_probes import ESTIMATOR, PER_PROBE, ExampleProbes
from curvkit.measures.example_way import METHODS, Way, keeps
from curvkit.objectives import Objective
from curvkit.operators.plan import Plan
from curvkit.results import TraceEstimate
from curvkit.results.journal import Journal, Kept

ROOTS = "trace: signs of roots"
CHECKS = (2 * PROBES * PER_PROBE[1], 2 * PROBES * (PER_PROBE[1] + 1.0))
"""Gradients that three samples in two precisions take, without and with a control; one in float64 counts as one."""


@dataclass(frozen=True, eq=False)
class ExampleTrace:
    """A measurement by `Way`."""

    objective: Objective
    """In the precision that is computed in, whole."""
    plan: Plan
    """Of the products; the data is cut as it says."""
    way: Way
    seed: int

    def probes(self, *, keep: bool | None = None) -> ExampleProbes:
        """What gives samples.

        Args:
            keep: The graphs of all batches; None by the plan.

        Returns:
            The samples, by their numbers.
        """
        return self._probes(self.objective, keep=keeps(self.plan) if keep is None else keep)

    def known(self, journal: Journal) -> Tensor:
        """The exact part.

        Args:
            journal: Of the measurement; the sums over each batch are kept.

        Returns:
            [p] float64: the trace of G by parameter tensors, or zero without a control.

        Raises:
            UnsupportedModel: If the loss has no known factor, or a parameter cannot be treated.

        Cost: `Way.control` gradients.
        """
        p = len(self.objective.parameters.names)
        if not self.way.control:
            return torch.zeros(p, dtype=torch.float64)
        structure = GGNStructure.of(self.objective, ESTIMATOR)
        total, weights = torch.zeros(p, dtype=torch.float64), list[float]()
        for index, piece in enumerate(self._pieces()):

            def made(piece: Objective = piece) -> Tensor:
                found, weight = structure.sums(piece)
                sums = [found[name].sum(dtype=torch.float64).cpu() for name in piece.parameters.names]
                return torch.stack([*sums, torch.tensor(weight, dtype=torch.float64)])

            row = _kept(journal, f"control/{self._cut}/{index}", made, p + 1)
            total += row[:-1]
            weights.append(row[-1].item())
        return total / self.objective.denominator(weights)

    def told(self, journal: Journal, *, asked: bool) -> Iterator[Told]:
        """Sample without an end.

        Args:
            journal: Of the measurement; the rows are kept.
            asked: Whether the method was asked for by name.

        Yields:
            What is known after each probe.
        """
        lengths = tuple(entry.numel for entry in self.objective.parameters.entries)
        known, source, samples = self.known(journal), self.probes(), Samples(lengths)
        while True:
            number = samples.size
            samples.append(_kept(journal, f"probe/{self._cut}/{number}", lambda i=number: source.row(i), len(lengths)))
            draws = samples.draws(products=samples.size, step=1, known=known)
            yield draws, self.way.method, "as asked" if asked else self.way.reason

    def rounding(self, journal: Journal) -> float | None:
        """How far rounding puts the mean of the samples off, as three of them in float64 show it.

            d_i = s~_i - s_i,    rounding = |mean d| + t s / sqrt(m)

        To s_i belongs, with a control, a sample of the exact part: ||J'(S v)||^2 for random signs v, H_out = S S'.

        Args:
            journal: Of the measurement.

        Returns:
            The half-width.

        Cost: three samples in each precision.
        """

        def made() -> Tensor:
            double = self.objective.converted(dtype=torch.float64)
            pair = [self._probes(each, keep=False) for each in (double, self.objective)]
            both = [(each, ExampleSquares.of(each.objective, ESTIMATOR)) for each in pair]
            rows_ = [[each.row(i).sum() + self._root(squares, i) for i in range(PROBES)] for each, squares in both]
            return torch.tensor(rows_[0], dtype=torch.float64) - torch.tensor(rows_[1], dtype=torch.float64)

        d = _kept(journal, f"rounding/{self._cut}", made, PROBES)
        return abs(d.mean().item()) + student.quantile(PROBES - 1) * (d.std() / PROBES**0.5).item()

    def _probes(self, objective: Objective, *, keep: bool) -> ExampleProbes:
        parts = objective.cut(self.plan.micro_batches)[0]
        return ExampleProbes(parts, self._covered, residual=self.way.control > 0.0, seed=self.seed, keep=keep)

    @property
    def _cut(self) -> int:
        """What is kept belongs to the parts of the data."""
        return self.plan.micro_batches

    @cached_property
    def _covered(self) -> Coverage:
        """In the parts of the plan, which may have changed since the way was chosen."""
        parts = self.plan.micro_batches
        return self.way.coverage if parts == self.way.parts else coverage(self.objective.cut(parts)[0])

    def _pieces(self) -> list[Objective]:
        parts = self.objective.cut(self.plan.micro_batches)[0]
        return [parts.with_batches([batch]) for batch in parts.batches]

    def _root(self, squares: ExampleSquares, draw: int) -> float:
        """A sample of tr G."""
        if not self.way.control:
            return 0.0
        objective = squares.objective

        def cotangents(index: int, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
            number = draw * len(objective.batches) + index
            v = seeds.signs(outputs.numel(), self.seed, ROOTS, number, dtype=outputs.dtype, device=outputs.device)
            yield hessian_in_outputs(objective.loss, outputs.detach(), targets).root(v.view_as(outputs))

        total, weights = 0.0, list[float]()
        for found, weight in squares.batches(cotangents):
            total += sum(value.sum(dtype=torch.float64).item() for value in found.values())
            weights.append(weight)
        return total / objective.denominator(weights)


class SeenSamples(Witness):
    """What three products show of the symmetry of second derivatives, and three samples of rounding; then nothing is left to look at.

    Args:
        A: The Hessian by products.
        seed: Of the probes that are multiplied.
        other: The same matrix by other arithmetic.
    """

    def __init__(self, A: LinearMap, *, seed: int, other: OtherArithmetic) -> None:
        super().__init__(A)
        self.compared = other.reference is not None
        """Samples can be held against those in float64, so that rounding is measured on them."""
        self.measured: float | None = None
        """What that showed."""
        for index in range(PROBES):
            self.matvec(probe(A, seed, index))
        self.look(AS_COMPUTED if self.compared else other, beside=PROBES)

    def rounding(self, value: float) -> float | None:
        """What rounding adds to the half-width; see the base class."""
        return super().rounding(value) if self.measured is None else self.measured


def example_steps(
    it: ExampleTrace, search: linalg_trace.Settings, watched: SeenSamples, journal: Journal
) -> Iterator[TraceEstimate]:
    """Measure, until the interval is narrow enough.

    Args:
        it: What is measured, and how.
        search: What is wanted.
        watched: The products have been looked at.
        journal: Of the measurement.

    Yields:
        Partial results, and last the one at which the rule or the budget stopped.

    Raises:
        CurvkitError: If a sample is not finite.
        UnsupportedModel: If a batch uses a parameter in a way that the first of its shape does not.
    """
    began, checks = journal.clock(), 0.0
    if watched.compared:
        watched.measured, checks = it.rounding(journal), CHECKS[1 if it.way.control else 0]
    if search.max_seconds is not None:
        search = replace(search, max_seconds=max(search.max_seconds - (journal.clock() - began), 1e-9))
    told = it.told(journal, asked=search.method in METHODS)
    for found in stopped(told, search, watched, AS_COMPUTED, journal.clock):
        yield replace(found, gradients=it.way.gradients(found.probes, it.plan) + checks)


def _kept(journal: Journal, name: str, make: Callable[[], Tensor], size: int) -> Tensor:
    """What was kept, or what is made now."""
    key, found = f"examples/{name}", journal.recalled(f"examples/{name}")
    if found is not None and found.tensor.shape == (size,) and bool(found.tensor.isfinite().all()):
        return found.tensor.double().clone()
    began = time.perf_counter()
    made = make()
    journal.keep(key, Kept(made.clone(), time.perf_counter() - began))
    return made
