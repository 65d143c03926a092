"""The parts of what `Optimizer.state_dict()` returns: groups, states of parameters, and the names that some of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.optimizer_kinds import Unusable
from curvkit.checkpoints.optimizer_order import Order, Shapes, by_names

LONGEST = 16
"""Numbers that a hyperparameter may have."""


class Held:
    """The parts of what `Optimizer.state_dict()` returns, checked to be such.

    Args:
        raw: What a checkpoint has in its place.

    Raises:
        Unusable: If it is something else, or of one process among several.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        listed, states = raw.get("param_groups"), raw.get("state", {})
        if not isinstance(listed, list) or not listed or not all(isinstance(group, Mapping) for group in listed):
            raise Unusable("the optimizer's state has no groups of parameters")
        if not isinstance(states, Mapping):
            raise Unusable("the optimizer's state is not one of torch")
        sharded = ("base_optimizer_state", "zero_stage", "single_partition_of_fp32_groups")
        if any(key in raw for key in sharded):
            raise Unusable("the optimizer's state is that of one process among several (DeepSpeed)")
        self.keys = [_keys(group.get("params")) for group in listed]
        """Of the states of parameters, per group: positions, or names."""
        flat = [key for group in self.keys for key in group]
        if len(set(flat)) < len(flat):
            raise Unusable("a parameter stands twice in the optimizer's groups")
        if set(states) - set(flat):
            raise Unusable("the optimizer has states of parameters that none of its groups has")
        if any("flat_param" in str(key) for key in flat):
            raise Unusable("the optimizer's state is flat and that of one process among several (FSDP)")
        self.groups = tuple(_plain(group) for group in listed)
        self.entries = {key: entry for key, entry in states.items() if isinstance(entry, Mapping) and entry}
        self.entries = {
            key: {str(k): v for k, v in entry.items() if v is not None} for key, entry in self.entries.items()
        }
        self.entries = {key: entry for key, entry in self.entries.items() if entry}
        self.names = [group.get("param_names") for group in listed]

    def named(self, checkpoint: Checkpoint, own: Shapes) -> Order | None:
        """The order by names.

        Args:
            checkpoint: Which may have stored them.
            own: Names and shapes of the model's parameters.

        Returns:
            The order; None if there are no names.

        Raises:
            Unusable: If they are not those of the model, or not as many as there are parameters.
        """
        flat = [key for group in self.keys for key in group]
        tied = _tied(checkpoint.tied, own)
        if flat and all(isinstance(key, str) for key in flat):
            return by_names(
                [[str(key) for key in group] for group in self.keys], own, tied, "names in the optimizer's state"
            )
        sources = (
            (checkpoint.optimizer_names, "names stored by curvkit.save"),
            (self.names, "param_names of the optimizer"),
        )
        for names, source in sources:
            if names is not None and all(isinstance(group, list | tuple) for group in names):
                if [len(group) for group in names] != [len(group) for group in self.keys]:
                    raise Unusable(f"the {source} are not as many as its parameters")
                return by_names([[str(name) for name in group] for group in names], own, tied, source)
        return None

    def shapes(self) -> list[list[tuple[int, ...] | None]]:
        """Of the state of each parameter.

        Returns:
            Per group; None where a state has no tensor.
        """
        return [[self._shape(key) for key in group] for group in self.keys]

    def _shape(self, key: Any) -> tuple[int, ...] | None:
        tensors = [
            value for name, value in self.entries.get(key, {}).items() if isinstance(value, Tensor) and name != "step"
        ]
        shaped = [tensor for tensor in tensors if tensor.ndim] or tensors
        return tuple(shaped[0].shape) if shaped else None


def _tied(groups: Sequence[Sequence[str]], own: Shapes) -> dict[str, str]:
    """Names in the file, of tensors that are the same as one that the model has under another name."""
    found: dict[str, str] = {}
    for names in groups:
        known = next((name for name in names if name in own), None)
        if known is not None:
            found |= {name: known for name in names if name not in own}
    return found


def _keys(params: Any) -> list[Any]:
    if not isinstance(params, list | tuple) or not all(type(key) in (int, str) for key in params):
        raise Unusable("the optimizer's groups do not say which parameters they have")
    return list(params)


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as numbers, tuples and truth values."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if not isinstance(key, str) or key in ("params", "param_names"):
            continue
        if isinstance(value, list | tuple):
            value = tuple(plain_number(item) for item in value[:LONGEST])
        found[key] = plain_number(value)
    return found


def plain_number(value: Any) -> Any:
    """A tensor of one number as that number.

    Args:
        value: Of a state.

    Returns:
        The number; anything else as it is.

    Example:
        >>> import torch
        >>> plain_number(torch.tensor(0.5)), plain_number("x")
        (0.5, 'x')
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    return value
