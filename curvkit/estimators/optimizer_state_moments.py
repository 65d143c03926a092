"""Which optimizers keep a mean of squared gradients, under which name, and how it is made free of its beginning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from curvkit.checkpoints.documents import brief
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel

INSTEAD = "Use Fisher or SquaredGradient, which need no optimizer"


@dataclass(frozen=True)
class Moment:
    """Where an optimizer keeps it.

    Args:
        key: In the state of a parameter.
        decay: In a group: "betas" (the second of them), "alpha", "rho"; None: it is a sum over all steps.
    """

    key: str
    decay: str | None


_ADAM = Moment("exp_avg_sq", "betas")
MOMENTS = {
    **dict.fromkeys(("Adam", "AdamW", "Adam or AdamW", "NAdam", "RAdam"), _ADAM),
    "RMSprop": Moment("square_avg", "alpha"),
    "Adadelta": Moment("square_avg", "rho"),
    "Adagrad": Moment("sum", None),
}
"""By the class of torch.optim."""
NONE = {
    "SGD": "it keeps no second moment",
    "ASGD": "it keeps no second moment",
    "Adamax": "it keeps a decayed maximum of |g|, which is no mean of squares",
    "Adafactor": "it keeps means over rows and columns, not of each parameter",
    "LBFGS": "it keeps no second moment",
    "Muon": "it keeps no second moment",
    "Rprop": "it uses the signs of gradients only",
    "SparseAdam": "its moments are of the rows that were used, each with a time of its own",
}
COUPLED = ("Adam", "Adam or AdamW", "NAdam", "RAdam", "RMSprop", "Adadelta", "Adagrad")
"""Weight decay is part of the gradient that they square, unless a group says decoupled_weight_decay."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What an optimizer keeps of one parameter.

    Args:
        name: Of the parameter.
        shape: Of the parameter.
        tensors: Its state, by key.
        step: How many steps it took; None where that is not kept.
        group: Hyperparameters.
    """

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Any]
    step: float | None
    group: Mapping[str, Any]


def moment_of(optimizer: str) -> Moment:
    """Find where a class of optimizers keeps its second moment.

    Args:
        optimizer: Its name.

    Returns:
        The key, and what the decay is called.

    Raises:
        UnsupportedModel: If it keeps none, or is not known.

    Example:
        >>> moment_of("RMSprop").key
        'square_avg'
    """
    if optimizer in MOMENTS:
        return MOMENTS[optimizer]
    known = ", ".join(name for name in MOMENTS if " " not in name)
    reason = NONE.get(optimizer, "it is no class of torch.optim whose state is known")
    raise UnsupportedModel(
        f"OptimizerState: the optimizer is {brief(optimizer)}: {reason}. Known are {known}. {INSTEAD}."
    )


def second_moment(kept: Kept, moment: Moment, *, corrected: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mean of squared gradients of one parameter.

        corrected: v_t / (1 - beta^t) for a mean with decay beta that began with 0; (s_t - s_0) / t for a sum

    Args:
        kept: Its state.
        moment: Where it is.
        corrected: Whether the beginning is taken out.
        dtype: Of the result.
        device: Of the result.

    Returns:
        Of the parameter's shape; a copy.

    Raises:
        UnsupportedModel: If it took no step, or its state is a part of what several processes hold.
        CurvkitError: If it has entries that no run leaves.
    """
    value, name = kept.tensors.get(moment.key), brief(kept.name)
    if value is None or not kept.step:
        _refuse(
            f"{name} has no {moment.key}: the optimizer took no step with it",
            "Take a step first, or leave it out by patterns",
        )
    if not isinstance(value, Tensor) or hasattr(value, "full_tensor") or tuple(value.shape) != kept.shape:
        found = f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the type {type(value).__name__}"
        part = "a part of it: the state is sharded" if hasattr(value, "full_tensor") else found
        _refuse(
            f"{moment.key} of {name}, whose shape is {kept.shape}, has {part}, as where several processes share it (FSDP, ZeRO)",
            "Gather the full state and give it as a checkpoint",
        )
    found = value.detach().to(device=device, dtype=dtype, copy=True)
    if not bool(torch.isfinite(found).all()) or bool((found < 0.0).any()):
        raise CurvkitError(
            f"OptimizerState: {moment.key} of {name} has entries that are NaN, infinite or negative: the run had diverged, or the file is "
            "damaged. Use an earlier checkpoint."
        )
    return _corrected(found, kept, moment) if corrected else found


def notes(optimizer: str, groups: Mapping[int, Mapping[str, Any]], moment: Moment) -> list[str]:
    """What a reader of the numbers should know.

    Args:
        optimizer: Its name.
        groups: Those that parameters come from.
        moment: Where it is.

    Returns:
        Sentences without a full stop.
    """
    said = [f"{moment.key} of {optimizer}: a mean over the mini-batches of the run, not over this data"]
    if any(group.get("amsgrad") is True for group in groups.values()):
        said.append("amsgrad: the optimizer divides by the running maximum of this, max_exp_avg_sq")
    if optimizer in COUPLED and any(
        float(group.get("weight_decay") or 0.0) and not group.get("decoupled_weight_decay") for group in groups.values()
    ):
        unless = ", unless the optimizer is AdamW" if optimizer == "Adam or AdamW" else ""
        said.append(f"the gradients that were squared have weight decay in them{unless}")
    return said


def decay_of(group: Mapping[str, Any], moment: Moment) -> float:
    """How much of the mean a step keeps.

    Args:
        group: Hyperparameters.
        moment: One with a decay.

    Returns:
        beta.

    Raises:
        InvalidArgument: If the group does not say it.
    """
    value = group.get(moment.decay or "")
    value = value[1] if isinstance(value, list | tuple) and len(value) == 2 else value
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise InvalidArgument(
            f"OptimizerState: a group of the optimizer has {moment.decay}={value!r}; it must be a number, or two. Mend the group, or pass "
            "bias_correction=False."
        )
    return float(value)


def _corrected(value: Tensor, kept: Kept, moment: Moment) -> Tensor:
    step = float(kept.step or 0.0)
    if moment.decay is None:
        return (value - float(kept.group.get("initial_accumulator_value", 0.0))).clamp(min=0.0) / step
    beta = decay_of(kept.group, moment)
    share = -math.expm1(step * math.log(beta)) if beta > 0.0 else 1.0
    if not 0.0 < share <= 1.0:
        _refuse(
            f"{moment.decay}={beta:g} of {brief(kept.name)} keeps the beginning for ever, so that the mean has no gradient in it",
            "Pass bias_correction=False to see what is kept",
        )
    return value / share


def _refuse(reason: str, remedy: str) -> NoReturn:
    raise UnsupportedModel(f"OptimizerState: {reason}. {remedy}. {INSTEAD}.")
