"""How deep a model a file may ask for: no deeper than the weights that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvkit.errors import UnknownObjective

ALWAYS = 1000
"""Numbers up to this are not looked at: a model of so many layers is built in a second or two."""


def refuse_too_deep(source: str, described: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse a description with more layers than there are tensors, before anything is built from it.

    Modules take time and memory even on the meta device, and every layer has one weight at least; so a short text that asks for 10^9
    layers could keep the machine busy for hours.

    Args:
        source: The file and the part of it, for messages.
        described: Sizes by name; what lies deeper is looked at, too.
        num_tensors: How many weights the file holds.

    Raises:
        UnknownObjective: Naming the first such number.

    Example:
        >>> refuse_too_deep("ckpt.pt: model_args", {"n_layer": 12}, 150)
    """
    waiting: list[Mapping[Any, Any]] = [described]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, Mapping):
                waiting.append(value)
            deep = isinstance(key, str) and ("layer" in key or key == "depth")
            if deep and isinstance(value, int) and value > max(num_tensors, ALWAYS):
                raise UnknownObjective(
                    f"{source} has {key} = {value:,}, but {num_tensors:,} weights are there, and every layer has one at least. "
                    "Take another copy of it."
                )
