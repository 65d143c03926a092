"""How many vectors of the length of the parameters a search may hold."""

from __future__ import annotations

from curvkit.errors import InvalidArgument
from curvkit.objectives import Objective
from curvkit.operators.memory import free_memory
from curvkit.operators.plan import VECTORS, vector_bytes

VECTORS_FRACTION = 0.25
"""Share of the free memory that the vectors of a search may take by default."""


def rows_that_fit(objective: Objective, memory_bytes: int | None, most: int | None) -> int:
    """Count the vectors of length n that a search may hold.

    Args:
        objective: In the precision that is computed in.
        memory_bytes: For graphs and vectors, half each; None takes a quarter of the memory that is free.
        most: At most so many; None for no such limit.

    Returns:
        The number of vectors.
    """
    budget = memory_bytes // 2 if memory_bytes is not None else int(VECTORS_FRACTION * free_memory(objective.device))
    rows = budget // (objective.parameters.n * objective.dtype.itemsize)
    return rows if most is None else min(rows, most)


def refuse_small_memory(measure: str, objective: Objective, memory_bytes: int | None) -> None:
    """Refuse a memory budget whose half does not hold the vectors of one product, before anything is run.

    Args:
        measure: Name of what is measured, for the message.
        objective: The function.
        memory_bytes: For graphs and vectors, half each; None is never too small.

    Raises:
        InvalidArgument: With the bytes that are needed.
    """
    needed = 2 * vector_bytes(objective)
    if memory_bytes is not None and memory_bytes < needed:
        raise InvalidArgument(
            f"{measure}: memory_bytes={memory_bytes} is too little: half of it is for vectors, and one product alone holds {VECTORS} of "
            f"{objective.parameters.n:,} parameters, so that {needed:,} bytes are the least, graphs apart. Raise the budget, or leave "
            "parameters out by patterns."
        )
