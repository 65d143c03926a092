"""The Hessian of an objective, seen through its products."""

from __future__ import annotations

from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.graph import GradientGraph


class Hessian(BatchwiseOperator):
    """H = d^2 L / d theta^2, the Hessian of an `Objective`, by products.

        H v = (1 / W) sum_b d/dtheta (grad total_b . v),    W = sum_b weight_b

    exact up to rounding (reverse over reverse), for all the data of the objective. The graphs of the gradients are retained, so that a
    product costs about two gradients, or streamed: built anew for each product, one batch at a time. Where the second
    derivative does not exist (ReLU at 0) it is the one of the side that torch takes.

    The operator belongs to the parameters as they are at its construction; if they change, products are refused.

    Args:
        objective: The function. A model with half-precision parameters is measured as a float32 copy.
        residency: "retained", "streamed", or "auto" by the memory budget.
        budget_bytes: Memory for graphs; None takes half of what is free.
        plan: An earlier plan, to repeat its products bit for bit; then the two options before have no say.

    Raises:
        InvalidArgument: If an option is out of range, or the plan is for another dtype, device, number of threads or kind of product.
        UnsupportedModel: If the objective is random, or the loss differs between two evaluations.
        UnknownObjective: If the loss depends on no parameter.
        CurvkitError: If the loss is not finite.

    Cost: construction about 1.5 gradients of one batch, and 1.3 of all if retained. A product then takes about 2 gradients
        retained, 3.3 streamed. Memory: retained about 2.6 times the activations of a gradient over all data; streamed the same
        for one batch.
    Source: Pearlmutter (1994) for the product; here by double backward, as in Werbos (1988) and every autograd system since.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> H = Hessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))
        >>> H.matvec(torch.tensor([1.0, 0.0])).tolist()   # 2 x x'
        [2.0, 4.0]
    """

    kind = GradientGraph
