"""What rules for calls share: whose names they ask for, where examples lie, and parameters that act entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from curvkit.errors import UnsupportedModel
from curvkit.estimators.rules.forms import Form, same
from curvkit.estimators.rules.layouts import Layout
from curvkit.estimators.rules.scales import Scale


class Names(Protocol):
    """Which tensors are parameters, and how many examples there are."""

    num_examples: int
    time_first: bool
    """Whether positions are known to come before examples."""

    def name(self, tensor: Any) -> str | None:
        """Name of a parameter that is looked for; None for anything else."""
        ...


Rule = Callable[..., Iterator[Form]]
"""(names, output, *arguments of the call) -> the forms of the parameters in it."""


def layout_of(names: Names, output: Tensor) -> Layout:
    """Where the examples lie in an output whose last dimension counts features.

    Args:
        names: Of the pass.
        output: Of a call.

    Returns:
        The layout.
    """
    return Layout.of(output, names.num_examples, positions=True, time_first=names.time_first)


def offset(names: Names, output: Tensor, bias: Any) -> Iterator[Form]:
    """X + b with the features of b in the last dimension.

    Args:
        names: Of the pass.
        output: Of a call.
        bias: B; anything but a parameter is passed over.

    Yields:
        Its form.
    """
    name = names.name(bias)
    if name is not None:
        yield elementwise(name, layout_of(names, output), None, tuple(bias.shape))


def elementwise(name: str, layout: Layout, x: Tensor | None, shape: tuple[int, ...]) -> Scale:
    """A parameter that is broadcast over examples and positions, and over dimensions in which it has size 1.

    Args:
        name: Of the parameter.
        layout: Of the output.
        x: What it is multiplied with, of the shape of the output; None for an offset.
        shape: Of the parameter.

    Returns:
        Its form.

    Raises:
        UnsupportedModel: If it is not the same for all examples.
    """
    free = {"first": 1, "second": 2, "flattened": 1, "interleaved": 1}[
        layout.place
    ]  # leading dimensions of z that must not be the parameter's
    size = layout.examples_first(torch.empty(layout.shape, device="meta")).shape
    whole = (1,) * (len(size) - len(shape)) + shape
    if len(shape) > len(layout.shape) or any(n != 1 for n in shape[: max(0, len(shape) - len(layout.shape) + free)]):
        raise UnsupportedModel(f"{name} of shape {shape} is not the same for all examples")

    def gathered(y: Tensor) -> Tensor:
        dims = [d for d in range(1, y.ndim) if whole[d] == 1 and y.shape[d] != 1]
        return (y.sum(dims, keepdim=True) if dims else y).reshape(len(y), *shape)

    def spread(v: Tensor) -> Tensor:
        return v.reshape(len(v), *whole[1:]).expand(len(v), *size[1:])

    return Scale(
        name, layout.examples_first, layout.back, None if x is None else layout.examples_first(x), gathered, spread
    )


def by_channel(
    names: Names, output: Tensor, x: Tensor | None, weight: Any, bias: Any, *maps: Callable[[Tensor], Tensor]
) -> Iterator[Form]:
    """One factor and one offset for each index of dimension 1.

    Args:
        names: Of the pass.
        output: Of a call.
        x: What the factor multiplies, after the maps.
        weight: The factor, or None.
        bias: The offset, or None.
        *maps: `Scale.normal` and `Scale.linear`.

    Yields:
        Their forms.
    """
    tail = (1,) * (output.ndim - 2)

    def gathered(y: Tensor) -> Tensor:
        return y.flatten(2).sum(2) if y.ndim > 2 else y

    def spread(v: Tensor) -> Tensor:
        return v.view(*v.shape, *tail).expand_as(output)

    factor, offset = names.name(weight), names.name(bias)
    if factor is not None or offset is not None:
        Layout.of(output, names.num_examples, positions=False)
    if factor is not None:
        yield Scale(factor, same, same, x, gathered, spread, *maps)
    if offset is not None:
        yield Scale(offset, same, same, None, gathered, spread)
