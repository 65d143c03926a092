"""The Hessian of an objective, seen through its products."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from typing import Literal, NoReturn

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.linalg.basis import dot
from curvkit.losses import KnownLoss
from curvkit.objectives import Objective
from curvkit.objectives.surroundings import exact_arithmetic
from curvkit.operators.folding import FoldBatchNorm
from curvkit.operators.graph import GradientGraph, product, refuse_not_finite
from curvkit.operators.plan import Plan, Residency, choose, fitting
from curvkit.operators.point import Point
from curvkit.parameters import ParameterSpace

REPEATED = 16.0
"""Two evaluations of the same loss may differ by so many eps, relatively; on the CPU they have the same bits."""
AVERAGED = 1e3
"""The same for a mean computed in two ways."""
MANY_BATCHES = 1000
"""From here on sums over batches are accumulated in float64."""


class Hessian:
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
        InvalidArgument: If an option is out of range, or the plan is for another dtype, device or number of threads.
        UnsupportedModel: If the objective is random, or the loss differs between two evaluations.
        UnknownObjective: If the loss depends on no parameter.
        CurvkitError: If the loss is not finite.

    Cost: construction about 1.5 gradients of one batch, and 1.3 of all if retained. A product then takes about 2 gradients
        retained, 3.3 streamed. Memory: retained about 2.6 times the activations of a gradient over all data; streamed the same
        for one batch.
    Source: Pearlmutter (1994) for the product; here by double backward, as in Werbos (1988) and every autograd system since.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> H = Hessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))
        >>> H.matvec(torch.tensor([1.0, 0.0])).tolist()   # 2 x x'
        [2.0, 4.0]
    """

    def __init__(
        self,
        objective: Objective,
        *,
        residency: Residency | Literal["auto"] = "auto",
        budget_bytes: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        objective = objective.raised()
        self.objective = objective
        self.space: ParameterSpace = objective.parameters
        self.n, self.dtype, self.device = self.space.n, objective.dtype, objective.device
        refuse_not_finite(objective)
        if plan is None:
            plan = choose(objective, residency=residency, budget_bytes=budget_bytes)
        self.plan: Plan = fitting(plan, objective)
        self._parts, self._owners = objective.cut(self.plan.micro_batches)
        self.products = 0
        """Products computed so far, in passes over the data."""
        self._point = Point(objective.model)
        self._retained: list[GradientGraph] | None = None
        totals, weights, counts, used = [], [], [], [False] * len(self.space.entries)
        with self._measuring():
            self._refuse_doubtful_loss()
            gradient = torch.zeros(self.n, dtype=self._sum_dtype, device=self.device)
            graphs = []
            for graph in self._build():
                totals.append(graph.total)
                weights.append(graph.weight)
                counts.append(graph.count)
                used = [seen or g is not None for seen, g in zip(used, graph.gradient, strict=True)]
                self._add(gradient, [None if g is None else g.detach() for g in graph.gradient])
                if self.plan.residency == "retained":
                    graphs.append(graph)
        if not any(used):
            raise UnknownObjective(
                "Hessian: the loss does not depend on any of the parameters. Check that the loss uses the model that it is given "
                "(not one from an outer scope), and that nothing in it detaches or disables gradients."
            )
        if self.plan.residency == "retained":
            self._retained = graphs
        self._totals = totals
        self.terms = None if None in counts else sum(counts)
        """Number of loss terms in all, or None where the loss does not say."""
        self._denominator = objective.denominator(weights)
        self.loss = math.fsum(totals) / self._denominator
        """L itself."""
        self.gradient = gradient.div_(self._denominator).to(self.dtype)
        """[n], the gradient of L, a by-product."""
        self.unused = tuple(name for name, seen in zip(self.space.names, used, strict=True) if not seen)
        """Parameters that the loss does not depend on; their rows and columns are zero."""

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector.

        Args:
            v: [n], on the operator's device and in its dtype.

        Returns:
            H v, [n].

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.

        Cost: about 2 gradients retained, 3.3 streamed.
        """
        if v.ndim != 1:
            self._refuse(v)
        return self.matmat(v[:, None]).squeeze(1)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors; a streamed graph is built once for all of them.

        Args:
            V: [n, k].

        Returns:
            H V, [n, k].

        Raises:
            InvalidArgument: If `V` does not fit, or the parameters have changed.

        Cost: k products at most; streamed (1.3 + 2 k) gradients.
        """
        self._check(V)
        pieces = [list(self.space.split(v)) for v in V.unbind(1)]
        if self._retained is not None and len(self._retained) < MANY_BATCHES:
            # No forward pass, unless activation checkpointing repeats one: nothing else could be disturbed.
            with exact_arithmetic(self.objective.model), FoldBatchNorm(self.objective.model):
                rows = [self._mean(product(self._retained, v, keep=True)) for v in pieces]
        else:
            with self._measuring():
                rows = [row.div_(self._denominator).to(self.dtype) for row in self._summed(pieces)]
        self.products += V.shape[1]
        if not rows:
            return torch.zeros_like(V)
        return rows[0][:, None] if len(rows) == 1 else torch.stack(rows, dim=1)

    def batch_quotients(self, v: Tensor) -> tuple[list[float], list[float]]:
        """Rayleigh quotients v'H_b v of a unit vector with the Hessian of each batch alone.

        Args:
            v: [n], of unit length.

        Returns:
            v'H_b v for the mean loss of batch b (its total for a loss that is a sum), and the weights with which they average to v'Hv.
            Batches without a term are left out.

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.

        Cost: one product.
        """
        self._check(v[:, None])
        pieces, is_sum = list(self.space.split(v)), self.objective.loss.reduction == "sum"
        sums, weights = [0.0] * len(self.objective.batches), [0.0] * len(self.objective.batches)
        with self._measuring():
            for owner, graph in zip(self._owners, self._graphs(), strict=True):
                row = torch.zeros(self.n, dtype=self.dtype, device=self.device)
                self._add(row, product([graph], pieces, keep=self._retained is not None))
                sums[owner] += dot(row, v)
                weights[owner] += graph.weight
        self.products += 1
        if is_sum:
            return sums, [1.0] * len(sums)
        kept = [index for index, weight in enumerate(weights) if weight > 0.0]
        return [sums[i] / weights[i] for i in kept], [weights[i] for i in kept]

    def refuse_moved(self) -> None:
        """Check that the parameters are still those of the construction.

        Raises:
            InvalidArgument: If one has changed.

        Cost: next to nothing, see `Point`.
        """
        name = self._point.changed()
        if name is not None:
            raise InvalidArgument(
                f"Hessian: the {name} has changed since this operator was made, so that its products would mix two points. "
                "Make a new Hessian(objective) for the new parameters."
            )

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.float64 if len(self._parts.batches) >= MANY_BATCHES else self.dtype

    def _build(self) -> Iterator[GradientGraph]:
        for index, owner in enumerate(self._owners):
            yield GradientGraph.build(self._parts, index, number=owner)

    def _graphs(self) -> Iterator[GradientGraph]:
        """The graphs of all batches, retained or built one after the other."""
        if self._retained is not None:
            yield from self._retained
            return
        for graph, total, owner in zip(self._build(), self._totals, self._owners, strict=True):
            if _differ(graph.total, total, REPEATED * torch.finfo(self.dtype).eps):
                _refuse_random(owner)
            yield graph

    @contextlib.contextmanager
    def _measuring(self) -> Generator[None]:
        with self.objective.measuring(), FoldBatchNorm(self.objective.model):
            yield

    def _summed(self, pieces: list[list[Tensor]]) -> list[Tensor]:
        """Products batch by batch: a streamed graph is used for all vectors and freed."""
        rows = [torch.zeros(self.n, dtype=self._sum_dtype, device=self.device) for _ in pieces]
        for graph in self._graphs():
            for i, (row, v) in enumerate(zip(rows, pieces, strict=True)):
                self._add(row, product([graph], v, keep=self._retained is not None or i + 1 < len(pieces)))
        return rows

    def _add(self, row: Tensor, pieces: list[Tensor | None]) -> None:
        """Add parameter-shaped pieces to a vector, without an intermediate one."""
        for target, piece in zip(self.space.split(row), pieces, strict=True):
            if piece is not None:
                target += piece

    def _mean(self, pieces: list[Tensor | None]) -> Tensor:
        """Flatten and divide in one pass."""
        row = torch.empty(self.n, dtype=self.dtype, device=self.device)
        for target, piece in zip(self.space.split(row), pieces, strict=True):
            if piece is None:
                target.zero_()
            else:
                torch.div(piece, self._denominator, out=target)
        return row

    def _refuse_doubtful_loss(self) -> None:
        """Evaluate the first batch twice, and once by the user's own mean where the loss is known."""
        objective, loss, eps = self.objective, self.objective.loss, torch.finfo(self.dtype).eps
        with torch.no_grad():
            first, second = objective.terms(0), objective.terms(0).total.item()
            if _differ(first.total.item(), second, REPEATED * eps):
                _refuse_random(0)
            if not isinstance(loss, KnownLoss) or (loss.reduction == "mean" and not first.weight > 0.0):
                return
            expected = first.total.item() / (first.weight if loss.reduction == "mean" else 1.0)
            own = loss.own_value(objective.model, objective.batches[0])
        if _differ(expected, own, AVERAGED * eps):
            raise UnsupportedModel(
                f"Hessian: {loss.name} returns {own:.8g} on the first batch, but its terms add up to {expected:.8g}: this version of torch "
                "averages it in another way than curvkit knows. Return (sum, count) from a curvkit.BatchLoss instead."
            )

    def _check(self, V: Tensor) -> None:
        if V.ndim != 2 or V.shape[0] != self.n or V.device != self.device or V.dtype != self.dtype:
            self._refuse(V)
        self.refuse_moved()

    def _refuse(self, V: Tensor) -> NoReturn:
        raise InvalidArgument(
            f"Hessian: a vector of shape {tuple(V.shape)}, {V.dtype} on {V.device} was given; this operator takes [{self.n}], or "
            f"[{self.n}, k] in matmat, {self.dtype} on {self.device}. Convert it with .to(operator.device, operator.dtype)."
        )


def _differ(a: float, b: float, tolerance: float) -> bool:
    """Whether two values of the same loss differ by more than rounding; the check of NaN comes later and names the culprit."""
    return math.isfinite(a + b) and abs(a - b) > tolerance * max(abs(a), abs(b))


def _refuse_random(batch: int) -> NoReturn:
    raise UnsupportedModel(
        f"Hessian: the loss of batch {batch} differs from one evaluation to the next: the model or the loss is random, or keeps state. "
        "Call model.eval(); if it samples on purpose, draw the sample outside of the loss."
    )
