"""The diagonal of a matrix by its products with all unit vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.errors import CurvkitError, ran_out_of_memory
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.memory import free_memory, release
from curvkit.operators.plan import Plan

SHARE = 8
"""Of the free memory that the vectors of a chunk may take, one part in so many."""
MOST = 256
"""Vectors of a chunk; a streamed graph is built once for each chunk, which is then little."""


@dataclass(frozen=True, eq=False)
class UnitState:
    """How far it is."""

    done: int
    """Products."""
    diagonal: Tensor
    """[n], zero from `done` on."""


def steps(A: BatchwiseOperator) -> Iterator[UnitState]:
    """Read the diagonal off the products with unit vectors, chunk by chunk.

        d_j = e_j' (A e_j)

    A retained graph is multiplied with one vector after the other; a streamed one with as many at once as memory allows, half as many
    once it ran out.

    Args:
        A: Symmetric, of order n.

    Yields:
        The state after each chunk.

    Raises:
        CurvkitError: If memory does not suffice for one product.
        RuntimeError: What the model raises.
        MemoryError: Never: it is one.

    Cost: n products; memory of two vectors for each product of a chunk.
    """
    diagonal, done, size = (
        torch.zeros(A.n, dtype=A.dtype, device=A.device),
        0,
        chunk_size(A.n, A.dtype, A.device, A.plan),
    )
    while done < A.n:
        plan, count = A.plan, min(size, A.n - done)
        try:
            found = _entries(A, done, count)
        except (CurvkitError, RuntimeError, MemoryError) as error:
            if count == 1 or not (ran_out_of_memory(error) or A.plan != plan):
                raise
            found = None
        if found is not None:
            diagonal[done : done + count] = found
            done += count
            yield UnitState(done, diagonal.clone() if done < A.n else diagonal)
        if found is None or A.plan != plan:  # outside of the handler, whose frames hold the vectors
            release(A.device)
            size = max(1, count // 2)


def chunk_size(n: int, dtype: torch.dtype, device: torch.device, plan: Plan) -> int:
    """Choose how many vectors are multiplied at once.

    Args:
        n: Order of the matrix.
        dtype: Of the vectors.
        device: Of the vectors.
        plan: Of the operator.

    Returns:
        1 for retained graphs.
    """
    if plan.residency == "retained":
        return 1
    fitting = free_memory(device) // SHARE // max(2 * n * dtype.itemsize, 1)
    return max(1, min(fitting, MOST, n))


def _entries(A: BatchwiseOperator, begin: int, count: int) -> Tensor:
    """[count] entries of the diagonal from `begin` on."""
    own = torch.arange(count, device=A.device)
    E = torch.zeros(A.n, count, dtype=A.dtype, device=A.device)
    E[begin + own, own] = 1.0
    return A.matmat(E)[begin + own, own]
