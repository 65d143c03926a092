"""A mask and eigenvectors that are made by hand, for tests of what works with any projection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from oracles import normal
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.parameters import Entry, ParameterSpace
from curvkit.results.eigenpairs import Eigenpairs


class HandMask:
    """Keeps the coordinates where a flat vector of booleans is true."""

    def __init__(self, space: ParameterSpace, keep: Tensor) -> None:
        self.keep, self.shapes = space.unflatten(keep), {entry.name: entry.shape for entry in space.entries}

    def __call__(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if {name: tuple(u.shape) for name, u in update.items()} != self.shapes:
            raise InvalidArgument("HandMask: the update has other names or shapes.")
        return {name: torch.where(self.keep[name], u, 0.0) for name, u in update.items()}


def space_of(**shapes: tuple[int, ...]) -> ParameterSpace:
    entries, offset = [], 0
    for name, shape in shapes.items():
        entries.append(Entry(name, shape, offset))
        offset += entries[-1].numel
    return ParameterSpace(tuple(entries))


def pairs_of(
    V: Tensor, space: ParameterSpace | None, *, good: int | None = None, asked: int | None = None
) -> Eigenpairs:
    """Eigenpairs with these vectors and descending values, the first `good` of them converged."""
    k = V.shape[1]
    return Eigenpairs(
        values=torch.arange(k, 0, -1).double(),
        residuals=torch.zeros(k).double(),
        converged=torch.arange(k) < (k if good is None else good),
        vectors=V,
        recomputed=True,
        which="magnitude",
        tolerance=1e-3,
        scale=float(k),
        asymmetry=0.0,
        rounding=0.0,
        products=0,
        asked=k if asked is None else asked,
        space=space,
    )


def orthonormal(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(n, k, seed=seed)).Q
