"""Are the numbers in an optimizer's state those that a run of its class could have left?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.optimizer_kinds import Kind, Unusable

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta")
"""What cannot be negative."""
LARGEST = 1e300


def check_hyperparameters(kind: Kind, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse values that the class would not have taken.

    Args:
        kind: The class.
        groups: With plain hyperparameters.

    Raises:
        Unusable: Naming the first such value.
    """
    for index, group in enumerate(groups):
        for name in sorted(kind.hyperparameters):
            if not _allowed(name, group[name]):
                raise Unusable(
                    f"{name} of the optimizer's group {index} is {_shown(group[name])}, which is not possible"
                )
        if group.get("maximize", False) is not False:
            raise Unusable("the optimizer climbs (maximize=True)")


def check_entry(kind: Kind, name: str, entry: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Refuse the state of one parameter that no run could have left.

    Args:
        kind: The class.
        name: Of the parameter, for the reason.
        entry: Its state, with tensors and numbers.
        group: Its hyperparameters.

    Raises:
        Unusable: If a moment is NaN, infinite or negative, the step is no count, or something is missing.

    Cost: one pass over its tensors.
    """
    for key in sorted(kind.numbers):
        value = entry[key]
        if not _is_number(value) or (key == "step" and not value >= 1):
            raise Unusable(f"{key} of {brief(name)} is {_shown(value)} in the optimizer's state: no step was taken")
    if group.get("amsgrad") is True and "max_exp_avg_sq" not in entry:
        raise Unusable(f"max_exp_avg_sq of {brief(name)} is missing in the optimizer's state, though amsgrad=True")
    for key in sorted(kind.tensors | kind.optional):
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point or value.dtype.itemsize == 1:
            raise Unusable(
                f"{key} of {brief(name)} is a {_type(value)} in the optimizer's state, not a tensor of floats"
            )
        if value.numel() and not bool(torch.isfinite(value).all()):
            raise Unusable(f"{key} of {brief(name)} has NaN or infinite entries: the run had diverged")
        if key in SECOND_MOMENTS and value.numel() and bool((value < 0).any()):
            raise Unusable(f"{key} of {brief(name)} has negative entries, which a mean of squares cannot have")


def untouched(kind: Kind, entry: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether a parameter never had a gradient: its step is 0, and its tensors are as they begin (Adagrad makes them at once).

    Args:
        kind: The class.
        entry: Its state, with tensors and numbers.
        group: Its hyperparameters.

    Returns:
        False if a step was taken, or the state contradicts itself.

    Example:
        >>> from curvkit.checkpoints.optimizer_kinds import KINDS
        >>> untouched(KINDS[1], {"step": 0, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}, {})
        True
    """
    if "step" not in kind.numbers or not _is_number(entry["step"]) or entry["step"] != 0:
        return False
    first = group.get("initial_accumulator_value", 0.0)
    held = [entry[key] for key in sorted(kind.tensors | kind.optional) if key in entry]
    return all(isinstance(value, Tensor) and bool((value == value.new_tensor(first)).all()) for value in held)


def _allowed(name: str, value: Any) -> bool:
    if name in ("nesterov", "amsgrad", "centered", "decoupled_weight_decay"):
        return isinstance(value, bool)
    if name == "betas":
        return isinstance(value, tuple) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)
    if not _is_number(value):
        return False
    if name in ("momentum", "alpha", "rho"):
        return 0 <= value <= 1
    return name == "dampening" or value >= 0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST  # NaN is not; an integer may be too large for a float


def _shown(value: Any) -> str:
    """A number for people; of what is none, the kind."""
    if isinstance(value, tuple) and len(value) <= 4 and all(isinstance(item, int | float) for item in value):
        return f"({', '.join(map(brief, value))})"
    plain = value is None or isinstance(value, int | float | str)
    return brief(value) if plain else f"a {_type(value)}"


def _type(value: Any) -> str:
    return f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
