"""The value of a loss on one batch, as a sum and what to divide it by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvkit.errors import UnknownObjective


@dataclass(frozen=True, eq=False)
class LossTerms:
    """A loss on one batch: the mean over data in several batches is sum(total) / sum(weight)."""

    total: Tensor
    """0-dimensional, differentiable: the sum over the batch's terms."""
    weight: float
    """What the terms of this batch add to the denominator: their number, or the sum of their class weights."""
    count: int | None
    """Number of terms that are not masked out; None if the loss did not say, or said a sum of weights."""
    said: bool = True
    """False: the loss gave a scalar alone, so that it cannot be joined with other batches."""


def scalar_or_pair(value: Any, name: str) -> LossTerms:
    """Read what a user's loss returned.

    Args:
        value: A scalar tensor, or (sum, count).
        name: Of the loss, for messages.

    Returns:
        The terms.

    Raises:
        UnknownObjective: If it is neither, or the count is no number, negative or not finite.
    """
    named = "loss" in getattr(
        value, "_fields", ()
    )  # as torch's adaptive softmax: (output, loss), of which neither is a count
    said = isinstance(value, tuple | list) and len(value) == 2 and not named
    total, count = value if said else (value, 1)
    if not isinstance(total, Tensor) or total.numel() != 1 or not total.dtype.is_floating_point:
        got = (
            f"a tensor of shape {tuple(total.shape)}, {total.dtype}"
            if isinstance(total, Tensor)
            else f"a {type(total).__name__}"
        )
        raise UnknownObjective(
            f"Objective: the loss {name} returned {got}; it must return a scalar, or a pair (sum, count). "
            "Reduce it with .mean() or .sum(); a model's output object has the loss as an attribute, for example output.loss."
        )
    if isinstance(count, Tensor) and count.numel() == 1 and not count.is_complex():
        count = count.item()
    if not isinstance(count, int | float) or not 0.0 <= count < float("inf"):
        got = f"a tensor of shape {tuple(count.shape)}" if isinstance(count, Tensor) else repr(count)
        raise UnknownObjective(
            f"Objective: the loss {name} returned the count {got}; it must be a finite number of loss terms, 0 or more. "
            "Return (sum of the terms, how many there are), or the sum of their weights; without it, return the scalar alone."
        )
    return LossTerms(total.reshape(()), float(count), int(count) if said and float(count).is_integer() else None, said)
