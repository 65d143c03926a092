"""Two projections in turn, where that is a projection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.projection.named_vectors import distance, drawn, length, rounding
from curvkit.projection.protocol import Projection

DRAWS = 2
"""Random updates; one that the two orders treat alike though they differ has probability zero, but what differs can be small."""


class Intersection:
    """u -> P(Q(u)), the projection on what both keep, for projections that commute: P Q = Q P.

    Two masks do. A mask and the complement of an eigenspace do not, unless the eigenvectors lie within what the mask keeps or takes out:
    first the one and then the other is then no projection at all, and it is refused. Eigenvectors of
    `Projected(operator, mask)` with eigenvalues other than zero lie within the mask, so their complement commutes with it.

    Args:
        first: Q.
        second: P.
        like: An update, for names, shapes, dtypes and devices; its numbers are not read.
        seed: Of the random updates that the order is tried on.

    Raises:
        InvalidArgument: If P Q and Q P differ on a random update or on one of the eigenvectors that they are made of, by more than
            rounding; or if the update does not fit one of them.

    Cost: of a call both; at construction eight, and four for each eigenvector.
    Accuracy: for complements the test is exact up to rounding, since P Q = Q P on the eigenvectors settles it; for two projections without
        eigenvectors it is by random updates alone.

    Example:
        >>> def first(update):
        ...     return {"w": update["w"] * torch.tensor([1.0, 1.0, 0.0])}
        >>> def second(update):
        ...     return {"w": update["w"] * torch.tensor([0.0, 1.0, 1.0])}
        >>> both = Intersection(first, second, like={"w": torch.zeros(3)})
        >>> both({"w": torch.ones(3)})["w"].tolist()
        [0.0, 1.0, 0.0]
    """

    def __init__(self, first: Projection, second: Projection, *, like: Mapping[str, Tensor], seed: int = 0) -> None:
        self.first, self.second = first, second
        like = {name: u.to(torch.promote_types(u.dtype, torch.float32)) for name, u in like.items()}
        for u in _tried((first, second), like, seed):
            apart, allowed = distance(second(first(u)), first(second(u))), 2 * rounding(like) * length(u)
            if not apart <= allowed:
                raise InvalidArgument(
                    f"Intersection: {type(first).__name__} and {type(second).__name__} do not commute: applied to an update of length "
                    f"{length(u):.3g} the two orders differ by {apart:.3g}, at most {allowed:.3g} is rounding. One after the other is then "
                    "no projection. Use one of them alone, or take the eigenpairs of Projected(operator, mask), whose complement "
                    "commutes with the mask."
                )

    def __call__(self, update: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Project.

        Args:
            update: As both take it.

        Returns:
            What both keep.
        """
        return self.second(self.first(update))


def _tried(projections: tuple[Any, Any], like: Mapping[str, Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    """Random updates, and the eigenvectors that projections are made of, with entries of size one."""
    for index in range(DRAWS):
        yield drawn(like, seed, "intersection", index)
    for projection in projections:
        pairs: Any = getattr(projection, "eigenpairs", None)
        for v in () if pairs is None else pairs.vectors.unbind(1):
            named: dict[str, Tensor] = projection.space.unflatten(v.detach() * math.sqrt(len(v)))
            yield {name: named[name].to(like[name].device, like[name].dtype) for name in like}
