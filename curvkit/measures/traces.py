"""The trace of the Hessian at a point, with the interval that its probes leave, and whose share it is."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch

from curvkit.errors import CurvkitError, UnsupportedModel, ran_out_of_memory
from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.basis import norm
from curvkit.linalg.recorded import recorded
from curvkit.linalg.trace import Method
from curvkit.losses import KnownLoss, token_cross_entropy
from curvkit.losses.batches import inputs_and_targets
from curvkit.measures import piecewise_linear
from curvkit.measures.definitions import definition, doubts
from curvkit.measures.engine import Engine
from curvkit.measures.example_trace import ExampleTrace, SeenSamples, example_steps
from curvkit.measures.example_way import METHODS, ON_SINGLE_ROWS, Way, chosen, probes_expected, refuse_unfit
from curvkit.measures.products import other_arithmetic, refuse_asymmetry
from curvkit.measures.remembering import decided, recorded_arithmetic, settled_seed
from curvkit.measures.trace_result import Trace, shares
from curvkit.measures.vectors import rows_that_fit
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, Hessian, Plan
from curvkit.results import TraceEstimate, TraceParts
from curvkit.results.journal import NOTHING_KEPT, Journal

Operator = Hessian | DifferenceHessian
SIZES = ("max_rows", "block_size")
"""What a run decides by the memory that is free."""
TOGETHER = 4
"""Probes per product where graphs are streamed, which then are built once for all of them."""


@dataclass(frozen=True)
class TraceSettings(Engine):
    """How a trace is measured; `search` has method, tolerance and budget."""

    measure: ClassVar[str] = "trace"

    search: linalg_trace.Settings = field(default_factory=linalg_trace.Settings)
    structure: bool = True
    """Compute the trace of a piecewise linear network exactly, as that of its GGN, where it is shown to be one: with method "auto" if that
    is predicted to cost no more than sampling, with "exact" if it costs no more than `max_products`."""


def trace_steps(
    objective: Objective,
    settings: TraceSettings | None = None,
    *,
    seed: int | None = None,
    journal: Journal = NOTHING_KEPT,
) -> Iterator[Trace]:
    """Measure a trace step by step: one partial result after each step of the method, so that a caller can show progress and stop.

    Args:
        objective: The function.
        settings: What is wanted; None takes the defaults.
        seed: Of every draw; None draws one and records it.
        journal: Where products are kept, and recalled from if the run is gone on with; `curvkit.results.StateFolder` is one.

    Yields:
        Partial results, and last the complete one. The first ones may have no value yet.

    Raises:
        InvalidArgument: If a setting does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout, or its second
            derivatives are wrong.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.
    """
    settings, began, seed = settings or TraceSettings(), journal.clock(), settled_seed(journal, seed)
    refuse_unfit(settings.search, settings.rule)
    checked = settings.checked(objective)
    operator = settings.operator(objective, journal)
    search = replace(settings.search, **decided(journal, "search", partial(_sizes, settings, operator), SIZES))
    result: Trace | None = None
    said: list[str] = []
    for found in _estimates(operator, replace(settings, search=search), seed, said, journal):
        if found.check is not None:
            refuse_asymmetry("trace", found.check.asymmetry, found.check.asymmetry_limit, rule=settings.rule)
        by_layer, by_parameter = shares(operator.objective.model, operator.space, found.parts)
        result = Trace(
            estimate=found,
            definition=definition(operator),
            unit=unit(operator.objective),
            loss=operator.loss,
            gradient_norm=norm(operator.gradient),
            layers=by_layer,
            parameters=by_parameter,
            stage="sampling",
            plan=replace(operator.plan, basis_rows=search.max_rows),
            seed=seed,
            seconds=journal.clock() - began,
            products=found.products + (0 if found.check is None else found.check.products),
            unused=operator.unused,
            preflight=checked,
            gradients=_gradients(found, operator),
            notes=(*objective.notes, *said, *_remarks(found, search), *doubts(checked), *operator.notes),
        )
        yield result
    if result is not None:
        yield replace(result, stage="complete", seconds=journal.clock() - began)


def trace(
    objective: Objective,
    *,
    tolerance: float | None = None,
    method: Method | None = None,
    max_products: int | None = None,
    seed: int | None = None,
    settings: TraceSettings | None = None,
) -> Trace:
    """Measure the trace of the Hessian of an objective.

        trace = sum_j d^2 L / d theta_j^2, the sum of the eigenvalues

    Args:
        objective: The function: model, loss, data.
        tolerance: Half-width of the 95 % interval relative to the trace; None takes that of `settings`, 0.05 by default.
        method: "exact", "hutchinson", "deflated", "hutch++", "xtrace", "example-hutchinson", "controlled", or "auto" by predicted cost;
            None takes that of `settings`, "auto" by default.
        max_products: Budget; None takes that of `settings`, 500 by default.
        seed: Of every draw; None draws one and records it.
        settings: Everything else: memory, engine, rank, time.

    Returns:
        The trace with its interval, the shares of layers and parameter tensors, and the definition of what was measured.

    Raises:
        InvalidArgument: If an argument is out of range.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout, or its second
            derivatives are wrong.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.

    Cost: 30 to a few hundred products of about two gradients each, or of one with signs per example.
    Accuracy: the interval holds the trace for this data with probability 0.95, about; see docs/concepts/trace.md.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> result = trace(Objective(torch.nn.Linear(5, 1), F.mse_loss, [(x, x[:, :1])]), seed=0)
        >>> truth = 2 * (1 + x.square().mean(0).sum())   # linear regression: H = 2 X'X / N, X with a column of ones
        >>> result.estimate.exact, abs(result.value - truth.item()) < 1e-4
        (True, True)
    """
    settings = settings or TraceSettings()
    search = replace(
        settings.search,
        tolerance=settings.search.tolerance if tolerance is None else tolerance,
        method=settings.search.method if method is None else method,
        max_products=settings.search.max_products if max_products is None else max_products,
    )
    *_, last = trace_steps(objective, replace(settings, search=search), seed=seed)
    return last


def unit(objective: Objective) -> str | None:
    """Say what one unit of a loss is, where that is known.

    Args:
        objective: Whose loss is looked at.

    Returns:
        Words; None for losses whose unit is that of the data, or unknown.
    """
    loss = objective.loss
    if not isinstance(loss, KnownLoss):
        return None
    if loss.function is token_cross_entropy:
        lengths = sorted({inputs_and_targets(batch)[2].shape[1] for batch in objective.batches})
        span = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
        total = "sum of nats over tokens" if loss.reduction == "sum" else "mean nats per token"
        return f"{total}, sequences of {span} tokens"
    if loss.name.startswith(("cross_entropy", "binary_cross_entropy", "nll_loss", "kl_div")):
        return "sum of nats over terms" if loss.reduction == "sum" else "mean nats per term"
    return None


def most_by_structure(settings: TraceSettings, n: int) -> float:
    """Say what the way by the structure of a network may cost.

    Args:
        settings: As for `trace_steps`.
        n: Parameters.

    Returns:
        Products; 0 where that way is not gone at all.
    """
    search = settings.search
    if not settings.structure or settings.rule != "reverse" or n <= linalg_trace.SMALL:
        return 0.0
    expected = {"auto": float(piecewise_linear.probes_expected(search.tolerance)), "exact": math.inf}
    return min(float(search.max_products), expected.get(search.method, 0.0))


def _estimates(
    operator: Operator, settings: TraceSettings, seed: int, said: list[str], journal: Journal
) -> Iterator[TraceEstimate]:
    """By the structure of the network where that is exact and cheap or asked for, else by products; `said` takes notes."""
    search, clock, start = settings.search, journal.clock, operator.gradient
    began = clock()
    way = chosen(operator.objective, search, operator.plan) if settings.rule == "reverse" else None
    most = most_by_structure(settings, operator.n)
    if way is not None:
        most = min(most, products_by_examples(way, search, operator))
    if most > 0.0:
        if piecewise_linear.applies(operator.objective, seed, most=most):
            done = yield from _by_structure(operator, search, began, said, journal)
            if done:
                return
        if search.max_seconds is not None:
            search = replace(search, max_seconds=max(search.max_seconds - (clock() - began), 1e-9))
    other, doubted = other_arithmetic(operator)
    said += doubted
    A, other = recorded(operator, journal, "hessian"), recorded_arithmetic(other, journal)
    if way is not None:
        try:
            watched = SeenSamples(A, seed=seed, other=other)  # memory may run out there, which changes the plan
            it = ExampleTrace(operator.objective, operator.plan, way, seed)
            yield from example_steps(it, search, watched, journal)
            return
        except (UnsupportedModel, RuntimeError, MemoryError) as error:
            if search.method in METHODS or not (isinstance(error, UnsupportedModel) or ran_out_of_memory(error)):
                raise
            reason = str(error).strip().partition("\n")[0]
            said.append(f"signs per example could not be used, and products were: {type(error).__name__}: {reason}")
    yield from linalg_trace.search(A, search, lengths=lengths_of(operator), seed=seed, start=start, other=other)


def _by_structure(
    operator: Operator, search: linalg_trace.Settings, began: float, said: list[str], journal: Journal
) -> Generator[TraceEstimate, None, bool]:
    """The trace of the GGN; False, and no value, once its time is seen not to suffice, or it fails."""
    lengths, clock = lengths_of(operator), journal.clock
    unknown, none = float("nan"), torch.zeros(0, len(lengths), dtype=torch.float64)
    cost = f"at the predicted cost of {piecewise_linear.predicted_products(operator.objective):.3g} products"
    compared = f"where sampling to the tolerance typically takes {piecewise_linear.probes_expected(search.tolerance):,}"
    partial = TraceEstimate(
        value=unknown,
        stderr=unknown,
        low=-float("inf"),
        high=float("inf"),
        confidence=1.0,
        probes=0,
        products=0,
        method="exact",
        reason=f"{piecewise_linear.REASON}, {cost}, {'as asked' if search.method == 'exact' else compared}; checked by "
        "products with random signs on each parameter tensor",
        converged=False,
        tolerance=search.tolerance,
        absolute_tolerance=search.absolute_tolerance,
    )
    sums, first = torch.full((len(lengths),), unknown, dtype=torch.float64), clock()
    try:
        for share, so_far in piecewise_linear.ggn_diagonal_sums(operator.objective, journal):
            sums, now = so_far, clock()
            left = (now - first) * (1 / share - 1)
            if search.max_seconds is not None and now - began + left > search.max_seconds:
                return False
            yield partial
    except (
        ON_SINGLE_ROWS
    ) as error:  # the model under vmap, or a class of negative weight that the first rows did not have
        reason = str(error).strip().partition("\n")[0]
        said.append(
            "the structure of the network, which is piecewise linear, could not be used, and products were: one example at a time gave "
            f"{type(error).__name__}{': ' if reason else ''}{reason}"
        )
        return False
    value = sums.sum().item()
    if not math.isfinite(value):
        raise CurvkitError(
            "trace: the sum of squares that gives the trace of the GGN is not finite. The function or its derivatives overflow there: "
            "check weights and data for NaN, or compute in float64."
        )
    known = {"value": value, "stderr": 0.0, "low": value, "high": value, "converged": True, "exact": True}
    yield replace(partial, **known, rank=operator.n, parts=TraceParts(lengths, sums, none))
    return True


def products_by_examples(way: Way, search: linalg_trace.Settings, operator: Operator) -> float:
    """Say what sampling the examples is expected to cost.

    Args:
        way: How they are sampled.
        search: What is wanted.
        operator: Of the Hessian.

    Returns:
        Products with the Hessian.
    """
    expected = min(probes_expected(search.tolerance, way), search.max_products)
    return way.gradients(expected, operator.plan) / _per_product(operator)


def _per_product(operator: Operator) -> float:
    """Gradients that a product is counted as."""
    return operator.kind.gradients_per_product[0 if operator.plan.residency == "retained" else 1]


def _gradients(found: TraceEstimate, operator: Operator) -> float | None:
    """Work in gradients; None by the structure of a piecewise linear network."""
    if found.method == "exact" and found.products == 0:
        return None
    checks = 0 if found.check is None else found.check.products
    own = found.products * _per_product(operator) if found.gradients is None else found.gradients
    return own + checks * _per_product(operator)


def lengths_of(operator: Operator) -> tuple[int, ...]:
    """Count the coordinates of each parameter tensor.

    Args:
        operator: Whose space is divided.

    Returns:
        n in all.
    """
    return tuple(entry.numel for entry in operator.space.entries)


def _sizes(settings: TraceSettings, operator: Operator) -> dict[str, int | None]:
    """What `fitted` chooses."""
    search = fitted(settings, operator.objective, operator.plan)
    return {name: getattr(search, name) for name in SIZES}


def fitted(settings: TraceSettings, objective: Objective, plan: Plan) -> linalg_trace.Settings:
    """Fit the search into the memory, with several probes at once where graphs are streamed.

    Args:
        settings: As for `trace_steps`.
        objective: In the precision that is computed in.
        plan: Of the operator.

    Returns:
        The search that is made.
    """
    search = settings.search
    rows = rows_that_fit(objective, settings.memory_bytes, search.max_rows)
    together = TOGETHER if plan.residency == "streamed" and search.block_size == 1 else search.block_size
    return replace(search, max_rows=rows, block_size=max(1, min(together, (rows - 2) // 2)))


def _remarks(found: TraceEstimate, search: linalg_trace.Settings) -> Iterator[str]:
    """What was asked for and is not so: a tolerance below the rounding, a rank without a subspace."""
    if found.rounding is not None and found.rounding > found.allowed:
        yield (
            f"the tolerance is below the rounding of products: it allows ± {found.allowed:.2g}, rounding alone is ± {found.rounding:.2g}. "
            "More probes do not help; float64 does"
        )
    if search.rank is not None and (
        found.exact or found.method in METHODS or search.method in ("hutchinson", "xtrace")
    ):
        yield f"rank={search.rank} has no part in this: {found.method} makes no subspace of a chosen size"
