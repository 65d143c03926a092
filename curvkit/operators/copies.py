"""The same matrix computed by other arithmetic: in float64, or with everything perturbed by one rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from curvkit import seeds
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.losses.batches import Batch, cast, map_tensors
from curvkit.objectives import Objective
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.folding import FoldBatchNorm
from curvkit.operators.ggn import GGN
from curvkit.operators.hessian import Hessian
from curvkit.operators.independence import rows_are_independent
from curvkit.operators.memory import release
from curvkit.operators.relief import persisting, relieved
from curvkit.parameters import ParameterSpace


class _CopiedOperator:
    """Products of the matrix of a copy of the model, batch after batch, each graph built once for all vectors of a call."""

    dtype: torch.dtype

    def __init__(self, operator: BatchwiseOperator, cuts: int) -> None:
        self.space: ParameterSpace = operator.space
        self.n, self.device = operator.n, operator.device
        self._operator, self._cuts = operator, cuts
        self._parts, self._owners = operator.objective.cut(cuts)

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n].

        Args:
            v: [n], in this operator's dtype.

        Returns:
            H v, [n].

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.
        """
        return self.matmat(v[:, None]).squeeze(1)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors in one pass over the data, [n, k] -> [n, k].

        Args:
            V: [n, k], in this operator's dtype.

        Returns:
            H V, [n, k].

        Raises:
            InvalidArgument: If `V` does not fit, or the parameters have changed.
            CurvkitError: If memory does not suffice for the smallest parts.
        """
        self._operator.refuse_moved()
        if V.shape != (self.n, V.shape[-1]) or V.dtype != self.dtype or V.device != self.device:
            raise InvalidArgument(
                f"{type(self).__name__}: vectors of shape {tuple(V.shape)}, {V.dtype} on {V.device} were given; they must be "
                f"[{self.n}, k], {self.dtype} on {self.device}. Convert them with .to(operator.device, operator.dtype)."
            )
        pieces = [list(self.space.split(v)) for v in V.unbind(1)]
        return persisting(lambda: self._multiplied(pieces), self._relieve)

    def _multiplied(self, pieces: list[list[Tensor]]) -> Tensor:
        rows = torch.zeros(len(pieces), self.n, dtype=self.dtype, device=self.device)
        targets, weights = [list(self.space.split(row)) for row in rows], []
        for index, owner in enumerate(self._owners):
            part = self._part(index)
            with part.measuring(), FoldBatchNorm(part.model):
                graph = self._operator.kind.build(part, 0, number=owner)
                weights.append(graph.weight)
                for i, (target, v) in enumerate(zip(targets, pieces, strict=True)):
                    for row, piece in zip(
                        target, self._operator.kind.product([graph], v, keep=i + 1 < len(pieces)), strict=True
                    ):
                        if piece is not None:
                            row += piece
        return rows.div_(self._parts.denominator(weights)).T

    def _relieve(self, said: str) -> None:
        """Cut the batches further."""
        release(self.device)
        operator = self._operator
        plan = replace(operator.plan, residency="streamed", micro_batches=self._cuts)
        self._cuts = relieved(plan, operator.objective, said, kind=operator.kind).micro_batches
        self._parts, self._owners = operator.objective.cut(self._cuts)

    def _part(self, index: int) -> Objective:
        """The copy on one batch."""
        raise NotImplementedError


class _DoubleOperator(_CopiedOperator):
    """With a copy in float64."""

    dtype = torch.float64

    def __init__(self, operator: BatchwiseOperator) -> None:
        super().__init__(operator, _cuts(operator))
        try:
            self._double = persisting(self._run, self._relieve)
        except (CurvkitError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedModel(f"the model or the loss does not run in float64 ({reason})") from error

    def _run(self) -> Objective:
        """The first part in float64, tried once."""
        double = self._parts.with_batches(self._parts.batches[:1]).converted(dtype=torch.float64)
        with double.measuring():
            double.numbers(0)
        return double

    def _part(self, index: int) -> Objective:
        return self._double.with_batches([cast(self._parts.batches[index], dtype=torch.float64)])


class DoubleHessian(_DoubleOperator):
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

    def __init__(self, operator: Hessian) -> None:
        super().__init__(operator)


class DoubleGGN(_DoubleOperator):
    """The matrix of a `GGN`, multiplied in float64 as `DoubleHessian` multiplies that of a Hessian.

    Args:
        operator: The GGN whose objective, point and plan are taken.

    Raises:
        UnsupportedModel: If the model or the loss does not run in float64.

    Cost: as `DoubleHessian`; matmat takes (1.3 + 1.2 k) gradients in float64.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[0.1, 0.2]])
        >>> G = DoubleGGN(GGN(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))])))
        >>> G.matvec(torch.tensor([1.0, 0.0], dtype=torch.float64)).round(decimals=6).tolist()   # 2 x x'
        [0.02, 0.04]
    """

    def __init__(self, operator: GGN) -> None:
        super().__init__(operator)


class PerturbedHessian(_CopiedOperator):
    """The matrix of a `Hessian` with every weight, buffer and input moved by up to one rounding, at random.

        theta_i (1 + eps u_i),   x_j (1 + eps u_j),   u uniform in [-1, 1]

    What such a change does to a product is what rounding does to it: in a sum of products the error of every term is that of a
    relative change of its factors. So || H~ v - H v || estimates the rounding error of H v, without float64. Held against
    float64 on 17 small networks, scaled well and badly, ResNet-20 and a decoder, the larger of two draws was 0.5 to 30 times
    the error (0.2 times in one case, inputs of size 1e4), at most 3 times on well scaled data.

    Args:
        operator: The Hessian whose objective, point and plan are taken.
        index: Which draw.

    Cost: as `Hessian.matmat`, streamed; a copy of the model.
    Source: the idea of random perturbation for rounding errors is that of CESTAC (Vignes, 1993); here at the inputs of the network only.

    Example:
        >>> import torch.nn.functional as F
        >>> H = Hessian(Objective(torch.nn.Linear(2, 1), F.mse_loss, [(torch.rand(4, 2), torch.zeros(4, 1))]))
        >>> v = torch.ones(3)
        >>> bool((PerturbedHessian(H).matvec(v) - H.matvec(v)).norm() < 1e-5)
        True
    """

    def __init__(self, operator: Hessian, index: int = 0) -> None:
        super().__init__(operator, operator.plan.micro_batches)
        self.dtype, self._index = operator.dtype, index
        first = self._parts.with_batches(self._parts.batches[:1])
        self._copy = first.copied()
        with torch.no_grad():
            for number, tensor in enumerate(_floating(self._copy.model)):
                tensor.copy_(self._moved(tensor, number))

    def _part(self, index: int) -> Objective:
        offset = sum(1 for _ in _floating(self._copy.model))
        numbers = iter(range(offset + 1000 * index, offset + 1000 * (index + 1)))
        batch: Batch = map_tensors(
            lambda tensor: self._moved(tensor, next(numbers)) if tensor.dtype.is_floating_point else tensor,
            self._parts.batches[index],
        )
        return self._copy.with_batches([batch])

    def _moved(self, tensor: Tensor, number: int) -> Tensor:
        draw = seeds.generator(self._index, "rounding", number)
        u = torch.rand(tensor.shape, dtype=self.dtype, generator=draw).mul_(2.0).sub_(1.0).to(tensor.device)
        return tensor * (1.0 + torch.finfo(self.dtype).eps * u)


def _floating(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype.is_floating_point:
            yield tensor


def _cuts(operator: BatchwiseOperator) -> int:
    """Into how many parts each batch is cut, so that a graph in float64 fits beside those that are retained."""
    plan, objective = operator.plan, operator.objective
    if plan.micro_batches > 1:
        return 2 * plan.micro_batches
    held = plan.graph_bytes if plan.residency == "retained" else 0
    room, need = max(plan.budget_bytes - held, plan.budget_bytes // 4), 2 * plan.batch_bytes
    if need <= room or not rows_are_independent(objective, objective.batches, kind=operator.kind):
        return 1
    return math.ceil(need / room)
