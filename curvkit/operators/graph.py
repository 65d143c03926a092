"""The graph of one batch that products are taken from; for the Hessian that of the gradient, differentiated once more."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from curvkit.errors import CurvkitError, UnsupportedModel
from curvkit.losses import LossTerms
from curvkit.objectives import Objective


@dataclass(frozen=True, eq=False)
class BatchGraph(ABC):
    """What is kept of a batch to multiply its curvature matrix with vectors, and its part of loss and gradient."""

    matrix: ClassVar[str]
    """The name of the matrix."""
    rule: ClassVar[str]
    """How its products are differentiated."""
    gradients_per_product: ClassVar[tuple[float, float]]
    """What a product costs, about, in gradients over the same data: retained, and streamed."""
    rounding: ClassVar[float] = 1e4
    """A product of the sum of two parts may differ by so many eps, relatively: it may be much smaller than the norm of the matrix."""

    parameters: tuple[Tensor, ...]
    gradient: tuple[Tensor | None, ...]
    """Of the batch's total, one per parameter; None where the loss does not depend on it."""
    total: float
    weight: float
    count: int | None

    @classmethod
    @abstractmethod
    def build(cls, objective: Objective, index: int, *, number: int | None = None) -> Self:
        """Run a batch and keep its graph; call it inside `objective.measuring()`."""

    def roots(self) -> list[Tensor]:
        """The tensors by which the graph can be reached.

        Returns:
            Those pieces of the gradient that have one.
        """
        return [piece for piece in self.gradient if piece is not None and piece.requires_grad]

    @classmethod
    @abstractmethod
    def product(cls, graphs: Sequence[Any], pieces: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
        """Multiply the sum of the matrices of graphs of this class with a vector, parameter-shaped; None for zero."""


@dataclass(frozen=True, eq=False)
class GradientGraph(BatchGraph):
    """The gradient of a batch's total, with the graph that it was computed by."""

    matrix: ClassVar[str] = "Hessian"
    rule: ClassVar[str] = "reverse over reverse"
    gradients_per_product: ClassVar[tuple[float, float]] = (2.0, 3.3)

    @classmethod
    def build(cls, objective: Objective, index: int, *, number: int | None = None) -> Self:
        """Differentiate the loss of a batch once, keeping the graph; call it inside `objective.measuring()`.

        Args:
            objective: Model, loss and data.
            index: Which batch.
            number: What messages call it, if it is a part of a batch.

        Returns:
            The graph.

        Raises:
            CurvkitError: If the loss is NaN or infinite, naming the first bad parameter or the batch.
            UnsupportedModel: If torch has no derivative of an operation.

        Cost: about 1.3 gradients; memory about 2.6 times a gradient's.
        """
        parameters = objective.tensors
        terms = cls.evaluated(objective, index)
        total = finite_total(cls.matrix, objective, index if number is None else number, terms)
        if not terms.total.requires_grad:
            return cls(parameters, tuple(None for _ in parameters), total, terms.weight, terms.count)
        with explained(cls.matrix):
            gradient = torch.autograd.grad(terms.total, parameters, create_graph=True, allow_unused=True)
        return cls(parameters, gradient, total, terms.weight, terms.count)

    @classmethod
    def evaluated(cls, objective: Objective, index: int) -> LossTerms:
        """Run model and loss on a batch.

        Args:
            objective: Model, loss and data.
            index: Which batch.

        Returns:
            The terms of the loss.
        """
        return objective.terms(index)

    @classmethod
    def product(cls, graphs: Sequence[Self], pieces: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
        """Multiply the sum of the graphs' Hessians with a vector.

            H v = d/dtheta (g(theta) . v)

        Args:
            graphs: Of the same parameters.
            pieces: v, parameter-shaped.
            keep: Whether the graphs are needed again; if not, their buffers are freed on the way.

        Returns:
            Parameter-shaped pieces of H v; None for zero.

        Raises:
            UnsupportedModel: If torch has no second derivative of an operation.

        Cost: about two gradients of the graphs' batches.
        """
        outputs, directions = [], []
        for graph in graphs:
            for g, v in zip(graph.gradient, pieces, strict=True):
                if g is not None and g.requires_grad:  # else the loss is linear in this parameter
                    outputs.append(g)
                    directions.append(v)
        if not outputs:
            return [None] * len(pieces)
        parameters = graphs[0].parameters
        with explained(cls.matrix):
            return made_dense(
                torch.autograd.grad(outputs, parameters, directions, retain_graph=keep, allow_unused=True)
            )


def made_dense(pieces: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients as strided tensors: some look-ups make sparse ones, of which most operations know nothing.

    Args:
        pieces: Gradients; None for zero.

    Returns:
        The same, sparse ones copied.
    """
    return [piece.to_dense() if piece is not None and piece.is_sparse else piece for piece in pieces]


def refuse_not_finite(matrix: str, objective: Objective) -> None:
    """Refuse parameters of the space that are NaN or infinite, also where the loss does not show it.

    Args:
        matrix: Whose products are wanted, for the message.
        objective: Its parameters are looked through.

    Raises:
        CurvkitError: Naming the first one.
    """
    for name, tensor in zip(objective.parameters.names, objective.tensors, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise CurvkitError(
                f"{matrix}: the parameter {name!r} has NaN or infinite entries: the checkpoint is of a diverged run. Take an earlier one."
            )


def finite_total(matrix: str, objective: Objective, index: int, terms: LossTerms) -> float:
    """The total of a batch as a number.

    Args:
        matrix: Whose products are wanted, for the message.
        objective: Its model and data may be at fault.
        index: What the message calls the batch.
        terms: Of the batch.

    Returns:
        The total.

    Raises:
        CurvkitError: If it is NaN or infinite, naming the first bad parameter or the batch.
    """
    total = terms.total.item()
    if not torch.isfinite(terms.total):
        raise CurvkitError(_not_finite(matrix, objective, index, total))
    return total


@contextlib.contextmanager
def explained(matrix: str) -> Generator[None]:
    """Say which operation has no derivative, and what can be done.

    Args:
        matrix: Whose products are wanted, for the message.

    Raises:
        UnsupportedModel: In place of torch's error that a derivative is not implemented.
        RuntimeError: Torch's others, as they are.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        refuse_reentrant(matrix, error)
        found = re.search(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented", str(error))
        if found is None:
            raise
        operation = found[1].removesuffix("_backward").strip("_")
        raise UnsupportedModel(
            f"{matrix}: torch {torch.__version__} has no second derivative of {operation}, which the model or the loss uses. "
            "Replace that operation by one that has, leave the parameters before it out by patterns, or measure by "
            "differences of gradients (rule='difference') if the model is smooth."
        ) from error


def refuse_reentrant(matrix: str, error: Exception) -> None:
    """Say what to do about activation checkpointing of the old kind, which serves `.backward()` alone.

    Args:
        matrix: Whose products are wanted, for the message.
        error: What torch raised.

    Raises:
        UnsupportedModel: If it is that.
    """
    if "use_reentrant" in str(error):
        raise UnsupportedModel(
            f"{matrix}: the model uses activation checkpointing with use_reentrant=True, of which torch takes no torch.autograd.grad, "
            "neither for products nor for differences of gradients. Call checkpoint(..., use_reentrant=False); for transformers, "
            "gradient_checkpointing_disable()."
        ) from error


def _not_finite(matrix: str, objective: Objective, index: int, value: float) -> str:
    named = [("parameter", *pair) for pair in objective.model.named_parameters()]
    for kind, name, tensor in [*named, *(("buffer", *pair) for pair in objective.model.named_buffers())]:
        if not bool(torch.isfinite(tensor).all() if kind == "parameter" else not torch.isnan(tensor).any()):
            return (
                f"{matrix}: the loss of batch {index} is {value}, and the {kind} {name!r} has NaN or infinite entries: the "
                "checkpoint is of a diverged run. Take an earlier one."
            )
    return (
        f"{matrix}: the loss of batch {index} is {value} though all parameters are finite. "
        "Check this batch for NaN or infinite values, or compute in float64."
    )
