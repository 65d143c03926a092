"""Ways to an exact diagonal, what each takes, and which is gone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from curvkit.errors import UnknownObjective, UnsupportedModel
from curvkit.estimators import unit_products
from curvkit.estimators.expected import Expected, held_bytes
from curvkit.estimators.ggn_structure import predicted_gradients
from curvkit.estimators.piecewise_proof import diagonals_are_equal, proof_gradients
from curvkit.estimators.products import expected_of_products
from curvkit.estimators.rules.forms import CHUNK_BYTES
from curvkit.losses.batches import rows
from curvkit.objectives import Objective
from curvkit.operators import GGN, Hessian
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.plan import Plan, choose, relative_size

Matrix = Literal["hessian", "ggn"]
Way = Literal["auto", "products", "structure"]
OPERATORS: dict[Matrix, type[BatchwiseOperator]] = {"hessian": Hessian, "ggn": GGN}
COPIES = 4
"""Of the parameters, by structure: the sum, what a piece adds, and temporaries of both."""
PIECE_BYTES = 256 << 20
"""For the graph of the examples that are taken together, by structure."""
PASSES = 7
"""Times that graph, at the peak: with gradients and squares in the shape of activations, at most, as where one wide layer is all."""


@dataclass(frozen=True)
class Chosen:
    """A way, and what it takes."""

    way: Literal["structure", "products"]
    expected: Expected
    plan: Plan | None = None
    """Of the operator; None by structure."""
    why: str | None = None
    """The structure does not serve; None where it was not asked."""


def choose_way(objective: Objective, matrix: Matrix, way: Way) -> Chosen:
    """Choose the cheaper way by prediction.

    Args:
        objective: In the precision that is computed in.
        matrix: Whose diagonal is wanted.
        way: "auto" for the choice, or the one that is asked for.

    Returns:
        The way.

    Raises:
        UnsupportedModel: If the structure is asked for and there is none.
        UnknownObjective: If the loss does not take outputs and targets, and the matrix or the way needs it.
        CurvkitError: If memory does not suffice for one product.

    Cost: of `Exact.expected`.
    """
    n, operator, why = objective.parameters.n, OPERATORS[matrix], None
    if way != "products":
        try:
            expected = _by_structure(objective, matrix)
            if way == "structure" or expected.gradients <= n * operator.kind.gradients_per_product[0]:
                if matrix == "hessian":
                    _refuse_unequal(objective)
                return Chosen("structure", expected)
        except (UnsupportedModel, UnknownObjective) as error:
            if way == "structure":
                raise
            why = str(error)
    plan = choose(objective, kind=operator.kind)
    size = unit_products.chunk_size(n, objective.dtype, objective.device, plan)
    expected = expected_of_products(objective, plan, operator, products=n, vectors=1 + 2 * size)
    return Chosen("products", expected, plan, why)


def refuse_costly(objective: Objective, matrix: Matrix, chosen: Chosen, most: float) -> None:
    """Refuse what costs too much; what it would take in time is measured on gradients of the first batch.

    Args:
        objective: In the precision that is computed in.
        matrix: For the message.
        chosen: The way.
        most: Gradients.

    Raises:
        UnsupportedModel: If more are expected.

    Cost: nothing, or two gradients of the first batch.
    """
    gradients = chosen.expected.gradients
    if gradients <= most:
        return
    first = objective.with_batches(objective.batches[:1])
    first.gradient()
    began = time.perf_counter()
    first.gradient()
    one = time.perf_counter() - began
    one *= math.fsum(relative_size(batch, objective.batches[0]) for batch in objective.batches)
    why = f" There is no structure that serves: {chosen.why}" if chosen.why else ""
    other = (
        "ExampleHutchinson" if matrix == "hessian" else "Fisher, whose mean is the GGN where the loss is a likelihood,"
    )
    raise UnsupportedModel(
        f"Exact: the diagonal of the {OPERATORS[matrix].kind.matrix} of {objective.parameters.n:,} parameters takes about {gradients:,.0f} "
        f"gradients of the data by {chosen.way}, more than max_gradients={most:,.0f}: about {duration(gradients * one)} at {duration(one)} "
        f"for each. Use {other} for an estimate with standard errors, leave parameters out by patterns, take less data, or raise "
        f"max_gradients.{why}"
    )


def rows_of_a_piece(objective: Objective) -> int:
    """Choose how many examples are taken together, by structure.

    Args:
        objective: In the precision that is computed in.

    Returns:
        At least one.

    Cost: a forward pass over a sixteenth of the first batch.
    """
    largest = max(rows(batch) or 1 for batch in objective.batches)
    return max(1, PIECE_BYTES * largest // max(held_bytes(objective, second=False), 1))


def duration(seconds: float) -> str:
    """A time for people.

    Args:
        seconds: Any.

    Returns:
        In its own unit.

    Example:
        >>> duration(0.012), duration(7300.0)
        ('0.012 s', '2 hours')
    """
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s"


def _by_structure(objective: Objective, matrix: Matrix) -> Expected:
    gradients = predicted_gradients(objective) + (proof_gradients(objective) if matrix == "hessian" else 0.0)
    held = PASSES * min(held_bytes(objective, second=False), PIECE_BYTES) + CHUNK_BYTES
    return Expected(gradients, COPIES, held)


def _refuse_unequal(objective: Objective) -> None:
    if not diagonals_are_equal(objective, 0):
        raise UnsupportedModel(
            "Exact: the network is not shown to be piecewise linear in each parameter entry, so that the diagonal of its Hessian is "
            "not that of the GGN. Use way='products', or ExampleHutchinson, which estimates it."
        )
