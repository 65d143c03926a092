"""What a measurement will take: plan, bytes and seconds, before anything long is run."""

from __future__ import annotations

import math
from dataclasses import replace

from curvkit.linalg import trace as linalg_trace
from curvkit.measures import piecewise_linear
from curvkit.measures.eigenvalues import SharpnessSettings
from curvkit.measures.engine import OPERATORS
from curvkit.measures.example_way import chosen, probes_expected, refuse_unfit
from curvkit.measures.traces import TraceSettings, fitted, most_by_structure
from curvkit.measures.vectors import rows_that_fit
from curvkit.objectives import Objective
from curvkit.operators.forecast import Forecast, forecast
from curvkit.operators.graph import BatchGraph
from curvkit.operators.plan import Plan

FIRST_EIGENVALUE, EACH_FURTHER = 15, 10
"""Products that a search by Lanczos typically takes."""
PROBES = 100
"""Products that a trace to 5 % typically takes where it is sampled."""


def forecast_sharpness(
    objective: Objective, settings: SharpnessSettings | None = None, *, searches: int = 0
) -> Forecast:
    """Plan `sharpness` without measuring.

    Args:
        objective: The function.
        settings: As for `sharpness_steps`; None takes the defaults.
        searches: How many more, for one eigenvalue each, stand beside it, see `Companions`.

    Returns:
        The plan with bytes and seconds, both estimated; 15 products for one eigenvalue, 10 for each further one, and as many again for
        the doubt from data.

    Raises:
        InvalidArgument: If a setting does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If memory does not suffice for one product.

    Cost: that of `curvkit.operators.plan.choose`, and two gradients of a few rows.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> data = [(torch.rand(64, 4), torch.randint(3, (64,)))]
        >>> found = forecast_sharpness(Objective(torch.nn.Linear(4, 3), F.cross_entropy, data))
        >>> found.plan.residency, found.products
        ('retained', 31)
    """
    settings = settings or SharpnessSettings()
    search, (objective, plan) = settings.search, settings.planned(objective)
    products = min(FIRST_EIGENVALUE + EACH_FURTHER * (search.num - 1), search.max_products, objective.parameters.n + 1)
    total = 2 * products + 1 if settings.data_doubt and search.which != "smallest" else products
    total += searches * min(FIRST_EIGENVALUE, search.max_products, objective.parameters.n + 1)
    rows = rows_that_fit(objective, settings.memory_bytes, search.max_rows)
    return _forecast(
        objective, replace(plan, basis_rows=rows), products=total, held=products, kind=OPERATORS[settings.rule].kind
    )


def forecast_trace(objective: Objective, settings: TraceSettings | None = None) -> Forecast:
    """Plan `trace` without measuring.

    Args:
        objective: The function.
        settings: As for `trace_steps`; None takes the defaults.

    Returns:
        The plan with bytes and seconds, both estimated; n products where all of the diagonal is computed, what its structure is
        predicted to take where that of the network gives the trace, else 100; with signs per example what `probes_expected` says, in
        products with the Hessian. Products that check others are not counted.

    Raises:
        InvalidArgument: If a setting does not fit, as `trace_steps` would say.
        UnsupportedModel: If the objective has no curvature that could be measured, for example because of dropout.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If memory does not suffice for one product.

    Cost: that of `curvkit.operators.plan.choose`, and two gradients of a few rows; where the structure may serve, that of
        `curvkit.measures.piecewise_linear.applies`.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> data = [(torch.rand(64, 4), torch.randint(3, (64,)))]
        >>> found = forecast_trace(Objective(torch.nn.Linear(4, 3), F.cross_entropy, data))
        >>> found.plan.residency, found.products   # 15 parameters
        ('retained', 15)
    """
    settings = settings or TraceSettings()
    objective, plan = settings.planned(objective)
    refuse_unfit(settings.search, settings.rule)
    n, search = objective.parameters.n, fitted(settings, objective, plan)
    way = chosen(objective, search, plan) if settings.rule == "reverse" else None
    expected = 0 if way is None else min(probes_expected(search.tolerance, way), search.max_products)
    per = OPERATORS[settings.rule].kind.gradients_per_product[0 if plan.residency == "retained" else 1]
    sampled = 0.0 if way is None else way.gradients(expected, plan) / per
    most = most_by_structure(settings, n)
    most = most if way is None else min(most, sampled)
    if most > 0.0 and piecewise_linear.applies(objective, 0, most=most):
        products, held = math.ceil(piecewise_linear.predicted_products(objective)), 0
    elif way is not None:
        products, held = math.ceil(sampled), 0
    else:
        linalg_trace.refuse_unfit(search, n)
        exact = search.method == "exact" or (search.method == "auto" and n <= linalg_trace.SMALL)
        products = min(n if exact else PROBES, search.max_products)
        held = linalg_trace.CHUNK if exact else products
    plan = replace(plan, basis_rows=search.max_rows)
    return _forecast(objective, plan, products=products, held=held, kind=OPERATORS[settings.rule].kind)


def _forecast(objective: Objective, plan: Plan, *, products: int, held: int, kind: type[BatchGraph]) -> Forecast:
    """A search holds a vector per product, and no more than it may."""
    rows = held if plan.basis_rows is None else min(held, plan.basis_rows)
    return forecast(objective, plan, products=products, basis_rows=rows, kind=kind)
