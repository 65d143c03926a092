"""The forms in which a loss can be given, seen as one of two kinds."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from curvkit.errors import InvalidArgument
from curvkit.losses.known import recognise
from curvkit.losses.known_loss import KnownLoss
from curvkit.losses.other_loss import BatchLoss, OtherLoss
from curvkit.losses.protocol import Loss
from curvkit.losses.signatures import refuse_other_arguments


def as_loss(loss: Any) -> Loss:
    """See what the user gave through the one form that the rest of curvkit uses.

    Args:
        loss: A function or module (outputs, targets) -> scalar or (sum, count), or a `BatchLoss`.

    Returns:
        The loss.

    Raises:
        InvalidArgument: If it is not callable, is a class, takes other arguments, or is one of torch's losses with a reduction that gives
            no scalar.
    """
    if isinstance(loss, KnownLoss | OtherLoss):
        return loss
    if isinstance(loss, BatchLoss):
        return OtherLoss(loss.fn, _name(loss.fn), whole=True)
    if isinstance(loss, type):
        raise InvalidArgument(
            f"Objective: loss={loss.__name__} is a class, not a loss. Make one of it: loss={loss.__name__}()."
        )
    known = recognise(loss)
    if known is not None:
        function, options = known
        legacy = [key for key in ("size_average", "reduce") if options.get(key) is not None]
        reduction = options.get("reduction", "mean")
        means = ("mean", "batchmean") if function is F.kl_div else ("mean",)
        if legacy or reduction not in (*means, "sum"):
            got = f"{legacy[0]}={options[legacy[0]]!r}" if legacy else f"reduction={reduction!r}"
            raise InvalidArgument(
                f"Objective: the loss {getattr(function, '__name__', function)} has {got}; curvature needs a scalar. "
                "Use reduction='mean' or reduction='sum'."
            )
        return KnownLoss(function, options)
    if not callable(loss):
        raise InvalidArgument(
            f"Objective: loss={loss!r} is not callable. Pass a function (outputs, targets), a loss module, or "
            "curvkit.BatchLoss(fn) with fn(model, batch)."
        )
    refuse_other_arguments(loss, _name(loss))
    return OtherLoss(loss, _name(loss), module=loss if isinstance(loss, nn.Module) else None)


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(loss).__name__
