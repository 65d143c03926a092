"""What a projection is, and what gives one that can be made anew while a model is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from curvkit.objectives import Objective
from curvkit.projection.flat_rule import FlatRule


@runtime_checkable
class Projection(Protocol):
    """A linear, symmetric map P of updates with P(P(u)) = P(u); `curvkit.testing.check_projection` looks at it."""

    def __call__(self, update: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Project an update, tensors by name.

        Args:
            update: Parameter-shaped; not written to.

        Returns:
            The part that is kept: the same names, shapes, dtypes and devices, in tensors of its own.
        """
        ...


@runtime_checkable
class FlatDirections(Protocol):
    """What makes the projection on the flat directions of a function, anew as the function changes."""

    def directions(
        self, objective: Objective, rule: FlatRule, *, seed: int | None = None, groups: Mapping[str, str] | None = None
    ) -> Projection:
        """Find the flat directions.

        Args:
            objective: The function.
            rule: How many are flat, and among which.
            seed: Of every draw; None draws one.
            groups: The group of each parameter, for `rule.scope="group"` and no other.

        Returns:
            The projection that keeps them.
        """
        ...
