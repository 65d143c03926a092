"""Estimators of a diagonal that need nothing of the matrix but its products."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from curvkit import seeds
from curvkit.estimators.expected import Expected, refuse_too_large
from curvkit.objectives import Objective
from curvkit.operators import CurvatureOperator
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.plan import VECTORS, Plan, choose
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate
from curvkit.results.trace_estimate import TraceParts

CHECKS, RETAINING = 5.0, 1.3
"""Gradients that an operator costs before its first product: of the first batch for its plan and checks, and of the data for graphs that
are kept. Measured on one CPU thread: 3 to 8 for a perceptron and a residual network of 0.3 to 0.7 million parameters."""
TEMPORARIES = 6
"""Times the graph of the batch at hand: what a product allocates on the way, at most, as where one wide layer is all of the model."""
MATRICES = {"Hessian": "hessian", "GGN": "ggn", "Hessian - GGN": "hessian - ggn"}
"""Names of matrices in estimates, by those of operators."""


@dataclass(frozen=True, eq=False)
class OperatorDiagonal:
    """The diagonal of an operator as estimated from its products, parameter-shaped."""

    values: dict[str, Tensor]
    stderr: dict[str, Tensor]
    """Standard errors; NaN: unknown, for one sample alone; 0: nothing was sampled."""
    samples: int
    """That `stderr` rests on; 0: nothing was sampled."""
    products: int
    """With the operator."""
    sums: TraceParts | None = None
    """Sums over each parameter tensor with their samples; None where no error of a sum is known."""
    notes: tuple[str, ...] = ()


@runtime_checkable
class ProductEstimator(Protocol):
    """An estimator that works on any operator: a Hessian, its residual H - G, what deflation leaves of it."""

    @property
    def num_products(self) -> int:
        """With the operator, in one estimate."""
        ...

    @property
    def num_vectors(self) -> int:
        """Of the length of the parameters that it holds at most, beside what a product holds."""
        ...

    def of_operator(self, A: CurvatureOperator, *, seed: int) -> OperatorDiagonal:
        """Estimate the diagonal of a symmetric matrix.

        Args:
            A: Multiplied `num_products` times.
            seed: Of every draw.

        Returns:
            The diagonal with its doubt.

        Raises:
            CurvkitError: If a product is not finite.
        """
        ...


def estimated_by_products(
    estimator: ProductEstimator,
    operator: type[BatchwiseOperator],
    objective: Objective,
    *,
    seed: int | None,
    instead: str,
) -> DiagonalEstimate:
    """Run an estimator on an operator of an objective.

    Args:
        estimator: A frozen dataclass of options, which gives its name to the estimate.
        operator: `Hessian`, or `Residual` for H - G.
        objective: The function.
        seed: Of every draw; None draws one.
        instead: What to use where memory does not suffice, as a sentence without its full stop.

    Returns:
        The diagonal.

    Raises:
        UnsupportedModel: If memory does not suffice, or the objective is none that has products.
        CurvkitError: If a product is not finite.
    """
    began, seed, objective = time.perf_counter(), seeds.settle(seed), objective.raised()
    plan = choose(objective, kind=operator.kind)
    counts = {"products": estimator.num_products, "vectors": estimator.num_vectors}
    expected = expected_of_products(objective, plan, operator, **counts)
    vectors = replace(
        expected, held_bytes=0
    )  # graphs are the operator's, which streams and cuts them where memory runs out
    refuse_too_large(type(estimator).__name__, objective, vectors, instead=instead)
    A = operator(objective, plan=plan)
    found = estimator.of_operator(A, seed=seed)
    spent = expected_of_products(objective, A.plan, operator, products=found.products, vectors=estimator.num_vectors)
    peak = expected.peak_bytes(objective)
    cost = Cost(spent.gradients, time.perf_counter() - began, found.products, peak)
    matrix = MATRICES[operator.kind.matrix]
    stderr, notes = found.stderr if found.samples else None, (*A.notes, *found.notes)
    return DiagonalEstimate(found.values, stderr, matrix, repr(estimator), cost, found.samples, seed, found.sums, notes)


def expected_of_products(
    objective: Objective, plan: Plan, operator: type[BatchwiseOperator], *, products: int, vectors: int
) -> Expected:
    """Count what products take.

    Args:
        objective: As it is computed with.
        plan: Of the operator.
        operator: Its class.
        products: How many.
        vectors: Of the length of the parameters, held beside what a product holds.

    Returns:
        Work, with that of making the operator, and memory.
    """
    retained = plan.residency == "retained"
    making = CHECKS / len(objective.batches) + (RETAINING if retained else 0.0)
    held = plan.graph_bytes * retained + TEMPORARIES * plan.batch_bytes // plan.micro_batches
    per = operator.kind.gradients_per_product[0 if retained else 1]
    gradients = 1 + (
        len(objective.batches) if retained else 1
    )  # the whole one, and that of each batch whose graph is kept
    return Expected(making + products * per, vectors + VECTORS + gradients, held)
