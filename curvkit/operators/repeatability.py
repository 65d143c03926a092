"""Is the loss a function? It must give the same value twice, and the value that the user's own call gives."""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from curvkit.errors import UnsupportedModel
from curvkit.losses import KnownLoss
from curvkit.objectives import Objective

REPEATED = 16.0
"""Two evaluations of the same loss may differ by so many eps, relatively; on the CPU they have the same bits."""
AVERAGED = 1e3
"""The same for a mean computed in two ways."""


def refuse_doubtful_loss(matrix: str, objective: Objective) -> None:
    """Evaluate the first batch twice, and once by the user's own mean where the loss is known; call it inside `measuring()`.

    Args:
        matrix: Whose products are wanted, for the message.
        objective: The function.

    Raises:
        UnsupportedModel: If two of the values differ by more than rounding.

    Cost: three forward passes of the first batch.
    """
    loss, eps = objective.loss, torch.finfo(objective.dtype).eps
    value, weight = objective.numbers(0)
    if differ(value, objective.numbers(0)[0], REPEATED * eps):
        refuse_random(matrix, 0)
    if not isinstance(loss, KnownLoss) or (loss.reduction == "mean" and not weight > 0.0):
        return
    expected = value / (weight if loss.reduction == "mean" else 1.0)
    with torch.set_grad_enabled(objective.needs_graph):
        own = loss.own_value(objective.model, objective.batches[0])
    if not differ(expected, own, AVERAGED * eps):
        return
    dtype = objective.outputs(0)[0].dtype
    if dtype.itemsize < objective.dtype.itemsize:
        raise UnsupportedModel(
            f"{matrix}: the model returns {_named(dtype)} though its parameters are {_named(objective.dtype)}, so that {loss.name} is "
            f"rounded to {torch.finfo(dtype).eps:.0e} of itself: its mean is {own:.8g} on the first batch, its terms add up to "
            f"{expected:.8g}. Remove the cast inside the model; where only the outputs are cast, return outputs.float()."
        )
    raise UnsupportedModel(
        f"{matrix}: {loss.name} returns {own:.8g} on the first batch, but its terms add up to {expected:.8g}: this version of torch "
        "averages it in another way than curvkit knows. Return (sum, count) from a curvkit.BatchLoss instead."
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def differ(a: float, b: float, tolerance: float) -> bool:
    """Whether two values of the same loss differ by more than rounding; the check of NaN comes later and names the culprit."""
    return math.isfinite(a + b) and abs(a - b) > tolerance * max(abs(a), abs(b))


def refuse_random(matrix: str, batch: int) -> NoReturn:
    """Say that a batch has two losses.

    Args:
        matrix: Whose products are wanted, for the message.
        batch: Its number.

    Raises:
        UnsupportedModel: Always.
    """
    raise UnsupportedModel(
        f"{matrix}: the loss of batch {batch} differs from one evaluation to the next: the model or the loss is random, or keeps state. "
        "Call model.eval(); if it samples on purpose, draw the sample outside of the loss."
    )
