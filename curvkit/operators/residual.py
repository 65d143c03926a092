"""What the generalised Gauss-Newton matrix leaves out of the Hessian, seen through its products."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from curvkit.losses import LossTerms
from curvkit.objectives import Objective
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.graph import GradientGraph
from curvkit.operators.output_graph import refuse_other_ways


class ResidualGraph(GradientGraph):
    """The gradient of <dL/dz held fixed, z(theta)> for the outputs z of a batch, with its graph."""

    matrix: ClassVar[str] = "Hessian - GGN"

    @classmethod
    def evaluated(cls, objective: Objective, index: int) -> LossTerms:
        """Run a batch, and hold the gradient of its loss in the outputs fixed; call it inside `objective.measuring()`.

        Args:
            objective: Model, loss and data.
            index: Which batch.

        Returns:
            Terms whose value and gradient are those of the loss, and whose second derivative is that of the model alone.
        """
        outputs, targets = objective.outputs(index)
        z = outputs.detach().requires_grad_()
        terms = objective.terms_of(z, targets)
        refuse_other_ways(objective, terms)
        if not (outputs.requires_grad and terms.total.requires_grad):
            return replace(terms, total=terms.total.detach())
        (u,) = torch.autograd.grad(terms.total, z, materialize_grads=True)
        linear = (u.detach() * outputs).sum()
        return replace(terms, total=terms.total.detach() + (linear - linear.detach()))


class Residual(BatchwiseOperator):
    """H - G, the Hessian of an `Objective` without its generalised Gauss-Newton matrix: the curvature of the model, not of the loss.

        H - G = (1 / W) sum_b sum_k u_bk d^2 z_bk / dtheta^2,    u_b = d total_b / dz_b held fixed

    z_b the model's outputs for batch b. It is the Hessian of <u_b, z_b(theta)>, so that no two products are subtracted from each other.
    It is indefinite; for a model that is linear in its parameters it is zero, and for a piecewise linear one its diagonal is.

    Args:
        objective: The function; its loss takes (outputs, targets).
        residency: As for `Hessian`.
        budget_bytes: As for `Hessian`.
        plan: As for `Hessian`.

    Raises:
        InvalidArgument: As for `Hessian`.
        UnsupportedModel: As for `Hessian`.
        UnknownObjective: If the loss does not take outputs and targets, depends on no parameter, or on some past the outputs.
        CurvkitError: If the loss is not finite.

    Cost: that of a product with the Hessian.
    Source: Schraudolph (2002) for the splitting.

    Example:
        >>> import torch.nn.functional as F
        >>> class Product(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        ...     def forward(self, x):
        ...         return self.w[:1] * self.w[1:] * x
        >>> A = Residual(Objective(Product(), F.mse_loss, [(torch.ones(1), torch.zeros(1))]))   # u = 2 w_1 w_2 = 4
        >>> A.matvec(torch.tensor([1.0, 0.0])).tolist()
        [0.0, 4.0]
    """

    kind = ResidualGraph
