"""What an estimator will take, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from curvkit.errors import UnsupportedModel
from curvkit.objectives import Objective
from curvkit.operators.memory import free_memory, megabytes


@dataclass(frozen=True)
class Expected:
    """Work and memory of an estimate, by counting."""

    gradients: float
    """Work in gradients (forward and backward pass) of the same data."""
    copies: float
    """Peak memory in copies of the parameters, beside the model and what passes over the data hold."""
    held_bytes: int = 0
    """Peak memory of those passes: what the graph of one batch saves, and temporaries."""

    def peak_bytes(self, objective: Objective) -> int:
        """Convert to bytes.

        Args:
            objective: Whose parameters are copied.

        Returns:
            Peak memory beside model and data.
        """
        size = sum(p.numel() * p.element_size() for p in objective.tensors)
        return round(self.copies * size) + self.held_bytes


@runtime_checkable
class Foreseeing(Protocol):
    """An estimator that knows its cost."""

    def expected(self, objective: Objective) -> Expected:
        """Count work and memory.

        Args:
            objective: What will be estimated.

        Returns:
            Both; nothing large is computed.
        """
        ...


def refuse_too_large(estimator: str, objective: Objective, expected: Expected, *, instead: str) -> None:
    """Refuse what does not fit the memory that is free.

    Args:
        estimator: For the message.
        objective: What would be estimated.
        expected: What it takes.
        instead: What to use instead, as a sentence without its full stop.

    Raises:
        UnsupportedModel: If the memory that is free is less than what is expected.
    """
    need, free = expected.peak_bytes(objective), free_memory(objective.device)
    if need > free:
        raise UnsupportedModel(
            f"{estimator}: needs about {megabytes(need)} ({expected.copies:g} copies of the parameters and what a pass over the data holds), "
            f"and {megabytes(free)} are free on {objective.device}. {instead}."
        )
