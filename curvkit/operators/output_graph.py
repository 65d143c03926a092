"""Gauss-Newton products of one batch: the graph of the outputs, and that of J'u, whose derivative in u gives J v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import UnknownObjective
from curvkit.linalg.basis import dot, norm
from curvkit.losses import KnownLoss, LossTerms, OutputHessian, hessian_in_outputs
from curvkit.objectives import Objective
from curvkit.operators.graph import BatchGraph, explained, finite_total
from curvkit.parameters import ParameterSpace


@dataclass(frozen=True, eq=False)
class Linearization:
    """The outputs z of a batch as a linear map of the parameters, J = dz / dtheta, and what weighs it."""

    outputs: Tensor
    """z, with its graph."""
    cotangent: Tensor
    """u, of the shape of z."""
    transposed: tuple[Tensor | None, ...]
    """J'u, parameter-shaped, with its graph; None where z does not depend on the parameter."""
    curvature: OutputHessian


@dataclass(frozen=True, eq=False)
class OutputGraph(BatchGraph):
    """The outputs of a batch with the graph that they were computed by, and with that of the transposed product J'u.

    u is the gradient of the loss in the outputs, so that J'u is the gradient of the batch's total; any other u would do, since J'u is
    linear in it.
    """

    matrix: ClassVar[str] = "GGN"
    rule: ClassVar[str] = "double reverse, then reverse"
    gradients_per_product: ClassVar[tuple[float, float]] = (1.2, 2.4)

    linearization: Linearization | None
    """None if the batch's total does not depend on the parameters."""

    @classmethod
    def build(cls, objective: Objective, index: int, *, number: int | None = None) -> Self:
        """Run a batch and linearize its outputs; call it inside `objective.measuring()`.

        Args:
            objective: Model, loss and data.
            index: Which batch.
            number: What messages call it, if it is a part of a batch.

        Returns:
            The graphs.

        Raises:
            CurvkitError: If the loss is NaN or infinite, naming the first bad parameter or the batch.
            UnknownObjective: If the loss does not take outputs and targets, or reaches the parameters past the outputs.
            UnsupportedModel: If torch has no derivative of an operation, or the loss is linear in the outputs.

        Cost: about 1.3 gradients; memory about twice a gradient's.
        """
        parameters = objective.tensors
        outputs, targets = objective.outputs(index)
        z = outputs.detach().requires_grad_()
        terms = objective.terms_of(z, targets)
        total = finite_total(cls.matrix, objective, index if number is None else number, terms)
        refuse_other_ways(objective, terms)
        if not (outputs.requires_grad and terms.total.requires_grad):
            return cls(parameters, tuple(None for _ in parameters), total, terms.weight, terms.count, None)
        with explained(cls.matrix):
            (u,) = torch.autograd.grad(terms.total, z, materialize_grads=True)
            u = u.detach().requires_grad_()
            transposed = _pieces(torch.autograd.grad(outputs, parameters, u, create_graph=True, allow_unused=True))
            curvature = hessian_in_outputs(objective.loss, outputs, targets)
        gradient = tuple(None if piece is None else piece.detach() for piece in transposed)
        linearization = Linearization(outputs, u, transposed, curvature)
        return cls(parameters, gradient, total, terms.weight, terms.count, linearization)

    def roots(self) -> list[Tensor]:
        """The tensors by which the graphs can be reached.

        Returns:
            The outputs and J'u.
        """
        if self.linearization is None:
            return []
        return [self.linearization.outputs, *(piece for piece in self.linearization.transposed if piece is not None)]

    @classmethod
    def product(cls, graphs: Sequence[Self], pieces: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
        """Multiply the sum of the graphs' Gauss-Newton matrices with a vector.

            J v = d/du (J'u . v),    G v = J'(H_out (J v))

        Args:
            graphs: Of the same parameters.
            pieces: v, parameter-shaped.
            keep: Whether the graphs are needed again; if not, their buffers are freed on the way.

        Returns:
            Parameter-shaped pieces of G v; None for zero.

        Raises:
            UnsupportedModel: If torch has no derivative of an operation.

        Cost: about 1.3 gradients of the graphs' batches.
        """
        found, transposed, directions = [], [], []
        for graph in graphs:
            linear = graph.linearization
            if linear is None:
                continue
            used = [(t, v) for t, v in zip(linear.transposed, pieces, strict=True) if t is not None]
            if used:
                found.append(linear)
                transposed += [t for t, _ in used]
                directions += [v for _, v in used]
        if not found:
            return [None] * len(pieces)
        cotangents = [linear.cotangent for linear in found]
        with explained(cls.matrix):
            tangents = torch.autograd.grad(transposed, cotangents, directions, retain_graph=keep)
            outputs = [linear.outputs for linear in found]
            weighed = [linear.curvature.multiply(Jv) for linear, Jv in zip(found, tangents, strict=True)]
            return list(
                torch.autograd.grad(outputs, graphs[0].parameters, weighed, retain_graph=keep, allow_unused=True)
            )

    def asymmetry(self, space: ParameterSpace) -> float:
        """Hold J v, which differentiates a backward pass, against J'w, which is one.

            |w'(J v) - v'(J'w)| / (||w|| ||J v||)    for random v and w

        Args:
            space: Of the parameters.

        Returns:
            Rounding if J v is right; 0 without outputs that depend on the parameters.

        Cost: two gradients of the batch.
        """
        linear = self.linearization
        if linear is None:
            return 0.0
        z = linear.outputs
        v = space.split(seeds.normal(space.n, 0, "tangent", 0, dtype=z.dtype, device=z.device))
        w = seeds.normal(z.numel(), 0, "tangent", 1, dtype=z.dtype, device=z.device).view_as(z)
        used = [
            (t, piece, p) for t, piece, p in zip(linear.transposed, v, self.parameters, strict=True) if t is not None
        ]
        if not used:
            return 0.0
        transposed, directions, parameters = zip(*used, strict=True)
        with explained(self.matrix):
            (Jv,) = torch.autograd.grad(
                transposed, linear.cotangent, directions, retain_graph=True, materialize_grads=True
            )
            Jw = torch.autograd.grad(z, parameters, w, retain_graph=True)
        difference = dot(w.flatten(), Jv.flatten()) - sum(
            dot(g.flatten(), d.flatten()) for g, d in zip(Jw, directions, strict=True)
        )
        size = norm(w.flatten()) * norm(Jv.flatten())
        return abs(difference) / size if size > 0.0 else float(difference != 0.0)


def refuse_other_ways(objective: Objective, terms: LossTerms) -> None:
    """Refuse a loss that holds on to the model, for a penalty on its weights: J would not know of it.

    Args:
        objective: The function.
        terms: Of outputs that were cut off from the model.

    Raises:
        UnknownObjective: Naming the first parameter that the loss depends on past the outputs.
    """
    if isinstance(objective.loss, KnownLoss) or not terms.total.requires_grad:
        return
    direct = _pieces(torch.autograd.grad(terms.total, objective.tensors, retain_graph=True, allow_unused=True))
    for name, piece in zip(objective.parameters.names, direct, strict=True):
        if piece is not None:
            raise UnknownObjective(
                f"GGN: the loss {objective.loss.name} depends on the parameter {name!r} not only through the model's outputs, so that "
                "their Jacobian does not say all. Leave penalties on the weights out of the loss (their curvature can be added to the "
                "products), or use Hessian."
            )


def _pieces(gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """What torch's annotation leaves out: with allow_unused a gradient may be None."""
    return gradients
