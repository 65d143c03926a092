"""Parameter-shaped tensors by name as the vectors that they are together, without joining them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.linalg.basis import dot, norm

STORED = 4.0
"""Two ways to the same result may differ by this many eps of the dtype that it is stored in: each result is rounded once, by eps / 2."""
COMPUTED = 64.0
"""And by this many eps of the arithmetic, which is float32 or better."""


def rounding(like: Mapping[str, Tensor]) -> float:
    """How far two ways to the same projection may differ, relative to the length of the update.

    Args:
        like: Tensors of the dtypes in question.

    Returns:
        4 eps of the coarsest dtype, and 64 eps of float32 where there is one as coarse or coarser, else of float64.

    Example:
        >>> rounding({"w": torch.zeros(1, dtype=torch.float64)}) < 1e-13 < rounding({"w": torch.zeros(1)}) < 1e-5
        True
    """
    stored = max((torch.finfo(tensor.dtype).eps for tensor in like.values()), default=0.0)
    return STORED * stored + COMPUTED * min(stored, torch.finfo(torch.float32).eps)


def drawn(like: Mapping[str, Tensor], seed: int, purpose: str, index: int) -> dict[str, Tensor]:
    """Draw independent standard normal numbers in the shapes, dtypes and on the devices of others.

    Args:
        like: By name.
        seed: Of the draw.
        purpose: Of the draw.
        index: Of the draw.

    Returns:
        By name; that of one name does not depend on the others.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in like.items():
        numbers = seeds.normal(tensor.numel(), seed, f"{purpose}/{name}", index, dtype=torch.float64)
        found[name] = numbers.view(tensor.shape).to(tensor.device, tensor.dtype)
    return found


def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """Inner product over all names, in float64.

    Args:
        x: By name.
        y: Of the same names and shapes.

    Returns:
        x'y.

    Example:
        >>> inner({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": -torch.ones(1)})
        1.0
    """
    return math.fsum(dot(x[name].reshape(-1), y[name].reshape(-1)) for name in x)


def length(x: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all names, in float64.

    Args:
        x: By name.

    Returns:
        sqrt(x'x).

    Example:
        >>> length({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        5.0
    """
    return math.hypot(*(norm(tensor) for tensor in x.values()))


def distance(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """Length of the difference, in float64.

    Args:
        x: By name.
        y: Of the same names and shapes.

    Returns:
        ||x - y||.

    Example:
        >>> distance({"a": torch.ones(1)}, {"a": torch.zeros(1)})
        1.0
    """
    return length({name: x[name].double() - y[name].double() for name in x})
