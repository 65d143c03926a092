"""Sharpness: the largest eigenvalues of the Hessian at a point, with every doubt that is known."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, get_args

import torch

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg import lanczos
from curvkit.linalg.basis import norm
from curvkit.linalg.krylov import Which
from curvkit.linalg.recorded import recorded
from curvkit.measures.data_doubt import halves, spread
from curvkit.measures.definitions import definition, doubts
from curvkit.measures.engine import OPERATORS, Engine
from curvkit.measures.products import Rounding, other_arithmetic, refuse_asymmetry
from curvkit.measures.remembering import decided, in_plan, recorded_arithmetic, settled_seed
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.vectors import rows_that_fit
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, Hessian, MixedHessian
from curvkit.results import Eigenpairs
from curvkit.results.journal import NOTHING_KEPT, Journal

Arithmetic = Literal["exact", "bfloat16"]


@dataclass(frozen=True)
class SharpnessSettings(Engine):
    """How sharpness is measured; `search` has the eigenvalues that are wanted and the budget of products."""

    measure: ClassVar[str] = "sharpness"

    search: lanczos.Settings = field(default_factory=lanczos.Settings)
    data_doubt: bool = True
    """Also measure how far the result depends on the sample."""
    arithmetic: Arithmetic = "exact"
    """"exact" multiplies in the precision of the model; "bfloat16" searches by products in mixed precision, as of autocast, and recomputes
    every value and residual by products in float32. Their error, some thousandths of ||H||, bounds what the search can reach."""
    rounding: Rounding = "auto"
    """How the rounding of float32 products is seen: "float64" recomputes the residuals by products in float64; "perturbation" repeats
    products with weights and data moved by one rounding; "auto" takes float64 where it runs and there are no convolutions."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.rounding not in get_args(Rounding):
            raise InvalidArgument(
                f"sharpness: rounding={self.rounding!r} is not one of auto, float64, perturbation. Use 'auto' if in doubt."
            )
        if self.arithmetic not in get_args(Arithmetic):
            raise InvalidArgument(
                f"sharpness: arithmetic={self.arithmetic!r} is not one of exact, bfloat16. Use 'exact' if in doubt."
            )
        if self.arithmetic == "bfloat16" and self.rule != "reverse":
            raise InvalidArgument(
                f"sharpness: arithmetic='bfloat16' does not go with rule={self.rule!r}, whose differences are taken in float64. "
                "Leave one of them at its default."
            )


def sharpness_steps(
    objective: Objective,
    settings: SharpnessSettings | None = None,
    *,
    seed: int | None = None,
    journal: Journal = NOTHING_KEPT,
) -> Iterator[Sharpness]:
    """Measure sharpness step by step: one partial result after each product, so that a caller can show progress and stop.

    Args:
        objective: The function.
        settings: What is wanted; None takes the defaults.
        seed: Of the random part of the start vectors; None draws one and records it.
        journal: Where products are kept, and recalled from if the run is gone on with; `curvkit.results.StateFolder` is one.

    Yields:
        Partial results, each at least as good as the one before, and last the complete one.

    Raises:
        InvalidArgument: If a setting does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.
    """
    settings, began, seed = settings or SharpnessSettings(), journal.clock(), settled_seed(journal, seed)
    found = settings.checked(objective)
    operator, searched = _operators(objective, settings, journal)
    fits = partial(rows_that_fit, operator.objective, settings.memory_bytes, settings.search.max_rows)
    search = replace(settings.search, max_rows=decided(journal, "basis rows", fits))
    start = operator.gradient if search.which != "smallest" else None
    other, doubted = _other_arithmetic(operator, searched, settings)
    A, other = recorded(searched, journal, "search"), recorded_arithmetic(other, journal)
    result: Sharpness | None = None
    for pairs in lanczos.search(A, search, start=start, seed=seed, other=other):
        _refuse_asymmetry(pairs, settings.rule)
        result = Sharpness(
            eigenpairs=replace(pairs, space=operator.space),
            definition=definition(operator),
            loss=operator.loss,
            gradient_norm=norm(operator.gradient),
            spread=None,
            halves=None,
            stage="searching",
            plan=replace(searched.plan, basis_rows=search.max_rows),
            seed=seed,
            seconds=journal.clock() - began,
            products=pairs.products,
            unused=operator.unused,
            preflight=found,
            arithmetic=_named(torch.bfloat16) if isinstance(searched, MixedHessian) else _named(operator.dtype),
            notes=(*objective.notes, *doubted, *doubts(found), *searched.notes),
        )
        yield result
    del A, other, searched
    if result is None or result.eigenpairs.vectors is None:
        return
    if settings.data_doubt:
        objective, certified = operator.objective, result
        try:
            measured = spread(operator, result.eigenpairs.vectors[:, result.leading], journal)
            result = replace(result, spread=measured, stage="spread", products=result.products + (measured is not None))
            if len(operator.notes) > 0 and operator.notes[-1] not in result.notes:  # memory ran out just now
                plan = replace(operator.plan, basis_rows=search.max_rows)
                result = replace(result, plan=plan, notes=(*result.notes, operator.notes[-1]))
            yield replace(result, seconds=journal.clock() - began)
            del operator  # and with it the graphs of all the data, before those of a half are made
            for bracketed in _with_halves(result, objective, replace(settings, search=search), journal):
                result = replace(bracketed, seconds=journal.clock() - began)
                yield result
        except Exception as error:  # the user's model on a part of the data; the eigenvalues stand
            if _is_our_fault(error):
                raise
            reason = f"the doubt from data could not be measured: {type(error).__name__}: {error}"
            result = replace(result, halves=None, notes=(*certified.notes, reason))
    yield replace(result, stage="complete", seconds=journal.clock() - began)


def sharpness(
    objective: Objective,
    num_eigenvalues: int = 1,
    *,
    which: Which = "largest",
    tolerance: float | None = None,
    max_products: int | None = None,
    seed: int | None = None,
    settings: SharpnessSettings | None = None,
) -> Sharpness:
    """Measure the largest eigenvalues of the Hessian of an objective.

        sharpness = lambda_max(d^2 L / d theta^2), the largest algebraic eigenvalue

    Args:
        objective: The function: model, loss, data.
        num_eigenvalues: How many.
        which: "largest", "smallest" (algebraic), "both" ends, or largest "magnitude".
        tolerance: Relative residual at which an eigenvalue counts as converged; None takes that of `settings`, 1e-3 by default.
        max_products: Budget of the search; None takes that of `settings`, 500 by default.
        seed: Of the random part of the start vectors; None draws one and records it.
        settings: Everything else: memory, engine, blocks, time, doubt from data.

    Returns:
        Eigenvalues with recomputed residuals, the doubt from the data, and the definition of what was measured.

    Raises:
        InvalidArgument: If an argument is out of range.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.

    Cost: typically 10 to 20 products of about two gradients each; as much again for the doubt from the data.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(5, 1)
        >>> result = sharpness(Objective(model, F.mse_loss, [(x, x[:, :1])]), seed=0)
        >>> ones = torch.cat([x, torch.ones(64, 1)], 1)   # linear regression: H = 2 X'X / N
        >>> truth = torch.linalg.eigvalsh(2 * ones.T @ ones / 64)[-1]
        >>> abs(result.value - truth.item()) < 1e-3
        True
    """
    settings = settings or SharpnessSettings()
    search = replace(
        settings.search,
        num=num_eigenvalues,
        which=which,
        tolerance=settings.search.tolerance if tolerance is None else tolerance,
        max_products=settings.search.max_products if max_products is None else max_products,
    )
    *_, last = sharpness_steps(objective, replace(settings, search=search), seed=seed)
    return last


def _with_halves(
    result: Sharpness, objective: Objective, settings: SharpnessSettings, journal: Journal
) -> Iterator[Sharpness]:
    largest, which, before = result.eigenpairs.values[0].item(), result.eigenpairs.which, result.products
    if which == "smallest" or (which == "magnitude" and largest <= 0.0):
        return  # lambda_max is not among the values, and the bracket is one of lambda_max
    brackets = halves(
        objective,
        largest,
        seed=result.seed,
        limits=settings.search,
        make=partial(OPERATORS[settings.rule], budget_bytes=settings.graph_bytes),
        journal=journal,
    )
    for count, bracket in enumerate(brackets, start=1):
        yield replace(result, halves=bracket, stage="halves", products=before + (count + 1) // 2)


def _refuse_asymmetry(pairs: Eigenpairs, rule: str) -> None:
    """As soon as a search shows it."""
    refuse_asymmetry("sharpness", pairs.asymmetry, lanczos.asymmetry_limit(pairs), rule=rule)


def _operators(
    objective: Objective, settings: SharpnessSettings, journal: Journal
) -> tuple[Hessian | DifferenceHessian, Hessian | DifferenceHessian | MixedHessian]:
    """The matrix that is measured, and the one that the search multiplies with: the same, unless that is in mixed precision."""
    if settings.arithmetic == "exact":
        operator = settings.operator(objective, journal)
        return operator, operator
    options = {"residency": settings.residency, "budget_bytes": settings.graph_bytes}
    mixed = in_plan(MixedHessian, objective, journal, "search", **options)
    return replace(settings, residency="streamed").operator(objective, journal), mixed


def _other_arithmetic(
    operator: Hessian | DifferenceHessian,
    searched: Hessian | DifferenceHessian | MixedHessian,
    settings: SharpnessSettings,
) -> tuple[lanczos.OtherArithmetic, tuple[str, ...]]:
    """How the rounding of products is seen, and a note where that is not as asked."""
    if searched is not operator:
        return lanczos.OtherArithmetic(operator), ()
    return other_arithmetic(operator, settings.rounding)


def _is_our_fault(error: Exception) -> bool:
    """Whether something other than a refusal was raised in curvkit's own lines, not in the model, the loss or torch."""
    if isinstance(error, CurvkitError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "curvkit"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
