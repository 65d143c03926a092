"""What the state of an optimizer says of it: its class as far as that shows, its hyperparameters, its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from curvkit.checkpoints.printable import printable

Scalar = Callable[[Any], float | int | None]


@dataclass(frozen=True)
class OptimizerSummary:
    """An optimizer as a checkpoint has it.

    Args:
        name: Its class, or what it may be: "AdamW", "Adam or AdamW"; None if its groups are of no optimizer of torch.
        groups: How many groups of parameters.
        lr: Distinct learning rates of the groups, in order.
        betas: Of the first group that has them.
        momentum: Of the first group that has it.
        nesterov: Of that group.
        weight_decay: Distinct values of the groups, in order.
        step: Of its own count, where it keeps one.
    """

    name: str | None
    groups: int
    lr: tuple[float, ...] = ()
    betas: tuple[float, ...] | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: tuple[float, ...] = ()
    step: int | None = None


def optimizer_summary(state: Mapping[str, Any] | None, name: str | None, scalar: Scalar) -> OptimizerSummary | None:
    """Summarise the state of an optimizer.

    Args:
        state: As of `Optimizer.state_dict()`, of an outline.
        name: Its class, if the checkpoint says it.
        scalar: Reads a number that may have been saved as a tensor; None if it cannot.

    Returns:
        The summary; None if there is no state.

    Example:
        >>> found = optimizer_summary({"param_groups": [{"lr": 0.1, "momentum": 0.9, "nesterov": False}]}, None, lambda x: x)
        >>> found.name, found.lr, found.momentum
        ('SGD', (0.1,), 0.9)
    """
    groups = state.get("param_groups") if state is not None else None
    if state is None or not isinstance(groups, list):
        return None
    groups = [group for group in groups if isinstance(group, Mapping)]
    betas = next((group["betas"] for group in groups if isinstance(group.get("betas"), list | tuple)), None)
    momentum = next((group for group in groups if "momentum" in group), {})
    return OptimizerSummary(
        optimizer_class(state, name),
        len(groups),
        _distinct(groups, "lr", scalar),
        _numbers(betas, scalar) if betas is not None else None,
        _number(scalar(momentum.get("momentum"))),
        momentum["nesterov"] if isinstance(momentum.get("nesterov"), bool) else None,
        _distinct(groups, "weight_decay", scalar),
        _step(state, scalar),
    )


def optimizer_class(state: Mapping[str, Any] | None, name: str | None) -> str | None:
    """The class of an optimizer, as far as its state shows it.

    Args:
        state: As of `Optimizer.state_dict()`.
        name: What the checkpoint says itself.

    Returns:
        What is said, else the class of torch.optim whose groups have such names: "AdamW", or "Adam or AdamW" where the two cannot be told
        apart; None if it is none of them.

    Example:
        >>> optimizer_class({"param_groups": [{"betas": (0.9, 0.99), "amsgrad": False, "decoupled_weight_decay": True}]}, None)
        'AdamW'
    """
    if name:
        return printable(name, 100)
    groups = state.get("param_groups") if state is not None else None
    group = next((group for group in groups if isinstance(group, Mapping)), {}) if isinstance(groups, list) else {}
    has = set(group)
    if {"betas", "amsgrad"} <= has:
        if "decoupled_weight_decay" in has:
            return "AdamW" if group["decoupled_weight_decay"] is True else "Adam"
        return "Adam or AdamW"
    signatures = (
        ("SGD", {"momentum", "dampening", "nesterov"}),
        ("RMSprop", {"alpha", "centered"}),
        ("Adagrad", {"lr_decay", "initial_accumulator_value"}),
        ("Adadelta", {"rho", "eps"}),
        ("LBFGS", {"history_size", "max_iter"}),
        ("Rprop", {"etas", "step_sizes"}),
        ("NAdam", {"betas", "momentum_decay"}),
        ("Muon", {"ns_steps"}),
    )
    known = next((name for name, needed in signatures if needed <= has), None)
    return known or ("SGD" if {"momentum", "nesterov"} <= has else None)


def _distinct(groups: list[Any], key: str, scalar: Scalar) -> tuple[float, ...]:
    values = (_number(scalar(group.get(key))) for group in groups)
    return tuple(dict.fromkeys(value for value in values if value is not None))


def _numbers(values: Any, scalar: Scalar) -> tuple[float, ...]:
    found = (_number(scalar(value)) for value in values[:4])
    return tuple(value for value in found if value is not None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _step(state: Mapping[str, Any], scalar: Scalar) -> int | None:
    """The first count that the state of a parameter has."""
    entries = state.get("state")
    if not isinstance(entries, Mapping):
        return None
    for entry in list(entries.values())[:1]:
        value = scalar(entry.get("step")) if isinstance(entry, Mapping) else None
        if value is not None and value == value and 0 <= value < 1 << 62:
            return int(value)
    return None
