"""How much would the sharpness differ on other data? Doubt from the sample, apart from the doubt of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnknownObjective
from curvkit.linalg import lanczos
from curvkit.linalg.basis import dot
from curvkit.linalg.recorded import derived, recorded
from curvkit.measures.remembering import in_plan
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.independence import rows_are_independent
from curvkit.results.journal import NOTHING_KEPT, Journal

MAX_PARTS = 8
"""A single batch is cut into this many parts at most."""
HALF_SEARCH = lanczos.Settings(tolerance=3e-2, max_products=60)
"""How well the top eigenvector of one half is found; any vector gives a valid held-out quotient."""


@dataclass(frozen=True)
class Spread:
    """Curvature along one fixed direction on each part of the data: v'H_b v, whose weighted mean is v'Hv."""

    quotients: tuple[float, ...]
    """One per batch, or per part of a single batch; of a loss that is a sum, scaled to the size of all the data."""
    weights: tuple[float, ...]
    """Loss terms of the parts, or their class weights; of a loss that is a sum, their examples."""
    stderr: float
    """Standard error of their weighted mean v'Hv as an estimate for data of the same kind, parts taken as independent and v as fixed."""

    @property
    def lowest(self) -> float:
        """Least quotient."""
        return min(self.quotients)

    @property
    def highest(self) -> float:
        """Largest quotient."""
        return max(self.quotients)


@dataclass(frozen=True)
class Halves:
    """A bracket of the population's largest eigenvalue, from two halves of the data.

    For data that the weights have not seen. With u_A the top eigenvector of half A, u_A' H_B u_A has, over the draw of the
    independent half B, the expectation u_A' H u_A <= lambda_max(H) for the Hessian H of the population: a lower bound in
    expectation. The value in the sample is biased the other way, E lambda_max(H_sample) >= lambda_max(H), because the
    largest eigenvalue is convex in the matrix. On the data that the weights were fitted to both may lie below the
    population's value: then they compare two halves of that data, no more.
    """

    held_out: tuple[float, float]
    """u_A' H_B u_A and u_B' H_A u_B."""
    in_sample: float
    """The largest eigenvalue of all the data, as far as it is known: its bias is upwards only once it has converged."""

    @property
    def lower(self) -> float:
        """Mean of the two held-out quotients: below lambda_max of the population, in expectation."""
        return sum(self.held_out) / 2


def parts_of(objective: Objective, num: int) -> tuple[Objective, ...]:
    """Divide the data, but a single batch only where its rows are examples of their own.

    Args:
        objective: All the data.
        num: How many parts at most.

    Returns:
        The parts; the objective alone where rows are steps of time, nodes of a graph, or compared with each other.
    """
    if len(objective.batches) == 1 and not rows_are_independent(objective, objective.batches):
        return (objective,)
    return objective.in_parts(num)


def spread(operator: BatchwiseOperator, v: Tensor, journal: Journal = NOTHING_KEPT) -> Spread | None:
    """Compute v'H_b v over the batches, or over parts of a single batch.

    Args:
        operator: The Hessian of all the data.
        v: [n], of unit length.
        journal: Of the measurement.

    Returns:
        The spread; None if the data cannot be divided.

    Cost: one product; for a single batch three gradients more.
    """
    objective, parts = operator.objective, parts_of(operator.objective, MAX_PARTS)
    if len(parts) == 1:
        return None
    if len(objective.batches) == 1:
        divided = objective.with_batches([part.batches[0] for part in parts])
        operator = in_plan(type(operator), divided, journal, "spread", residency="streamed")

    def made() -> Tensor:
        return torch.tensor(operator.batch_quotients(v), dtype=torch.float64)  # [2, b]

    quotients, weights = derived(recorded(operator, journal, "spread"), "quotients", [v], made, (2, None)).tolist()
    if objective.loss.reduction == "sum":
        sizes = [_size(operator.objective.with_batches([batch])) for batch in operator.objective.batches]
        quotients, weights = [q * sum(sizes) / size for q, size in zip(quotients, sizes, strict=True)], sizes
    if len(quotients) < 2:
        return None
    total, count = math.fsum(weights), len(quotients)
    mean = math.fsum(w * q for w, q in zip(weights, quotients, strict=True)) / total
    squares = math.fsum((w * (q - mean)) ** 2 for w, q in zip(weights, quotients, strict=True))
    return Spread(tuple(quotients), tuple(weights), math.sqrt(squares * count / (count - 1)) / total)


def halves(
    objective: Objective,
    in_sample: float,
    *,
    seed: int,
    limits: lanczos.Settings,
    make: Callable[..., BatchwiseOperator] = Hessian,
    journal: Journal = NOTHING_KEPT,
) -> Iterator[Halves | None]:
    """Find the top eigenvector of each half and its quotient on the other.

    The search on a half starts at that half's own gradient, never at a vector that has seen the other half.

    Args:
        objective: All the data.
        in_sample: Its largest eigenvalue.
        seed: Of the start vectors.
        limits: Its `max_seconds` and `max_rows` hold for the search on one half.
        make: Makes the operator of one half.
        journal: Of the measurement.

    Yields:
        None after each product, and last the bracket; nothing at all if the data cannot be divided.

    Cost: about as much again as the search on all the data.
    """
    parts = parts_of(objective, 2)
    if len(parts) < 2:
        return
    tops: list[Tensor] = []
    settings = replace(HALF_SEARCH, max_seconds=limits.max_seconds, max_rows=limits.max_rows)
    for index, part in enumerate(parts):
        try:
            operator = in_plan(make, part, journal, f"half {index}", residency="auto")
        except UnknownObjective:  # a half without a loss term: all its targets are ignored
            return
        top = None
        A, own_seed = recorded(operator, journal, f"half {index}"), (seed + 1 + index) % seeds.SEED_LIMIT
        for pairs in lanczos.search(A, settings, start=operator.gradient, seed=own_seed):
            top = pairs.vectors
            yield None
        if top is None:
            return
        tops.append(top[:, 0])
    held_out = []
    for index, (u, other) in enumerate(((tops[0], parts[1]), (tops[1], parts[0]))):
        operator = in_plan(make, other, journal, f"held out {index}", residency="streamed")
        scale = _size(objective) / _size(other) if objective.loss.reduction == "sum" else 1.0
        A, quotient = recorded(operator, journal, f"held out {index}"), partial(_quotient, operator, u)
        held_out.append(scale * derived(A, "quotient", [u], quotient, ()).item())
        yield None
    yield Halves((held_out[0], held_out[1]), in_sample)


def _quotient(operator: BatchwiseOperator, u: Tensor) -> Tensor:
    """The quotient u'Au of a unit vector, a float64 scalar."""
    return torch.tensor(dot(u, operator.matvec(u.to(operator.dtype))), dtype=torch.float64)


def _size(objective: Objective) -> float:
    """Examples, or batches where examples are not defined: what a loss that is a sum grows with."""
    return float(objective.examples or len(objective.batches))
