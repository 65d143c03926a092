"""Do the targets of a batch fit what the model gives? Asked before torch is, whose answer names neither."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import torch.nn.functional as F
from torch import Tensor

from curvkit.errors import CurvkitError, UnknownObjective, ran_out_of_memory
from curvkit.losses.known import BY_CLASS, ELEMENTWISE, Options
from curvkit.losses.labels import INDICES, misnumbered
from curvkit.losses.tokens import token_cross_entropy

OF_ONE_DTYPE = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.huber_loss)
"""Losses that torch does not compute, or not differentiate, for targets of another dtype than the outputs have."""

OF_TORCH = (RuntimeError, IndexError, ValueError, TypeError)
"""What torch's losses raise."""


def refuse_misfit(
    name: str, function: Callable[..., Tensor], outputs: Tensor, targets: Tensor, options: Options
) -> None:
    """Refuse outputs and targets that a loss of the table does not take, or would take for something else.

    Args:
        name: Of the loss, for messages.
        function: The loss.
        outputs: Of the model.
        targets: Of the batch.
        options: ignore_index.

    Raises:
        UnknownObjective: If the outputs are no floating-point numbers, an elementwise loss would broadcast one against the other or does
            not take the dtype of the targets, or these are neither classes of the model nor probabilities of them.
    """
    if not outputs.dtype.is_floating_point:
        raise UnknownObjective(
            f"Objective: {name} takes floating-point numbers, but the model gave {described(outputs)}. "
            "Let the model return what it computes before it decides: logits, not classes."
        )
    if function in ELEMENTWISE and outputs.shape != targets.shape:
        raise UnknownObjective(
            f"Objective: {name} compares element by element, but the model gave {tuple(outputs.shape)} and the targets are "
            f"{tuple(targets.shape)}; torch would compare each with each. Give both the same shape, for example targets[:, None] or "
            "outputs.squeeze(-1)."
        )
    if function in OF_ONE_DTYPE and not _go_together(function, outputs, targets):
        kind = "of another dtype" if targets.dtype.is_floating_point else "no floating-point numbers"
        raise UnknownObjective(
            f"Objective: {name}: the model gave {described(outputs)} and the targets are {described(targets)}, {kind}, which torch does "
            f"not take together. Pass targets.to({outputs.dtype})."
        )
    if function in BY_CLASS and outputs.ndim > 0:
        soft = function is F.cross_entropy and targets.dtype.is_floating_point and targets.shape == outputs.shape
        if not soft:
            _refuse_no_classes(name, outputs, targets, options, last=function is token_cross_entropy)


def _go_together(function: Callable[..., Tensor], outputs: Tensor, targets: Tensor) -> bool:
    """Wider targets of binary_cross_entropy_with_logits are right; narrower ones round the loss to their dtype."""
    if outputs.dtype == targets.dtype:
        return True
    wider = targets.dtype.is_floating_point and targets.dtype.itemsize > outputs.dtype.itemsize
    return function is F.binary_cross_entropy_with_logits and wider


def _refuse_no_classes(name: str, outputs: Tensor, targets: Tensor, options: Options, *, last: bool) -> None:
    """Refuse targets that are no indices of classes, one for each distribution."""
    dim = outputs.ndim - 1 if last else min(outputs.ndim - 1, 1)
    shape = (*outputs.shape[:dim], *outputs.shape[dim + 1 :])
    if targets.shape != shape or targets.dtype not in INDICES:
        one_hot = targets.shape == outputs.shape and outputs.ndim > 0
        advice = f"pass indices of classes as int64, {tuple(shape)}"
        if one_hot and not last:
            advice += ", for example targets.argmax(1); probabilities are for cross_entropy, as floating-point numbers"
        elif outputs.ndim == 3 and not last and targets.shape == outputs.shape[:2]:
            advice = "pass logits [N, C, T], or use curvkit.losses.token_cross_entropy, which takes [N, T, C]"
        elif targets.shape == shape:
            advice += ", for example targets.long()"
        elif targets.numel() == outputs.numel() // max(outputs.shape[dim], 1):
            advice += ", for example targets.squeeze(-1)"
        raise UnknownObjective(
            f"Objective: {name} takes one class for each distribution, but the model gave {described(outputs)} and the targets are "
            f"{described(targets)}: {advice}."
        )
    said = misnumbered(targets, outputs.shape[dim], options.get("ignore_index", -100))
    if said is not None:
        raise UnknownObjective(f"Objective: {name}: {said}")


@contextlib.contextmanager
def explained(name: str, outputs: Tensor, targets: Tensor) -> Generator[None]:
    """Say which loss refused what, where torch's own message has a reason alone.

    Args:
        name: Of the loss.
        outputs: Of the model.
        targets: Of the batch.

    Raises:
        UnknownObjective: In place of what torch raises.
        Exception: What is no matter of outputs and targets, as it is: memory, a failing device, errors of curvkit.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OF_TORCH) or isinstance(error, CurvkitError):
            raise
        if ran_out_of_memory(error) or "CUDA error" in str(error):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UnknownObjective(
            f"Objective: {name} does not take what the model gave, {described(outputs)}, with targets of {described(targets)}: {reason}. "
            "Check the options of the loss and the targets, or write curvkit.BatchLoss(fn) with fn(model, batch)."
        ) from error


def described(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, for messages.

    Args:
        tensor: Any.

    Returns:
        Words, for example "(8, 3) torch.float32".
    """
    return f"{tuple(tensor.shape)} {tensor.dtype}"
