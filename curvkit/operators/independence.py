"""Are the rows of a batch examples of their own? Only then may a batch be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import CurvkitError, UnsupportedModel, ran_out_of_memory
from curvkit.linalg.basis import norm
from curvkit.losses.batches import Batch, map_tensors, rows, take_rows
from curvkit.objectives import Objective
from curvkit.operators.graph import BatchGraph, GradientGraph

VALUE_ROUNDING = 64.0
"""A sum of losses in two parts may differ by so many eps, relatively."""
FEW = (4, 2)
"""So many rows are compared in their curvature; two where memory does not suffice for four."""
COUPLED = 1e-2
"""Gradients of rows together and apart that differ by this share of their size are no matter of rounding, also with casts to bfloat16
inside the model (0.004); normalisation over the batch makes 0.1 to 1."""
NOTICED = 1e-4
"""From this share on it is said; rounding in float32 makes 1e-7 to 1e-5."""


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


def refuse_coupled(matrix: str, objective: Objective) -> str | None:
    """Refuse data in several batches whose rows are not examples of their own, so that the loss depends on how the data was cut.

    Batch normalisation by hand, or by a function that no module shows, couples the rows of a batch: the mean over all batches is
    then another function for each way to cut. Four rows of the largest batch are held against two and two of them. Rows whose order
    matters, as steps of time or nodes of a graph do, are parts of one example: batches of such are taken as they are, and a note says so.

    Args:
        matrix: Whose products are wanted, for the message.
        objective: The function.

    Returns:
        A sentence for the notes if the rows of the only batch are coupled, their order matters, or they are coupled weakly; None if
        they are not, or if it cannot be known: fewer than three rows, or a model that does not run on a part of them.

    Raises:
        UnsupportedModel: If they are coupled and there are several batches.
        Exception: What the loss raises, if it does not raise it again.

    Cost: three gradients of four rows, a fourth where rows are coupled.
    """
    sizes = [rows(batch) or 0 for batch in objective.batches]
    number = sizes.index(max(sizes))
    count = min(sizes[number], FEW[0])
    if count < 3:
        return None
    one = objective.with_batches([objective.batches[number]])
    try:
        coupling = _coupling(one, count)
    except Exception as error:  # not on so few rows, or for lack of memory: then the whole batch says why
        try:
            coupling = _coupling(one, count)
        except Exception:
            return None
        raise error  # it did not come again, and is no matter of rows
    batches = len(objective.batches)
    if coupling.share <= NOTICED:
        return None
    if coupling.ordered:
        return (
            "the rows of a batch belong together and in their order, as steps of time or nodes of a graph do: the result is that of these "
            "batches, and would be another one for the same data cut otherwise"
        )
    if coupling.share <= COUPLED:
        return (
            f"rows together have another gradient than the same rows apart, by {coupling.share:.1g} of it: a small penalty on each "
            "batch, a weak coupling, or rounding inside the model. The result shifts by about so much if the data is cut otherwise"
        )
    if batches > 1:
        raise UnsupportedModel(
            f"{matrix}: the rows of a batch are coupled: {count} rows together have another gradient than the same rows in two parts, as "
            "where a model normalises over its batch (batch_norm with training=True, mean(0)), the loss compares rows, or a penalty "
            f"is added once per batch. The result would depend on how the data is cut into {batches} batches. Normalise by fixed "
            "statistics, or pass all data as one batch, to which the result then belongs."
        )
    return (
        "the loss of the batch is not that of its rows one by one, as with normalisation over the batch, a loss that compares rows or a "
        "penalty: the result belongs to this very batch, and would be another one for the same data cut otherwise"
    )


@dataclass(frozen=True)
class _Coupling:
    """How far the rows of a batch are no examples of their own."""

    share: float
    """Difference of the gradient of a few rows from that of two parts of them, relative to the sizes of both."""
    ordered: bool = False
    """The gradient is another one in another order of the rows."""


def _coupling(one: Objective, count: int) -> _Coupling:
    """The gradient of a batch's first rows against that of two parts of them, and against the same in another order."""
    half = count // 2
    with one.measuring():
        whole, *parts = (_gradient(one, span) for span in (range(count), range(half), range(half, count)))
        share = _difference(whole, parts)
        if share > NOTICED and not one.terms(0).said:  # a loss that returns a mean
            mean = [half / count * parts[0], (count - half) / count * parts[1]]
            share = min(share, _difference(whole, mean))
        if share <= NOTICED:
            return _Coupling(share)
        turned = _difference(whole, [_gradient(one, [*range(1, count), 0])])
        return _Coupling(share, turned > min(COUPLED, share / 10))


def _gradient(one: Objective, index: Sequence[int]) -> Tensor:
    """Of the sum over the terms of some rows of a batch, or of what a loss returns that gives a scalar alone."""
    part = one.with_batches([take_rows(one.batches[0], torch.tensor(list(index)))])
    gradient = part.parameters.join(torch.autograd.grad(part.terms(0).total, part.tensors, materialize_grads=True))
    if not bool(torch.isfinite(gradient).all()):
        raise CurvkitError("the gradient of so few rows is not finite")
    return gradient


def _difference(whole: Tensor, parts: Sequence[Tensor]) -> float:
    """Of a gradient from the sum of others, by the size of the parts: they may cancel."""
    size = norm(whole) + sum(norm(part) for part in parts)
    return norm(whole - sum(parts, torch.zeros_like(whole))) / max(size, 1e-300)


def _adds_up(whole: Objective, tolerance: float) -> bool:
    """Whether the total of a batch is that of its halves; of each half apart if the whole does not fit the memory."""
    halves = whole.cut(2)[0]
    try:
        with whole.measuring():
            total = whole.numbers(0)[0]
            parts = math.fsum(halves.numbers(index)[0] for index in range(len(halves.batches)))
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
