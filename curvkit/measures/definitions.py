"""The definition of a number that was measured on an operator."""

from __future__ import annotations

from curvkit.operators import Hessian
from curvkit.results import Definition


def definition(operator: Hessian) -> Definition:
    """Say which matrix an operator is.

    Args:
        operator: Of the Hessian.

    Returns:
        Its loss, mean, data, mode and precision.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> H = Hessian(Objective(torch.nn.Linear(2, 1), F.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))]))
        >>> definition(H).parameters
        3
    """
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
