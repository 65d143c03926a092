"""Hessian products in mixed precision: matrix products and convolutions in bfloat16, as training under autocast has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from curvkit.errors import UnsupportedModel
from curvkit.losses import LossTerms
from curvkit.objectives import Objective
from curvkit.objectives.autocast import autocast_as_written
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.graph import GradientGraph
from curvkit.operators.plan import Plan, Residency


class MixedGraph(GradientGraph):
    """The gradient of a batch's total, whose forward pass ran under autocast to bfloat16; regions that the model opens count, too."""

    rule: ClassVar[str] = "reverse over reverse in bfloat16"

    @classmethod
    def evaluated(cls, objective: Objective, index: int) -> LossTerms:
        """Run model and loss on a batch, matrix products in bfloat16.

        Args:
            objective: Model, loss and data.
            index: Which batch.

        Returns:
            The terms of the loss.
        """
        with torch.autocast(objective.device.type, dtype=torch.bfloat16):
            return objective.terms(index)

    @classmethod
    def build(cls, objective: Objective, index: int, *, number: int | None = None) -> Self:
        """As `GradientGraph.build`; what activation checkpointing repeats is repeated in the same precision.

        Args:
            objective: Model, loss and data.
            index: Which batch.
            number: What messages call it, if it is a part of a batch.

        Returns:
            The graph.
        """
        with autocast_as_written():
            return super().build(objective, index, number=number)

    @classmethod
    def product(cls, graphs: Sequence[Any], pieces: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
        """As `GradientGraph.product`; what activation checkpointing repeats is repeated in the same precision.

        Args:
            graphs: Of the same parameters.
            pieces: v, parameter-shaped.
            keep: Whether the graphs are needed again.

        Returns:
            Parameter-shaped pieces of H v; None for zero.
        """
        with autocast_as_written():
            return super().product(graphs, pieces, keep=keep)


class MixedHessian(BatchwiseOperator):
    """The Hessian of an `Objective` by products whose matrix multiplications are in bfloat16.

    Weights, vectors and sums stay in float32; what autocast lowers is lowered: linear layers, convolutions and attention. On hardware with
    units for bfloat16 a product takes less time and half the memory of activations; the price is its error, some thousandths to some
    hundredths of ||H||. It is for searches whose result is checked by products in full precision, as
    `curvkit.measures.sharpness` does with `arithmetic="bfloat16"`; there the error is measured and stated.

    Args:
        objective: The function, in float32.
        residency: "retained", "streamed", or "auto" by the memory budget.
        budget_bytes: Memory for graphs; None takes half of what is free.
        plan: An earlier plan; then the two options before have no say.

    Raises:
        InvalidArgument: If an option is out of range, or the plan is for another dtype, device, number of threads or kind of product.
        UnsupportedModel: If the objective is random or in float64, which autocast does not lower.
        UnknownObjective: If the loss depends on no parameter.
        CurvkitError: If the loss is not finite.

    Cost: as `Hessian`, in bfloat16; on a CPU without such units it is no faster.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> H = MixedHessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))
        >>> H.matvec(torch.tensor([1.0, 0.0])).tolist()   # 2 x x'
        [2.0, 4.0]
    """

    kind = MixedGraph
    arithmetic = "bfloat16"
    """Of its matrix products, as messages name it."""
    product_error = 2.0 * torch.finfo(torch.bfloat16).eps
    """Of a product, relative to ||H||, until a larger one is measured: 0.016. Along the leading eigenvector: 0.0033 on an MLP, 0.0086
    on ResNet-20, 0.0020 on a decoder."""

    def __init__(
        self,
        objective: Objective,
        *,
        residency: Residency | Literal["auto"] = "auto",
        budget_bytes: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        if objective.raised().dtype != torch.float32:
            raise UnsupportedModel(
                f"Hessian: bfloat16 was asked for, but the model is in {objective.dtype}, of which autocast lowers nothing. "
                "Convert it first: objective.converted(dtype=torch.float32), or leave arithmetic at 'exact'."
            )
        super().__init__(objective, residency=residency, budget_bytes=budget_bytes, plan=plan)
