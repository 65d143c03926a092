"""The search for the largest eigenvalue of a Hessian between diagonals, with residuals and rounding as for the Hessian itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

from torch import Tensor

from curvkit.linalg import lanczos
from curvkit.measures.eigenvalues import SharpnessSettings
from curvkit.measures.products import other_arithmetic, refuse_asymmetry
from curvkit.measures.vectors import rows_that_fit
from curvkit.operators import CurvatureOperator, DifferenceHessian, Hessian
from curvkit.results import Eigenpairs


def largest_between(
    operator: Hessian | DifferenceHessian,
    between: Callable[[CurvatureOperator], CurvatureOperator],
    settings: SharpnessSettings,
    *,
    measure: str,
    start: Tensor,
    seed: int,
) -> Iterator[Eigenpairs]:
    """Search the largest eigenvalue of S (H + I) S + O.

    The same diagonals stand around every arithmetic in which H is computed, so that residuals are recomputed in float64, or products
    repeated with everything moved by one rounding, just as for H.

    Args:
        operator: H.
        between: Puts the diagonals around it, in the dtype of what it is given.
        settings: Tolerance, budget, memory and rounding; number and end of the eigenvalues are one and the largest.
        measure: What is measured, for messages.
        start: [n], a direction rich in the wanted eigenvector.
        seed: Of the random part of the start vector.

    Yields:
        Partial results, and last one with vectors and recomputed residuals.

    Raises:
        UnsupportedModel: If the products are not symmetric.
        CurvkitError: If products are not finite.
    """
    rows = rows_that_fit(operator.objective, settings.memory_bytes, settings.search.max_rows)
    search = replace(settings.search, num=1, which="largest", max_rows=rows)
    other, _ = other_arithmetic(operator, settings.rounding)
    # the other arithmetics of a Hessian have its space of parameters
    around = lanczos.OtherArithmetic(
        None if other.reference is None else between(cast(CurvatureOperator, other.reference)),
        tuple(between(cast(CurvatureOperator, perturbed)) for perturbed in other.perturbed),
    )
    for pairs in lanczos.search(between(operator), search, start=start, seed=seed, other=around):
        refuse_asymmetry(measure, pairs.asymmetry, lanczos.asymmetry_limit(pairs), rule=settings.rule)
        yield replace(pairs, space=operator.space)
