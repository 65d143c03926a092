"""What an estimator will take, said before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from curvkit.errors import CurvkitError, UnsupportedModel, ran_out_of_memory
from curvkit.losses.batches import map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators.graph import BatchGraph, GradientGraph
from curvkit.operators.memory import free_memory, megabytes, release
from curvkit.operators.plan import relative_size, saved_bytes

PROBE_SHARE = 16
"""What a pass holds is counted on one row in so many of the first batch, where it can be cut."""


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
        size = sum(p.numel() * max(p.element_size(), 4) for p in objective.tensors)  # half precision is raised
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


def held_bytes(objective: Objective, *, second: bool, kind: type[BatchGraph] = GradientGraph) -> int:
    """Count what a pass over the largest batch keeps alive, parameters and data not counted.

    Args:
        objective: What will be differentiated.
        second: True for the graph that products need, of loss and gradient; False for that of an ordinary forward pass.
        kind: Of the graph that products need.

    Returns:
        Bytes of distinct storages, counted on a few rows of the first batch and scaled to the largest; on the whole batch where the model
        does not run on a part of it.

    Raises:
        CurvkitError: If memory runs out with one row, or with a batch that cannot be cut.

    Cost: a forward pass over a sixteenth of the first batch; if `second` a backward pass, too.

    Example:
        >>> import torch.nn.functional as F, torch
        >>> data = [(torch.ones(64, 3), torch.ones(64, 1))]
        >>> held_bytes(Objective(torch.nn.Linear(3, 1), F.mse_loss, data), second=False)   # outputs, float32
        256
    """
    first = objective.batches[0]
    size = rows(first) if objective.divisible else None
    few = math.ceil(size / PROBE_SHARE) if size else 0
    while True:
        part = map_tensors(lambda tensor, few=few: tensor[:few], first) if few else first
        try:
            held = saved_bytes(objective.with_batches([part]), gradient=second, kind=kind)
            return math.ceil(held * max(relative_size(batch, part) for batch in objective.batches))
        except Exception as error:  # whatever the model does with few rows
            exhausted, said = ran_out_of_memory(error), str(error).strip().partition("\n")[0][:200]
            if not exhausted and not few:
                raise
        release(objective.device)  # outside of the handler, whose frames hold the graph
        if exhausted and few <= 1:
            what = "one row" if few else "the first batch, which cannot be cut,"
            raise CurvkitError(
                f"Expected: out of memory with the graph of {what} ({said}). Give the data in smaller batches or with shorter rows, leave "
                "parameters out by patterns, use float32, or a device with more memory."
            )
        few = few // 2 if exhausted else 0


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
            f"{estimator}: needs about {megabytes(need)} ({expected.copies:g} copies of the parameters and what a pass over the data "
            f"holds), and {megabytes(free)} are free on {objective.device}. {instead}."
        )
