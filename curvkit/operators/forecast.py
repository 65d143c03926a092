"""What a measurement will take, before it is made: bytes and seconds, as far as they can be told from a few rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

from curvkit.linalg.basis import norm
from curvkit.objectives import Objective
from curvkit.operators.graph import BatchGraph, GradientGraph
from curvkit.operators.independence import rows_are_independent
from curvkit.operators.memory import free_memory
from curvkit.operators.plan import Plan, first_rows, relative_size, vector_bytes

CONSTRUCTION = 1.5
"""Gradients that making an operator takes, about."""


@dataclass(frozen=True)
class Forecast:
    """The plan of a measurement with its bytes and its time.

        peak = graphs + one more batch's while a retained product runs + vectors + basis
        seconds = (1.5 + products * gradients per product) * seconds of a gradient

    The bytes of graphs are scaled from those of a few rows, the seconds from one gradient of them, and the number of products
    is what measurements of this kind typically take: all of them are estimates.
    """

    plan: Plan
    products: int
    """Expected."""
    gradients_per_product: float
    gradient_seconds: float
    """Of one gradient over all the data, scaled from a few rows."""
    vector_bytes: int
    """Vectors of one product, of the length of the parameters."""
    basis_rows: int
    """Vectors that a search is expected to hold; the plan has how many it may."""
    basis_bytes: int
    free_bytes: int

    @property
    def graph_bytes(self) -> int:
        """Of the graphs that are held at a time."""
        streamed = self.plan.batch_bytes // self.plan.micro_batches
        return self.plan.graph_bytes if self.plan.residency == "retained" else streamed

    @property
    def peak_bytes(self) -> int:
        """All of it, beside the model and the data."""
        temporary = self.plan.batch_bytes if self.plan.residency == "retained" else 0
        return self.graph_bytes + temporary + self.vector_bytes + self.basis_bytes

    @property
    def seconds(self) -> float:
        """Of the whole measurement."""
        return (CONSTRUCTION + self.products * self.gradients_per_product) * self.gradient_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON.

        Returns:
            The fields and what follows from them.
        """
        derived = {"graph_bytes": self.graph_bytes, "peak_bytes": self.peak_bytes, "seconds": self.seconds}
        return {field.name: getattr(self, field.name) for field in fields(self)} | derived | {"estimated": True}


def forecast(
    objective: Objective, plan: Plan, *, products: int, basis_rows: int, kind: type[BatchGraph] = GradientGraph
) -> Forecast:
    """Say what a measurement by a plan will take.

    Args:
        objective: What the plan was made for.
        plan: Of `choose`.
        products: Expected.
        basis_rows: Vectors of the length of the parameters that a search is expected to hold.
        kind: Of the graphs that products will be taken from.

    Returns:
        The forecast.

    Raises:
        CurvkitError: If memory does not suffice for one row.

    Cost: three gradients of an eighth of the first batch, or of all of it if it cannot be cut, and two forward passes over it.
    Accuracy: bytes of graphs within some ten percent; seconds within a factor of about two, too many where a few rows do not fill
        the processor.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> from curvkit.operators.plan import choose
        >>> data = [(torch.rand(64, 4), torch.randint(3, (64,)))]
        >>> it = Objective(torch.nn.Linear(4, 3), F.cross_entropy, data)
        >>> found = forecast(it, choose(it), products=10, basis_rows=10)
        >>> found.plan.residency, found.basis_bytes, found.vector_bytes   # 15 parameters, 4 bytes each
        ('retained', 600, 180)
    """
    divisible = rows_are_independent(objective, objective.batches[:1], kind=kind)
    probe, _, _ = first_rows(objective, divisible=divisible, kind=kind)
    few = probe.with_batches(probe.batches[:1])
    norm(few.gradient())  # the first one also prepares the libraries
    began = time.perf_counter()
    norm(few.gradient())  # a number on the host: a device has finished then
    seconds = time.perf_counter() - began
    row = objective.parameters.n * objective.dtype.itemsize
    return Forecast(
        plan,
        products=products,
        gradients_per_product=kind.gradients_per_product[plan.residency == "streamed"],
        gradient_seconds=seconds * sum(relative_size(batch, few.batches[0]) for batch in objective.batches),
        vector_bytes=vector_bytes(objective),
        basis_rows=basis_rows,
        basis_bytes=basis_rows * row,
        free_bytes=free_memory(objective.device),
    )
