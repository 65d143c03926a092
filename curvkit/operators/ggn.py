"""The generalised Gauss-Newton matrix of an objective, seen through its products."""

from __future__ import annotations

from typing import Literal, cast

from curvkit.errors import UnsupportedModel
from curvkit.objectives import Objective
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.output_graph import OutputGraph
from curvkit.operators.plan import Plan, Residency

WRONG_TANGENT = 1e-4
"""Largest |w'(Jv) - v'(J'w)| / (||w|| ||Jv||). Rounding in float32 makes 1e-7; a once_differentiable function about 1 over the root of the
number of outputs."""


class GGN(BatchwiseOperator):
    """G, the generalised Gauss-Newton matrix of an `Objective`: its Hessian without the second derivative of the model.

        G v = (1 / W) sum_b J_b' H_out,b J_b v,    W = sum_b weight_b
        J_b = dz_b / dtheta,    H_out,b = d^2 total_b / dz_b^2,    z_b = the model's outputs for batch b

    exact up to rounding, for all the data, weighted as `Hessian` is. The outputs are what the model returns: with logits and
    cross-entropy G is the Fisher matrix; a model that returns probabilities has another G. G is positive semidefinite where the loss
    is convex in the outputs, as cross-entropies and squared errors are. J v is taken by differentiating J'u in u, so that reverse
    mode is all that the model must support; H_out has a closed form for the common losses, see `curvkit.losses.hessian_in_outputs`.

    The operator belongs to the parameters as they are at its construction; if they change, products are refused.

    Args:
        objective: The function; its loss takes (outputs, targets). A model with half-precision parameters is measured as a float32 copy.
        residency: "retained", "streamed", or "auto" by the memory budget.
        budget_bytes: Memory for graphs; None takes half of what is free.
        plan: An earlier plan, to repeat its products bit for bit; then the two options before have no say.

    Raises:
        InvalidArgument: If an option is out of range, or the plan is for another dtype, device, number of threads or kind of product.
        UnsupportedModel: If the objective is random, the loss differs between two evaluations, or it is linear in the outputs, as
            nll_loss is in log-probabilities, so that G would be zero.
        UnknownObjective: If the loss does not take outputs and targets, depends on no parameter, or on some past the outputs.
        CurvkitError: If the loss is not finite.

    Cost: construction about 1.5 gradients of one batch, and 1.3 of all if retained. A product then takes about 1.2 gradients
        retained, 2.4 streamed. Memory: about that of `Hessian`.
    Source: Schraudolph (2002); J v by two reverse passes as in Townsend (2017), "A new trick for calculating Jacobian vector products".

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from curvkit.objectives import Objective
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> G = GGN(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))
        >>> G.matvec(torch.tensor([1.0, 0.0])).tolist()   # 2 x x', as the model is linear
        [2.0, 4.0]
    """

    kind = OutputGraph

    def __init__(
        self,
        objective: Objective,
        *,
        residency: Residency | Literal["auto"] = "auto",
        budget_bytes: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__(objective, residency=residency, budget_bytes=budget_bytes, plan=plan)
        with self._measuring():
            asymmetry = cast(OutputGraph, next(self._graphs())).asymmetry(self.space)
        if asymmetry > WRONG_TANGENT:
            raise UnsupportedModel(
                f"GGN: w'(J v) and v'(J'w) differ by {asymmetry:.0e} of their size for random v and w, so that J v is wrong: the model has "
                "an operation whose backward pass torch cannot differentiate, and does not say so, as a custom function marked "
                "once_differentiable. Write its backward pass with differentiable operations."
            )
