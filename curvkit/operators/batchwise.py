"""Products of a curvature matrix that is a weighted mean over batches: what all such operators share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from typing import ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.linalg.basis import dot
from curvkit.objectives import Objective
from curvkit.objectives.arithmetic import ExactArithmetic
from curvkit.operators.folding import FoldBatchNorm
from curvkit.operators.graph import BatchGraph, refuse_not_finite
from curvkit.operators.independence import refuse_coupled
from curvkit.operators.memory import release
from curvkit.operators.plan import Plan, Residency, choose, fitting
from curvkit.operators.point import Point
from curvkit.operators.relief import persisting, relieved
from curvkit.operators.repeatability import REPEATED, differ, refuse_doubtful_loss, refuse_random
from curvkit.parameters import ParameterSpace

MANY_BATCHES = 1000
"""From here on sums over batches are accumulated in float64."""


class BatchwiseOperator:
    """A matrix of an objective that is the weighted mean of the matrices of its batches, by products.

        A v = (1 / W) sum_b A_b v,    W = sum_b weight_b

    A subclass says by `kind` what is kept of a batch and how a product is taken from it. The graphs are retained, or streamed: built
    anew for each product, one batch at a time. The operator belongs to the parameters as they are at its construction; if they
    change, products are refused.

    Where memory runs out, everything is let go and the same product is computed again with less at a time: streamed in place of
    retained, then with batches cut into twice as many parts, if their rows are independent. `plan` and `notes` say so.

    Args:
        objective: The function. A model with half-precision parameters is measured as a float32 copy.
        residency: "retained", "streamed", or "auto" by the memory budget.
        budget_bytes: Memory for graphs; None takes half of what is free.
        plan: An earlier plan, to repeat its products bit for bit; then the two options before have no say.

    Raises:
        InvalidArgument: If an option is out of range, or the plan is for another dtype, device, number of threads or kind of product.
        UnsupportedModel: If the objective is random, or the loss differs between two evaluations.
        UnknownObjective: If the loss depends on no parameter.
        CurvkitError: If the loss is not finite, or memory does not suffice for the smallest parts.
    """

    kind: ClassVar[type[BatchGraph]]
    """What is kept of a batch, and how a product is taken from it."""

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
        refuse_not_finite(self.matrix, objective)
        if plan is None:
            plan = choose(objective, residency=residency, budget_bytes=budget_bytes, kind=self.kind)
        self.plan: Plan = fitting(plan, objective, kind=self.kind)
        """The present one; another than at first if memory ran out."""
        self.notes: tuple[str, ...] = ()
        """What a reader of the results should know: how the plan was changed."""
        self._arithmetic, self._folding = ExactArithmetic(objective.model), FoldBatchNorm(objective.model)
        self._divide()
        self.products = 0
        """Products computed so far, in passes over the data."""
        self._point = Point(objective.model)
        self._retained: list[BatchGraph] | None = None
        gradient, weights, counts, used = persisting(self._first_pass, self._relieve)
        if not any(used):
            raise UnknownObjective(
                f"{self.matrix}: the loss does not depend on any of the parameters. Check that the loss uses the model that it is given "
                "(not one from an outer scope), and that nothing in it detaches or disables gradients."
            )
        known = [count for count in counts if count is not None]
        self.terms = sum(known) if len(known) == len(counts) else None
        """Number of loss terms in all, or None where the loss does not say."""
        self._denominator = objective.denominator(weights)
        self.loss = math.fsum(total for total in self._totals if total is not None) / self._denominator
        """L itself."""
        self.gradient = gradient.div_(self._denominator).to(self.dtype)
        """[n], the gradient of L, a by-product."""
        self.unused = tuple(name for name, seen in zip(self.space.names, used, strict=True) if not seen)
        """Parameters that the loss does not depend on; their rows and columns are zero."""

    def __repr__(self) -> str:
        """Name, order and plan."""
        return f"{type(self).__name__}(n={self.n:,}, {self.plan})"

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector.

        Args:
            v: [n], on the operator's device and in its dtype.

        Returns:
            A v, [n].

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.

        Cost: that of a product, see the class.
        """
        if not isinstance(v, Tensor) or v.ndim != 1 or v.dtype != self.dtype:  # as it was given, not as a column
            self._refuse(v)
        return self.matmat(v[:, None]).squeeze(1)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors; a streamed graph is built once for all of them.

        Args:
            V: [n, k].

        Returns:
            A V, [n, k].

        Raises:
            InvalidArgument: If `V` does not fit, or the parameters have changed.
            CurvkitError: If memory does not suffice for the smallest parts.

        Cost: k products at most.
        """
        self._check(V)
        pieces = [list(self.space.split(v)) for v in V.unbind(1)]
        rows = persisting(lambda: self._multiplied(pieces), self._relieve)
        self.products += V.shape[1]
        if not rows:
            return torch.zeros_like(V)
        return rows[0][:, None] if len(rows) == 1 else torch.stack(rows, dim=1)

    def batch_quotients(self, v: Tensor) -> tuple[list[float], list[float]]:
        """Rayleigh quotients v'A_b v of a unit vector with the matrix of each batch alone.

        Args:
            v: [n], of unit length.

        Returns:
            v'A_b v for the mean loss of batch b (its total for a loss that is a sum), and the weights with which they average to v'Av.
            Batches without a term are left out.

        Raises:
            InvalidArgument: If `v` does not fit, or the parameters have changed.

        Cost: one product.
        """
        self._check(v[:, None])
        pieces, is_sum = list(self.space.split(v)), self.objective.loss.reduction == "sum"
        sums, weights = persisting(lambda: self._quadratic_forms(pieces, v), self._relieve)
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
                f"{self.matrix}: the {name} has changed since this operator was made, so that its products would mix two points. "
                f"Make a new {self.matrix}(objective) for the new parameters."
            )

    @property
    def matrix(self) -> str:
        """The name of the matrix."""
        return self.kind.matrix

    @property
    def _sum_dtype(self) -> torch.dtype:
        return torch.float64 if len(self._parts.batches) >= MANY_BATCHES else self.dtype

    def _divide(self) -> None:
        """Cut the data as the plan says; what each part's loss is remains to be seen."""
        self._parts, self._owners = self.objective.cut(self.plan.micro_batches)
        self._totals: list[float | None] = [None] * len(self._owners)

    def _relieve(self, said: str) -> None:
        """Let all graphs go, and plan for less memory at a time."""
        self._retained = None
        release(self.device)
        parts = self.plan.micro_batches
        self.plan = relieved(self.plan, self.objective, said, kind=self.kind)
        self.notes = (*self.notes, self.plan.reason)
        if self.plan.micro_batches != parts:
            self._divide()

    def _first_pass(self) -> tuple[Tensor, list[float], list[int | None], list[bool]]:
        """Sum of the gradients, weights and counts of all parts, and which parameters are used; graphs are kept if that is the plan."""
        graphs, weights, counts, used = [], [], [], [False] * len(self.space.entries)
        with self._measuring():
            refuse_doubtful_loss(self.matrix, self._parts)
        self._note(refuse_coupled(self.matrix, self.objective))
        with self._measuring():
            gradient = torch.zeros(self.n, dtype=self._sum_dtype, device=self.device)
            for graph in self._graphs():
                weights.append(graph.weight)
                counts.append(graph.count)
                used = [seen or g is not None for seen, g in zip(used, graph.gradient, strict=True)]
                self._add(gradient, [None if g is None else g.detach() for g in graph.gradient])
                if self.plan.residency == "retained":
                    graphs.append(graph)
        if self.plan.residency == "retained":
            self._retained = graphs
        for note in self.objective.silenced_notes:
            self._note(note)
        return gradient, weights, counts, used

    def _note(self, sentence: str | None) -> None:
        if sentence is not None and sentence not in self.notes:
            self.notes = (*self.notes, sentence)

    def _build(self) -> Iterator[BatchGraph]:
        for index, owner in enumerate(self._owners):
            yield self.kind.build(self._parts, index, number=owner)

    def _graphs(self) -> Iterator[BatchGraph]:
        """The graphs of all batches, retained or built one after the other."""
        if self._retained is not None:
            yield from self._retained
            return
        for index, (graph, owner) in enumerate(zip(self._build(), self._owners, strict=True)):
            total = self._totals[index]
            if total is None:
                self._totals[index] = graph.total
            elif differ(graph.total, total, REPEATED * torch.finfo(self.dtype).eps):
                refuse_random(self.matrix, owner)
            yield graph

    @contextlib.contextmanager
    def _measuring(self) -> Generator[None]:
        with self.objective.measuring(), self._folding:
            yield

    def _multiplied(self, pieces: list[list[Tensor]]) -> list[Tensor]:
        """Products with vectors, given parameter-shaped."""
        if self._retained is not None and len(self._retained) < MANY_BATCHES:
            # No forward pass, unless activation checkpointing repeats one: nothing else could be disturbed.
            with self._arithmetic, self._folding:
                return [self._mean(self.kind.product(self._retained, v, keep=True)) for v in pieces]
        with self._measuring():
            return [row.div_(self._denominator).to(self.dtype) for row in self._summed(pieces)]

    def _quadratic_forms(self, pieces: list[Tensor], v: Tensor) -> tuple[list[float], list[float]]:
        """v'(W_b A_b)v and W_b of each batch."""
        sums, weights = [0.0] * len(self.objective.batches), [0.0] * len(self.objective.batches)
        with self._measuring():
            for owner, graph in zip(self._owners, self._graphs(), strict=True):
                row = torch.zeros(self.n, dtype=self.dtype, device=self.device)
                self._add(row, self.kind.product([graph], pieces, keep=self._retained is not None))
                sums[owner] += dot(row, v)
                weights[owner] += graph.weight
        return sums, weights

    def _summed(self, pieces: list[list[Tensor]]) -> list[Tensor]:
        """Products batch by batch: a streamed graph is used for all vectors and freed."""
        rows = [torch.zeros(self.n, dtype=self._sum_dtype, device=self.device) for _ in pieces]
        for graph in self._graphs():
            for i, (row, v) in enumerate(zip(rows, pieces, strict=True)):
                self._add(row, self.kind.product([graph], v, keep=self._retained is not None or i + 1 < len(pieces)))
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

    def _check(self, V: Tensor) -> None:
        if (
            not isinstance(V, Tensor)
            or V.ndim != 2
            or V.shape[0] != self.n
            or V.device != self.device
            or V.dtype != self.dtype
        ):
            self._refuse(V)
        self.refuse_moved()

    def _refuse(self, V: object) -> NoReturn:
        tensor = isinstance(V, Tensor)
        got = f"a vector of shape {tuple(V.shape)}, {V.dtype} on {V.device}" if tensor else f"a {type(V).__name__}"
        raise InvalidArgument(
            f"{self.matrix}: {got} was given; this operator takes [{self.n}], or "
            f"[{self.n}, k] in matmat, {self.dtype} on {self.device}. Convert it with .to(operator.device, operator.dtype)."
        )
