"""What lies beside the weights of a training dict: the optimizer's state, and the step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

OPTIMIZER_KEYS = (
    "optimizer",
    "optimizer_state_dict",
    "optim",
    "opt",
    "optimizer_state",
    "optimizer_states",
    "optimizers",
)
STEP_KEYS = ("step", "global_step", "iter_num", "num_iters", "iteration", "iter")
"""An epoch is no step: it has as many of them as there are batches."""


def is_optimizer_state(value: Any) -> bool:
    """Whether something is what `Optimizer.state_dict()` returns.

    Args:
        value: Part of a content.

    Returns:
        True for a dict with groups of parameters.

    Example:
        >>> is_optimizer_state({"state": {}, "param_groups": []}), is_optimizer_state({})
        (True, False)
    """
    return isinstance(value, Mapping) and "param_groups" in value


def optimizer_entry(places: Iterable[Mapping[Any, Any]], notes: list[str]) -> Mapping[str, Any] | None:
    """The state of the one optimizer that there is.

    Args:
        places: Dicts in which it may lie, the nearest to the weights first.
        notes: What a reader should know is added.

    Returns:
        The state; None if there is none, or if there are several, of which nothing says which one belongs to the weights.

    Example:
        >>> notes = []
        >>> optimizer_entry([{"optimizer": {"param_groups": []}, "optimizer_1": {"param_groups": []}}], notes), notes
        (None, ['the states of 2 optimizers are there (optimizer, optimizer_1); none was taken'])
    """
    for place in places:
        for name in OPTIMIZER_KEYS:
            value = place.get(name)
            if isinstance(value, list | tuple) and len(value) > 1:
                notes.append(f"{name} holds the states of {len(value)} optimizers; none was taken")
                return None
            value = value[0] if isinstance(value, list | tuple) and value else value
            if not isinstance(value, Mapping) or not is_optimizer_state(value):
                continue
            others = [key for key in place if _is_numbered(key, name) and is_optimizer_state(place[key])]
            if others:  # accelerate numbers them
                listed = ", ".join([name, *others][:4])
                notes.append(f"the states of {1 + len(others)} optimizers are there ({listed}); none was taken")
                return None
            return value
    return None


def step_entry(places: Iterable[Mapping[Any, Any]], tensor: type[Any]) -> Any:
    """The training step.

    Args:
        places: Dicts in which it may lie, the nearest to the weights first.
        tensor: What a tensor is.

    Returns:
        A whole number >= 0, or a tensor that holds one; None if there is none.

    Example:
        >>> step_entry([{"epoch": 3}, {"global_step": 400}], int)
        400
    """
    for place in places:
        for name in STEP_KEYS:
            value = place.get(name)
            if (type(value) is int and value >= 0) or (isinstance(value, tensor) and _is_whole(value)):
                return value
    return None


def _is_numbered(key: Any, name: str) -> bool:
    return isinstance(key, str) and re.fullmatch(rf"{name}_\d{{1,9}}", key) is not None


def _is_whole(value: Any) -> bool:
    return tuple(value.shape) == () and str(value.dtype).removeprefix("torch.") in ("int64", "int32")
