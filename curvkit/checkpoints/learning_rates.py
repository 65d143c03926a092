"""Learning rates that a checkpoint tells of: the present one, that at the start, the highest of the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCHEDULER_KEYS = (
    "scheduler",
    "lr_scheduler",
    "scheduler_state_dict",
    "lr_scheduler_state_dict",
    "lr_schedulers",
    "schedulers",
    "scheduler_state",
    "sched",
)
"""Under which key a training dict holds the state of the schedule of the learning rate."""


@dataclass(frozen=True)
class Rate:
    """A learning rate of every group.

    Args:
        label: "current", the one of the next step; "initial_lr", from which a schedule starts; "peak", the highest of a schedule.
        values: Per group.
        source: In words.
    """

    label: str
    values: tuple[float, ...]
    source: str


def rates(groups: Sequence[Mapping[str, Any]], schedule: Mapping[str, Any] | None) -> tuple[Rate, ...]:
    """Collect the learning rates of an optimizer.

    Args:
        groups: With plain hyperparameters; each has an `lr`.
        schedule: What the checkpoint says of the schedule: the state of a scheduler, or the settings of a script.

    Returns:
        The present one first, then those that are known; a label is there once.

    Example:
        >>> [rate.label for rate in rates([{"lr": 0.1, "initial_lr": 0.2}], {"learning_rate": 0.3})]
        ['current', 'initial_lr', 'peak']
    """
    found = [Rate("current", tuple(float(group["lr"]) for group in groups), "lr of the groups")]
    if any(group.get("lr_scale", 1.0) != 1.0 for group in groups):
        return tuple(found)  # timm multiplies by it, and what is said elsewhere is without it
    schedule = schedule or {}
    initial = _of_groups(groups, "initial_lr")
    if initial is not None:
        found.append(Rate("initial_lr", initial, "initial_lr of the groups"))
    elif (base := _listed(schedule.get("base_lrs"), len(groups))) is not None:
        found.append(Rate("initial_lr", base, "base_lrs of the scheduler's state"))
    peak = _peak(groups, schedule)
    return tuple(found) if peak is None else (*found, peak)


def schedule_entry(places: Iterable[Mapping[Any, Any]], kind: str) -> Mapping[str, Any] | None:
    """What lies beside the optimizer and tells of its schedule.

    Args:
        places: Dicts in which it may lie, the nearest to the weights first.
        kind: What wrote the file; nanoGPT keeps its settings under "config".

    Returns:
        Those of base_lrs, max_lrs and learning_rate that are there; None if none is.

    Example:
        >>> schedule_entry([{"lr_scheduler": {"base_lrs": [0.1], "last_epoch": 3}}], "training dict")
        {'base_lrs': [0.1]}
    """
    found: dict[str, Any] = {}
    for place in places:
        for key in SCHEDULER_KEYS:
            value = place.get(key)
            value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
            if isinstance(value, Mapping):
                found |= {name: value[name] for name in ("base_lrs", "max_lrs") if name in value and name not in found}
        if kind == "nanoGPT checkpoint" and isinstance(place.get("config"), Mapping):
            found |= {"learning_rate": place["config"].get("learning_rate")}
    return found or None


def _peak(groups: Sequence[Mapping[str, Any]], schedule: Mapping[str, Any]) -> Rate | None:
    highest = _of_groups(groups, "max_lr")
    if highest is not None:
        return Rate("peak", highest, "max_lr of OneCycleLR")
    highest = _listed(schedule.get("max_lrs"), len(groups))
    if highest is not None:
        return Rate("peak", highest, "max_lrs of the scheduler's state")
    for key, source in (
        ("learning_rate", "learning_rate of nanoGPT's config"),
        ("logged_learning_rate", "the highest learning_rate in trainer_state.json"),
    ):
        value: Any = schedule.get(key)
        alike = len({group.get("initial_lr", group["lr"]) for group in groups}) == 1
        if alike and _is_rate(value):
            return Rate("peak", (float(value),) * len(groups), source)
    return None


def _of_groups(groups: Sequence[Mapping[str, Any]], key: str) -> tuple[float, ...] | None:
    return _listed([group.get(key) for group in groups], len(groups))


def _listed(values: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(values, list | tuple) or len(values) != count or not all(_is_rate(value) for value in values):
        return None
    return tuple(float(value) for value in values)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
