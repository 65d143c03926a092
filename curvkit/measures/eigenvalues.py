"""Sharpness: the largest eigenvalues of the Hessian at a point, with every doubt that is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.linalg import lanczos
from curvkit.linalg.basis import norm
from curvkit.linalg.krylov import Which
from curvkit.measures.data_doubt import Halves, Spread, halves, spread
from curvkit.objectives import Objective
from curvkit.operators import Hessian, Plan
from curvkit.operators.plan import Residency, free_memory
from curvkit.results import Definition, Eigenpairs, plain

Stage = Literal["searching", "spread", "halves", "complete"]

BASIS_FRACTION = 0.25
"""Share of the free memory that the Lanczos basis may take by default."""


@dataclass(frozen=True)
class SharpnessSettings:
    """How sharpness is measured; `search` has the eigenvalues that are wanted and the budget of products."""

    search: lanczos.Settings = field(default_factory=lanczos.Settings)
    residency: Residency | Literal["auto"] = "auto"
    memory_bytes: int | None = None
    """For graphs and basis, half each; None: half and a quarter of the memory that is free."""
    data_doubt: bool = True
    """Also measure how far the result depends on the sample."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise InvalidArgument(
                f"sharpness: memory_bytes={self.memory_bytes!r} must be positive. Pass bytes, for example 4 * 2**30."
            )


@dataclass(frozen=True, eq=False)
class Sharpness:
    """The extreme eigenvalues of the Hessian of an objective; a partial result while `stage` is not "complete"."""

    eigenpairs: Eigenpairs
    definition: Definition
    loss: float
    """L at the point."""
    gradient_norm: float
    """||grad L||; curvature at a point where it is not small is not that of a minimum."""
    spread: Spread | None
    """v'H_b v over the batches, v the first eigenvector; None if not (yet) measured."""
    halves: Halves | None
    """Bracket of the population's largest eigenvalue; None if not (yet) measured."""
    stage: Stage
    plan: Plan
    seed: int
    seconds: float
    products: int
    """Products with Hessians of all the data, those of halves counted as half."""
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        """The first eigenvalue: lambda_max for which="largest"."""
        return self.eigenpairs.values[0].item()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, without the vectors: what `--json` prints under "result".

        Returns:
            Mappings, lists, numbers and strings.
        """
        pairs = self.eigenpairs
        rows = zip(pairs.values, pairs.intervals, pairs.residuals, pairs.converged, strict=True)
        return plain(
            {
                "quantity": f"{pairs.which} eigenvalues of the Hessian",
                "definition": {**plain(self.definition), "text": str(self.definition)},
                "eigenvalues": [
                    {
                        "value": value,
                        "low": interval[0],
                        "high": interval[1],
                        "residual": residual,
                        "converged": converged,
                    }
                    for value, interval, residual, converged in rows
                ],
                "residuals_recomputed": pairs.recomputed,
                "tolerance": pairs.tolerance,
                "upper_bound": pairs.upper_bound,
                "lower_bound": pairs.lower_bound,
                "bounds_confidence": pairs.confidence,
                "multiplicities_below": pairs.multiplicities_below,
                "loss": self.loss,
                "gradient_norm": self.gradient_norm,
                "batch_spread": self.spread,
                "halves": None if self.halves is None else {**plain(self.halves), "lower": self.halves.lower},
                "products": self.products,
                "search_products": pairs.products,
                "seconds": self.seconds,
                "stage": self.stage,
                "unused_parameters": self.unused,
                "notes": self.notes,
            }
        )


def sharpness_steps(
    objective: Objective, settings: SharpnessSettings | None = None, *, seed: int | None = None
) -> Iterator[Sharpness]:
    """Measure sharpness step by step: one partial result after each product, so that a caller can show progress and stop.

    Args:
        objective: The function.
        settings: What is wanted; None takes the defaults.
        seed: Of the random part of the start vectors; None draws one and records it.

    Yields:
        Partial results, each at least as good as the one before, and last the complete one.

    Raises:
        InvalidArgument: If a setting does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite.
    """
    settings, began, seed = settings or SharpnessSettings(), time.perf_counter(), seeds.settle(seed)
    graphs = None if settings.memory_bytes is None else settings.memory_bytes // 2
    operator = Hessian(objective, residency=settings.residency, budget_bytes=graphs)
    search = replace(settings.search, max_rows=_rows(operator, settings))
    start = operator.gradient if search.which != "smallest" else None
    result: Sharpness | None = None
    for pairs in lanczos.search(operator, search, start=start, seed=seed):
        result = Sharpness(
            eigenpairs=replace(pairs, space=operator.space),
            definition=_definition(operator),
            loss=operator.loss,
            gradient_norm=norm(operator.gradient),
            spread=None,
            halves=None,
            stage="searching",
            plan=operator.plan,
            seed=seed,
            seconds=time.perf_counter() - began,
            products=pairs.products,
            unused=operator.unused,
            notes=objective.notes,
        )
        yield result
    if result is None or result.eigenpairs.vectors is None:
        return
    if settings.data_doubt:
        for doubted in _with_data_doubt(result, operator, graphs):
            result = replace(doubted, seconds=time.perf_counter() - began)
            yield result
    yield replace(result, stage="complete", seconds=time.perf_counter() - began)


def sharpness(
    objective: Objective,
    num_eigenvalues: int = 1,
    *,
    which: Which = "largest",
    tolerance: float = 1e-3,
    max_products: int = 500,
    seed: int | None = None,
    settings: SharpnessSettings | None = None,
) -> Sharpness:
    """Measure the largest eigenvalues of the Hessian of an objective.

        sharpness = lambda_max(d^2 L / d theta^2), the largest algebraic eigenvalue

    Args:
        objective: The function: model, loss, data.
        num_eigenvalues: How many.
        which: "largest", "smallest" (algebraic), "both" ends, or largest "magnitude".
        tolerance: Relative residual at which an eigenvalue counts as converged.
        max_products: Budget of the search.
        seed: Of the random part of the start vectors; None draws one and records it.
        settings: Everything else (memory, engine, blocks, time, doubt from data); its `search` is overridden by the arguments above.

    Returns:
        Eigenvalues with recomputed residuals, the doubt from the data, and the definition of what was measured.

    Raises:
        InvalidArgument: If an argument is out of range.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite.

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
    search = replace(settings.search, num=num_eigenvalues, which=which, tolerance=tolerance, max_products=max_products)
    *_, last = sharpness_steps(objective, replace(settings, search=search), seed=seed)
    return last


def _with_data_doubt(result: Sharpness, operator: Hessian, graphs: int | None) -> Iterator[Sharpness]:
    vectors = result.eigenpairs.vectors
    if vectors is None:
        return
    measured = spread(operator, vectors[:, 0])
    result = replace(result, spread=measured, stage="spread", products=result.products + (measured is not None))
    yield result
    if result.eigenpairs.which == "smallest":
        return
    before = result.products
    for count, bracket in enumerate(
        halves(operator.objective, result.value, seed=result.seed, budget_bytes=graphs), start=1
    ):
        result = replace(result, halves=bracket, stage="halves", products=before + (count + 1) // 2)
        yield result


def _rows(operator: Hessian, settings: SharpnessSettings) -> int:
    budget = (
        settings.memory_bytes // 2
        if settings.memory_bytes is not None
        else int(BASIS_FRACTION * free_memory(operator.device))
    )
    rows = budget // (operator.n * operator.dtype.itemsize)
    return rows if settings.search.max_rows is None else min(rows, settings.search.max_rows)


def _definition(operator: Hessian) -> Definition:
    objective = operator.objective
    return Definition(
        matrix="hessian",
        loss=objective.loss.name,
        reduction=objective.loss.reduction
        if operator.terms is None or objective.loss.reduction != "as returned"
        else "mean",
        terms=operator.terms,
        examples=objective.examples,
        batches=len(objective.batches),
        parameters=operator.n,
        mode=objective.mode,
        dtype=str(operator.dtype).removeprefix("torch."),
        attention=operator.plan.attention,
    )
