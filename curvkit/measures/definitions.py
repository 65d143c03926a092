"""What stands beside a number that was measured on an operator: its definition, and doubts of the derivatives."""

from __future__ import annotations

from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.preflight import Preflight
from curvkit.results import Definition


def definition(operator: BatchwiseOperator) -> Definition:
    """Say which matrix an operator is.

    Args:
        operator: Of the Hessian.

    Returns:
        Its loss, mean, data, mode and precision.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> from curvkit.operators import Hessian
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


def doubts(found: Preflight | None) -> tuple[str, ...]:
    """Say what a check of second derivatives leaves open.

    Args:
        found: The check; None if there was none.

    Returns:
        Sentences for the notes of a result.
    """
    if found is None:
        return ()
    made = (str(found),) if found.verdict == "not checked" else ()
    rows = ", ".join(f"{name}[{row}]" for name, row in found.fixed)
    return (*made, f"padding rows count as fixed: {rows}") if rows else made
