"""Are the rows of a batch examples of their own? Only then may a batch be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from curvkit import seeds
from curvkit.errors import CurvkitError, ran_out_of_memory
from curvkit.linalg.basis import norm
from curvkit.losses.batches import Batch, map_tensors, rows
from curvkit.objectives import Objective
from curvkit.operators.graph import BatchGraph, GradientGraph

VALUE_ROUNDING = 64.0
"""A sum of losses in two parts may differ by so many eps, relatively."""
FEW = (4, 2)
"""So many rows are compared in their curvature; two where memory does not suffice for four."""


def rows_are_independent(
    objective: Objective, batches: Sequence[Batch], *, kind: type[BatchGraph] = GradientGraph
) -> bool:
    """Whether the loss of each batch is the sum over its halves: what couples rows must not be cut.

    Rows may be steps of time, nodes of a graph, or normalised together. Coupling that does not show in the loss, because a gate is
    still zero, shows in the curvature: on a few rows that is compared, too. A model that cannot be run on half a batch couples rows.
    A batch that does not fit the memory is compared by halves of it that do.

    Args:
        objective: The function.
        batches: Batches of it.
        kind: Of the products that are compared.

    Returns:
        False also where it cannot be known, because the terms of the loss are not, or because memory does not suffice for two rows.
    """
    if not objective.divisible or rows(batches[0]) in (None, 0, 1):
        return False
    eps = torch.finfo(objective.dtype).eps
    try:
        if not all(_adds_up(objective.with_batches([batch]), VALUE_ROUNDING * eps) for batch in batches):
            return False
    except Exception:
        return False  # its own message, if it is no matter of rows, comes when the whole batch is run
    for size in FEW:
        few = objective.with_batches([map_tensors(lambda tensor, size=size: tensor[:size], batches[0])])
        try:
            return _curvature_differs(few, few.cut(2)[0], kind) <= kind.rounding * eps
        except (CurvkitError, RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):  # from the model on so few rows, or for lack of a second derivative
                return False
    return False


def _adds_up(whole: Objective, tolerance: float) -> bool:
    """Whether the total of a batch is that of its halves; of each half apart if the whole does not fit the memory."""
    halves = whole.cut(2)[0]
    try:
        with whole.measuring(), torch.no_grad():
            total = whole.terms(0).total.item()
            parts = math.fsum(halves.terms(index).total.item() for index in range(len(halves.batches)))
        return abs(total - parts) <= tolerance * max(abs(total), abs(parts))
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
    return len(halves.batches) > 1 and all(_adds_up(whole.with_batches([half]), tolerance) for half in halves.batches)


def _curvature_differs(one: Objective, other: Objective, kind: type[BatchGraph]) -> float:
    """Relative difference of two products with the same random vector, sums over the batches."""
    space, size = one.parameters, 0.0
    with one.measuring():
        v = list(space.split(seeds.normal(space.n, 0, "rows", dtype=one.dtype, device=one.device)))
        difference = torch.zeros(space.n, dtype=one.dtype, device=one.device)
        targets = list(space.split(difference))
        for objective, sign in ((one, 1.0), (other, -1.0)):
            for index in range(len(objective.batches)):
                pieces = kind.product([kind.build(objective, index)], v, keep=False)
                for target, piece in zip(targets, pieces, strict=True):
                    if piece is not None:
                        target.add_(piece, alpha=sign)
                del pieces
            size = size or norm(difference)
    return norm(difference) / max(size, 1e-300)
