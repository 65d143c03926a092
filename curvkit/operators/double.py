"""The Hessian of the same objective in float64: what the float32 products are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.losses.batches import cast
from curvkit.objectives import Objective
from curvkit.operators.folding import FoldBatchNorm
from curvkit.operators.graph import GradientGraph, product
from curvkit.operators.hessian import Hessian
from curvkit.operators.plan import rows_are_independent
from curvkit.parameters import ParameterSpace


class DoubleHessian:
    """The matrix of a `Hessian`, multiplied in float64 with a copy of the model, batch after batch.

    The weights and the data are the float32 numbers, widened; every operation on them is made in float64. Nothing is retained:
    each call of `matmat` builds the graphs anew, once for all of its vectors, so that it is for a few products, such as those
    of a certificate.

    Args:
        operator: The Hessian whose objective, point and plan are taken.

    Raises:
        UnsupportedModel: If the model or the loss does not run in float64.

    Cost: construction copies the parameters in float64 and runs a few rows; matmat takes (1.3 + 2 k) gradients in float64, which on a
        CPU take about twice as long, and the memory of one batch's graph in float64, within the plan's budget where batches can be cut.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[0.1, 0.2]])
        >>> H = DoubleHessian(Hessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))])))
        >>> H.matvec(torch.tensor([1.0, 0.0], dtype=torch.float64)).round(decimals=6).tolist()   # 2 x x'
        [0.02, 0.04]
    """

    dtype = torch.float64

    def __init__(self, operator: Hessian) -> None:
        self.space: ParameterSpace = operator.space
        self.n, self.device = operator.n, operator.device
        self._operator = operator
        self._parts, self._owners = operator.objective.cut(_cuts(operator))
        first = self._parts.with_batches(self._parts.batches[:1])
        try:
            self._double = first.converted(dtype=torch.float64)
            with self._double.measuring(), torch.no_grad():
                self._double.terms(0)
        except (CurvkitError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedModel(f"the model or the loss does not run in float64 ({reason})") from error

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n], in float64.

        Args:
            v: [n] float64.

        Returns:
            H v, [n] float64.

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.
        """
        return self.matmat(v[:, None]).squeeze(1)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors in one pass over the data, [n, k] -> [n, k], in float64.

        Args:
            V: [n, k] float64.

        Returns:
            H V, [n, k] float64.

        Raises:
            InvalidArgument: If `V` does not fit, or the parameters have changed.
        """
        self._operator.refuse_moved()
        if V.shape != (self.n, V.shape[-1]) or V.dtype != torch.float64 or V.device != self.device:
            raise InvalidArgument(
                f"DoubleHessian: vectors of shape {tuple(V.shape)}, {V.dtype} on {V.device} were given; they must be [{self.n}, k], "
                f"torch.float64 on {self.device}. Convert them with .to(operator.device, torch.float64)."
            )
        pieces = [list(self.space.split(v)) for v in V.unbind(1)]
        rows = torch.zeros(V.shape[1], self.n, dtype=torch.float64, device=self.device)
        targets, weights = [list(self.space.split(row)) for row in rows], []
        for index, owner in enumerate(self._owners):
            part = self._part(index)
            with part.measuring(), FoldBatchNorm(part.model):
                graph = GradientGraph.build(part, 0, number=owner)
                weights.append(graph.weight)
                for i, (target, v) in enumerate(zip(targets, pieces, strict=True)):
                    for row, piece in zip(target, product([graph], v, keep=i + 1 < len(pieces)), strict=True):
                        if piece is not None:
                            row += piece
        return rows.div_(self._parts.denominator(weights)).T

    def _part(self, index: int) -> Objective:
        return self._double.with_batches([cast(self._parts.batches[index], dtype=torch.float64)])


def _cuts(operator: Hessian) -> int:
    """Into how many parts each batch is cut, so that a graph in float64 fits beside those that are retained."""
    plan, objective = operator.plan, operator.objective
    if plan.micro_batches > 1:
        return 2 * plan.micro_batches
    held = plan.graph_bytes if plan.residency == "retained" else 0
    room, need = max(plan.budget_bytes - held, plan.budget_bytes // 4), 2 * plan.batch_bytes
    if need <= room or not rows_are_independent(objective, objective.batches):
        return 1
    return math.ceil(need / room)
