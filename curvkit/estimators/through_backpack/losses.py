"""Losses and targets of which BackPACK knows the second derivative; all others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvkit.errors import UnsupportedModel
from curvkit.losses import KnownLoss
from curvkit.losses.batches import inputs_and_targets, rows
from curvkit.objectives import Objective

MODULES: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
"""By the function; all terms are added up, and curvkit divides by what the mean over all data divides by."""
WEIGHTS = ("weight", "pos_weight")
INSTEAD = {
    "DiagHessian": "ExampleHutchinson, or Exact() where the model is small",
    "DiagGGNExact": "Exact('ggn')",
    "DiagGGNMC": "Fisher",
}
"""Estimators that take what BackPACK does not, by extension."""


def loss_module(objective: Objective, extension: str) -> nn.Module:
    """Make the module that BackPACK has a rule for, and refuse losses and data for which its rule would be wrong.

    Args:
        objective: The function.
        extension: Of BackPACK, for messages.

    Returns:
        The loss with reduction="sum".

    Raises:
        UnsupportedModel: Naming the loss, the option, or what is the matter with the targets.
    """
    loss, instead = objective.loss, INSTEAD[extension]
    if not isinstance(loss, KnownLoss) or loss.function not in MODULES or loss.attribute is not None:
        raise UnsupportedModel(
            f"BackPACK({extension!r}): BackPACK has no second derivative of the loss {loss.name}. It knows cross_entropy, mse_loss and "
            f"binary_cross_entropy_with_logits of what the model returns. Use {instead}."
        )
    weighted = [key for key in WEIGHTS if loss.options.get(key) is not None]
    if weighted:
        raise UnsupportedModel(
            f"BackPACK({extension!r}): the loss {loss.name} has {weighted[0]}, for which BackPACK has no second derivative. Use {instead}, "
            "or take the weights out."
        )
    for index, batch in enumerate(objective.batches):
        _refuse_batch(batch, index, loss, extension)
    smoothing = loss.options.get("label_smoothing", 0.0)
    return MODULES[loss.function](reduction="sum", **({"label_smoothing": smoothing} if smoothing else {}))


def refuse_outputs(outputs: Tensor, loss: nn.Module, extension: str) -> None:
    """Refuse shapes of outputs that BackPACK's losses do not take, before it says so in other words.

    Args:
        outputs: Of the model, for a batch.
        loss: As of `loss_module`.
        extension: For the message.

    Raises:
        UnsupportedModel: Naming the shape.
    """
    shape, taken = tuple(outputs.shape), ""
    if isinstance(loss, nn.MSELoss) and outputs.ndim != 2:
        taken = "[N, D]"
    if isinstance(loss, nn.BCEWithLogitsLoss) and (outputs.ndim != 2 or shape[1] != 1):
        taken = "[N, 1]"
    if taken:
        raise UnsupportedModel(
            f"BackPACK({extension!r}): the model gave {shape}, and BackPACK's {type(loss).__name__} takes {taken}. "
            f"Use {INSTEAD[extension]}."
        )


def _refuse_batch(batch: Any, index: int, loss: KnownLoss, extension: str) -> None:
    """Refuse several inputs, and targets that BackPACK's cross-entropy does not look at."""
    instead = INSTEAD[extension]
    inputs, named, targets = inputs_and_targets(batch)
    if named or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        names = ", ".join([*("a tensor" if isinstance(x, Tensor) else type(x).__name__ for x in inputs), *named])
        raise UnsupportedModel(
            f"BackPACK({extension!r}): batch {index} gives the model several inputs ({names}); BackPACK follows one tensor through the "
            f"modules. Use {instead}, or wrap the model in a module that takes one tensor."
        )
    if rows(batch) is None:
        raise UnsupportedModel(
            f"BackPACK({extension!r}): the tensors of batch {index} differ in dimension 0, in which BackPACK takes the examples to lie. "
            f"Put them there, or use {instead}."
        )
    if loss.function is not F.cross_entropy or not isinstance(targets, Tensor):
        return
    if targets.is_floating_point():
        raise UnsupportedModel(
            f"BackPACK({extension!r}): the targets of batch {index} are probabilities, and BackPACK takes them to add up to one without "
            f"looking. Use {instead}."
        )
    ignored = int((targets.long() == loss.options.get("ignore_index", -100)).sum())
    if ignored:
        raise UnsupportedModel(
            f"BackPACK({extension!r}): {ignored} of {targets.numel()} targets of batch {index} are ignored "
            f"({loss.options.get('ignore_index', -100)}), and BackPACK would count them (19 to 23 % wrong on a small net, without a word). "
            f"Use {instead}, or take these examples out."
        )
