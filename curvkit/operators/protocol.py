"""What a curvature operator is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from curvkit.parameters import ParameterSpace


@runtime_checkable
class CurvatureOperator(Protocol):
    """A linear, symmetric, repeatable map on the parameters of a model; also a `linalg.LinearMap`."""

    space: ParameterSpace
    n: int
    dtype: torch.dtype
    device: torch.device

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, [n] -> [n]."""
        ...

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply several vectors, [n, k] -> [n, k]; never dearer than k products."""
        ...
