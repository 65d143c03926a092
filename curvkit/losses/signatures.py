"""Can a loss be called with outputs and targets? Some of torch's take more, and need a `BatchLoss`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from curvkit.errors import InvalidArgument

EXAMPLES = {
    "ctc_loss": (
        "x, y, n, m = batch; losses = ctc_loss(model(x), y, n, m, reduction='none'); return (losses / m).sum(), len(m)",
        " torch has no second derivative of it, so that it is measured by differences of gradients (rule='difference', --rule difference).",
    ),
    "gaussian_nll_loss": (
        "x, y = batch; mean, var = model(x); return gaussian_nll_loss(mean, y, var, reduction='sum'), y.numel()",
        "",
    ),
    "cosine_embedding_loss": (
        "a, b, y = batch; return cosine_embedding_loss(model(a), model(b), y, reduction='sum'), len(y)",
        "",
    ),
    "margin_ranking_loss": (
        "a, b, y = batch; return margin_ranking_loss(model(a), model(b), y, reduction='sum'), y.numel()",
        "",
    ),
    "triplet_margin_loss": (
        "a, p, n = map(model, batch); return triplet_margin_loss(a, p, n, reduction='sum'), len(a)",
        "",
    ),
}
"""Function of torch.nn.functional -> what stands in fn(model, batch), and what else is to be known."""
MODULES = {
    nn.CTCLoss: "ctc_loss",
    nn.GaussianNLLLoss: "gaussian_nll_loss",
    nn.CosineEmbeddingLoss: "cosine_embedding_loss",
    nn.MarginRankingLoss: "margin_ranking_loss",
    nn.TripletMarginLoss: "triplet_margin_loss",
}


def refuse_other_arguments(loss: Callable[..., Any], name: str) -> None:
    """Refuse a loss that cannot be called with outputs and targets, before anything is run.

    Args:
        loss: A function or a module.
        name: For messages.

    Raises:
        InvalidArgument: If it takes more or fewer arguments, with what to write instead.
    """
    taken = arguments_unless(loss, 2)
    if taken is None:
        return
    function = MODULES.get(type(loss), name)  # type: ignore[arg-type]
    lines, more = EXAMPLES.get(function, ("call the model and the loss, and return a scalar, or (sum, count)", ""))
    raise InvalidArgument(
        f"Objective: the loss {name} takes {taken}, but a loss is called with (outputs, targets). "
        f"Write curvkit.BatchLoss(fn), with def fn(model, batch): {lines}.{more}"
    )


def arguments_unless(function: Callable[..., Any], count: int) -> str | None:
    """The arguments of what cannot be called with so many.

    Args:
        function: A function, a partial, or a module, of which `forward` is looked at.
        count: Positional arguments.

    Returns:
        Its signature, for messages; None if it can be called so, or if that cannot be known.

    Example:
        >>> arguments_unless(lambda a, b, c: None, 2), arguments_unless(lambda a, b, c=1: None, 2)
        ('(a, b, c)', None)
    """
    called: Any = function
    if isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__:
        called = function.forward
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # written in C, or compiled
        return None
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return f"({', '.join(signature.parameters)})"
    return None
