"""Hessian products by differences of gradients, for smooth models that torch cannot differentiate twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor

from curvkit.errors import CurvkitError, UnsupportedModel, ran_out_of_memory
from curvkit.linalg.basis import norm
from curvkit.objectives import Objective
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.graph import BatchGraph, explained, finite_total, made_dense
from curvkit.operators.moving import Moving
from curvkit.operators.plan import Plan
from curvkit.operators.point import Point

STEP = 1e-5
"""Times 1 + ||theta||, for a direction of unit length, in float64: truncation h^4 and rounding eps / h are both near 1e-11."""
DISAGREEMENT = 1e-3
"""Quotients at h and h / 2 may differ by this share of the larger of them; smooth networks show 1e-7 at most."""


NOISE = 1e3 * torch.finfo(torch.float64).eps
"""Rounding of a gradient, relatively: below NOISE ||g|| / h a disagreement says nothing."""


class _Errors:
    """What the extrapolation corrected: in the product at hand, over its batches, and relative to it in the worst one so far."""

    def __init__(self) -> None:
        self.correction = self.worst = 0.0


@dataclass(frozen=True, eq=False)
class DifferenceGraph(BatchGraph):
    """A batch of which only gradients are taken: at its point, and near it for products."""

    matrix: ClassVar[str] = "Hessian"
    rule: ClassVar[str] = "differences of gradients"
    gradients_per_product: ClassVar[tuple[float, float]] = (4.0, 4.0)
    rounding: ClassVar[float] = 1e7

    at: Objective
    """On this batch alone."""
    moving: Moving | None = None
    errors: _Errors | None = None

    @classmethod
    def build(cls, objective: Objective, index: int, *, number: int | None = None) -> Self:
        """Differentiate the loss of a batch once; call it inside `objective.measuring()`.

        Args:
            objective: Model, loss and data.
            index: Which batch.
            number: What messages call it, if it is a part of a batch.

        Returns:
            The gradient and what is needed for others nearby.

        Raises:
            CurvkitError: If the loss is NaN or infinite.

        Cost: one gradient.
        """
        parameters, terms = objective.tensors, objective.terms(index)
        total = finite_total(cls.matrix, objective, index if number is None else number, terms)
        gradient: tuple[Tensor | None, ...] = tuple(None for _ in parameters)
        if terms.total.requires_grad:
            with explained(cls.matrix):
                gradient = tuple(made_dense(torch.autograd.grad(terms.total, parameters, allow_unused=True)))
        at = objective.with_batches([objective.batches[index]])
        return cls(parameters, gradient, total, terms.weight, terms.count, at)

    @classmethod
    def product(cls, graphs: Sequence[Any], pieces: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
        """Multiply the sum of the batches' Hessians with a vector.

            D(h) = (g(theta + h v) - g(theta - h v)) / 2h,    H v = (4 D(h/2) - D(h)) / 3 + O(h^4)

        Args:
            graphs: Of the same parameters.
            pieces: v, parameter-shaped.
            keep: Not used: nothing is held.

        Returns:
            Parameter-shaped pieces of H v.

        Raises:
            UnsupportedModel: If the quotients at h and h / 2 disagree, as they do where a step crosses a kink.

        Cost: four gradients of the batches.
        Source: Richardson's extrapolation of the central difference, with its correction as the estimate of the error.
        """
        space = graphs[0].at.parameters
        v = space.join(pieces)
        size, total = norm(v), torch.zeros_like(v)
        if size == 0.0:
            return list(space.split(total))
        correction, noise = torch.zeros_like(v), 0.0
        for graph in graphs:
            moving = graph.moving or Moving(graph.at)
            h = STEP * moving.scale / size
            noise += NOISE * sum(norm(g.flatten()) for g in graph.gradient if g is not None) / h
            wide, narrow = (moving.quotient(graph.at.batches[0], v, step) for step in (h, h / 2))
            total += narrow
            correction += (narrow - wide) / 3
        if norm(3 * correction) > DISAGREEMENT * norm(total) + noise:
            _refuse_kinks(norm(3 * correction), norm(total))
        total += correction
        if graphs[0].errors is not None:
            graphs[0].errors.correction += norm(correction)
        return list(space.split(total))


class DifferenceHessian(BatchwiseOperator):
    """H = d^2 L / d theta^2 of an `Objective`, by differences of gradients in float64.

        H v = (4 D(h/2) - D(h)) / 3,    D(h) = (g(theta + h v) - g(theta - h v)) / 2h,    h = 1e-5 (1 + ||theta||) / ||v||

    For models whose second derivatives torch does not have or has wrong, if they are smooth: where a step crosses a kink (ReLU,
    max-pool) the quotient is that of another function, the two steps disagree, and the product is refused. Everything is computed on
    a float64 copy; vectors are float64.

    Args:
        objective: The function.
        residency: Only "streamed" or "auto": there are no graphs to keep.
        budget_bytes: As for `Hessian`.
        plan: As for `Hessian`.

    Raises:
        UnsupportedModel: If the model does not run in float64, is random, or has kinks.
        UnknownObjective: If the loss depends on no parameter.
        CurvkitError: If the loss is not finite.

    Cost: four gradients per product, in float64; the memory of a gradient, and two copies of the model.
    Accuracy: `product_error` relative to ||H||, from the extrapolation's correction; smooth networks show 1e-9 and less.
    Source: Pearlmutter (1994), section 2, on the difference and its faults.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
        >>> H = DifferenceHessian(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]))
        >>> H.matvec(torch.tensor([1.0, 0.0], dtype=torch.float64)).round(decimals=6).tolist()   # 2 x x'
        [2.0, 4.0]
    """

    kind = DifferenceGraph

    def __init__(
        self,
        objective: Objective,
        *,
        residency: str = "auto",
        budget_bytes: int | None = None,
        plan: Plan | None = None,
    ) -> None:
        if residency not in ("auto", "streamed"):
            raise UnsupportedModel(
                f"Hessian: residency={residency!r} has no meaning for differences of gradients, which keep no graphs. Use 'auto'."
            )
        try:
            double = objective.converted(dtype=torch.float64)
            _run_once(double)
        except (CurvkitError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedModel(
                f"Hessian: differences of gradients need float64, in which the model or the loss does not run ({reason}). "
                "Remove casts to a fixed dtype, or use rule='reverse'."
            ) from error
        self._moving, self._errors = Moving(double), _Errors()
        super().__init__(double, residency="streamed", budget_bytes=budget_bytes, plan=plan)
        self._point = Point(objective.model)

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors one by one, and note the error of each.

        Args:
            V: [n, k] float64.

        Returns:
            H V, [n, k].

        Raises:
            InvalidArgument: If `V` does not fit, or the parameters have changed.
            UnsupportedModel: If a step crosses a kink.

        Cost: 4 k gradients.
        """
        columns = []
        for v in V.split(1, dim=-1):
            self._errors.correction = 0.0
            columns.append(super().matmat(v))
            size = norm(columns[-1].flatten()) * self._denominator
            if size > 0.0:
                self._errors.worst = max(self._errors.worst, self._errors.correction / size)
        return torch.cat(columns, dim=1) if columns else super().matmat(V)

    @property
    def product_error(self) -> float:
        """Largest correction so far, summed over the batches, relative to its product: an estimate of the error relative to ||H||."""
        return self._errors.worst

    def _build(self) -> Iterator[BatchGraph]:
        for graph in super()._build():
            yield replace(graph, moving=self._moving, errors=self._errors)  # type: ignore[type-var]


def _run_once(objective: Objective) -> None:
    """Evaluate the first batch; a lack of memory is met later, by cutting batches."""
    try:
        with objective.measuring():
            objective.numbers(0)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise


def _refuse_kinks(difference: float, size: float) -> NoReturn:
    raise UnsupportedModel(
        f"Hessian: differences of gradients at two steps disagree by {difference / max(size, 1e-300):.0e}: the model has kinks (ReLU, "
        "max-pool) near the point, or computes something in low precision. Use rule='reverse', which does not step over them."
    )
