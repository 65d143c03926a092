"""The curvature at one point of a comparison: eigenvalues, doubt from data, adaptive sharpness, trace, in this order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg import lanczos
from curvkit.linalg.basis import norm
from curvkit.linalg.certificate import OtherArithmetic, assumed_error
from curvkit.losses import Batch
from curvkit.losses.batches import cast
from curvkit.measures import paired
from curvkit.measures.compared import Measured
from curvkit.measures.definitions import definition
from curvkit.measures.engine import OPERATORS, Engine
from curvkit.measures.probed_trace import probed_trace_steps
from curvkit.measures.products import Rounding, other_arithmetic, refuse_asymmetry
from curvkit.measures.vectors import rows_that_fit
from curvkit.objectives import Objective
from curvkit.operators import CurvatureOperator, DifferenceHessian, Hessian, Plan, Scaled
from curvkit.results import Eigenpairs

TOGETHER = 4
"""Probes per product where graphs are streamed, which then are built once for all of them."""
FURTHER = 10.0
"""Residuals are brought below the tolerance by this factor. On the demo's decoder that takes 3 products more, and the bound on what could
be missed comes from 11 % above lambda_max to 5 %; rounding in float32 keeps it there."""
Operator = Hessian | DifferenceHessian


@dataclass(frozen=True)
class ComparisonSettings(Engine):
    """How points are compared; `search` has how many eigenvalues are wanted, their tolerance and the budget of one search."""

    measure: ClassVar[str] = "compare"

    search: lanczos.Settings = field(default_factory=lanczos.Settings)
    probes: int = 60
    """Of the trace, the same for all points; with as many parameters at most it is exact. Their number is fixed beforehand, so that
    no point stops where its own number happens to look good."""
    data_doubt: bool = True
    """Also measure v'Hv on the parts of the data."""
    rounding: Rounding = "auto"
    """As of `SharpnessSettings`."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.probes < 2:
            raise InvalidArgument(
                f"compare: probes={self.probes!r} must be at least 2, since one has no standard error. 60 is the default; below 30 the "
                "interval is wide."
            )
        if self.search.which != "largest":
            raise InvalidArgument(
                f"compare: which={self.search.which!r} is not compared. Leave it at 'largest', or measure each point by sharpness."
            )


@dataclass(frozen=True, eq=False)
class Setup:
    """What all points share."""

    settings: ComparisonSettings
    parts: tuple[Batch, ...]
    """The data, divided for the standard errors."""
    seed: int
    plan: Plan | None
    """Of the reference's products, which the others repeat; None for the reference itself."""


def measured_steps(point: Measured, objective: Objective, setup: Setup) -> Iterator[Measured]:
    """Measure the curvature at one point, stage after stage; the operator, and with it the graphs, is let go at the end.

    Args:
        point: With its losses.
        objective: In the precision that all points share.
        setup: What they share beside that.

    Yields:
        The point with more and more of it known, one after each product.

    Raises:
        UnsupportedModel: If the objective has no curvature that could be measured.
        UnknownObjective: If the loss depends on no parameter.
        CurvkitError: If the loss or products are not finite, or memory does not suffice for the smallest parts.
    """
    settings, began = setup.settings, time.perf_counter()
    operator = _operator(objective, setup)
    rows = rows_that_fit(operator.objective, settings.memory_bytes, settings.search.max_rows)
    setup = replace(setup, settings=replace(settings, search=replace(settings.search, max_rows=rows)))
    other, doubted = other_arithmetic(operator, settings.rounding)
    point = replace(
        point,
        theta=operator.space.join([tensor.detach() for tensor in operator.objective.tensors]),
        definition=definition(operator),
        gradient_norm=norm(operator.gradient),
        unused=operator.unused,
    )
    notes = (*point.notes, *doubted)
    for measure in (_eigenvalues, _along, _adaptive, _trace):
        for step in measure(point, operator, other, setup):
            seconds = time.perf_counter() - began
            point = replace(step, seconds=seconds, plan=operator.plan, notes=(*notes, *operator.notes))
            yield point
    yield replace(point, stage="complete")


def _operator(objective: Objective, setup: Setup) -> Operator:
    """That of the reference's plan, so that the same weights give the same bits."""
    if setup.plan is None:
        return setup.settings.operator(objective)
    return OPERATORS[setup.settings.rule](objective, plan=setup.plan)


def _eigenvalues(point: Measured, operator: Operator, other: OtherArithmetic, setup: Setup) -> Iterator[Measured]:
    """The largest ones, from the gradient and a random direction that all points share."""
    for pairs in _searched(operator, setup.settings.search, operator.gradient, other, setup):
        yield replace(point, eigenpairs=pairs, stage="eigenvalues", products=pairs.products)


def _along(point: Measured, operator: Operator, other: OtherArithmetic, setup: Setup) -> Iterator[Measured]:
    """v'H_b v of the parts of the data, along the first eigenvector."""
    vectors = point.eigenpairs.vectors if point.eigenpairs is not None else None
    if not setup.settings.data_doubt or vectors is None or len(setup.parts) < 2:
        return
    if len(setup.parts) != len(operator.objective.batches):
        parts = [cast(batch, device=operator.device, dtype=operator.dtype) for batch in setup.parts]
        operator = type(operator)(operator.objective.with_batches(parts), residency="streamed")
    quotients, weights = operator.batch_quotients(vectors[:, 0])
    along = paired.joined(quotients, weights, point.losses)
    yield replace(point, along=along, stage="data", products=point.products + 1)


def _adaptive(point: Measured, operator: Operator, other: OtherArithmetic, setup: Setup) -> Iterator[Measured]:
    """The largest eigenvalue of diag|theta| H diag|theta|."""
    scale = point.theta.abs()
    exact: Any = other.reference  # curvature operators of the same space, seen as maps
    perturbed: Any = other.perturbed
    other = OtherArithmetic(
        None if exact is None else Scaled(exact, scale.to(exact.dtype)), tuple(Scaled(it, scale) for it in perturbed)
    )
    search = replace(setup.settings.search, num=1)
    for pairs in _searched(Scaled(operator, scale), search, scale * operator.gradient, other, setup):
        found = replace(pairs, vectors=None)
        yield replace(point, adaptive=found, stage="adaptive", products=point.products + pairs.products)


def _trace(point: Measured, operator: Operator, other: OtherArithmetic, setup: Setup) -> Iterator[Measured]:
    """By the probes that all points share."""
    settings = setup.settings
    together = TOGETHER if operator.plan.residency == "streamed" else 1
    steps = probed_trace_steps(
        operator,
        settings.probes,
        seed=setup.seed,
        other=other,
        block_size=together,
        max_seconds=settings.search.max_seconds,
    )
    for found in steps:
        if found.check is not None:
            refuse_asymmetry("compare", found.check.asymmetry, found.check.asymmetry_limit, rule=settings.rule)
        products = (operator.n if found.exact else found.probes) + (found.check.products if found.check else 0)
        yield replace(point, trace=found, stage="trace", products=point.products + products)


def _searched(
    A: CurvatureOperator, search: lanczos.Settings, start: Tensor, other: OtherArithmetic, setup: Setup
) -> Iterator[Eigenpairs]:
    """Search a little further than is asked for: a few more products halve the bound on what could be missed."""
    least, tolerance = assumed_error(A), search.tolerance
    aim = max(tolerance / FURTHER, least) if tolerance > least else tolerance
    for pairs in lanczos.search(A, replace(search, tolerance=aim), start=start, seed=setup.seed, other=other):
        refuse_asymmetry("compare", pairs.asymmetry, lanczos.asymmetry_limit(pairs), rule=setup.settings.rule)
        enough = lanczos.allowed(pairs.values, pairs.scale, tolerance)
        converged = (pairs.residuals <= enough) & (not pairs.recomputed or pairs.rounding <= enough)
        yield replace(pairs, tolerance=tolerance, converged=converged)
