"""The form in which a table enters whose rows are looked up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.estimators.rules.forms import Form, Signs


@dataclass(frozen=True, eq=False)
class Lookup(Form):
    """z_np = row i_np of a table. `outgoing` gives [N, P, d]."""

    index: Tensor
    """[N, P]"""
    shape: tuple[int, int]
    padding: int | None = None
    """Row that gets no gradient."""

    @property
    def written(self) -> int:
        """As many as W has."""
        return math.prod(self.shape)

    @property
    def factored(self) -> bool:
        """Yes: a matrix."""
        return True

    @property
    def factor(self) -> None:
        """Indices depend on no parameter."""
        return None

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Write out sums over the positions of each row of the table; see the base class."""
        y, index = self._counted(self.outgoing(g))[rows], self.index[rows]
        made = y.new_zeros(len(y), *self.shape)
        return made.scatter_add_(1, index[..., None].expand_as(y), y)

    def squares(self, g: Tensor) -> Tensor:
        """Add up squares, for the rows that occur alone."""
        y = self._counted(self.outgoing(g))
        own = torch.arange(len(y), device=y.device)[:, None] * self.shape[0] + self.index  # [N, P] (example, row)
        pairs, position = own.flatten().unique(return_inverse=True)
        sums = y.new_zeros(len(pairs), y.shape[-1]).index_add_(0, position, y.flatten(0, 1))
        return y.new_zeros(self.shape).index_add_(0, pairs % self.shape[0], sums.square_())

    def has_one_position(self, shape: tuple[int, ...]) -> bool:
        """Whether an example looks up one row; see the base class."""
        return self.index.shape[1] == 1

    def weighed(self, q: Tensor) -> Tensor:
        """Q, row by row; see the base class."""
        y = self._counted(self.outgoing(q))
        return y.new_zeros(self.shape).index_add_(0, self.index.flatten(), y.flatten(0, 1))

    def probe(self, signs: Signs) -> Tensor:
        """a_n[i_np] b_n; see the base class."""
        return self.incoming(self._counted(self._drawn(signs)))

    def pulled(self, signs: Signs, g: Tensor) -> None:
        """Indices have no gradient."""
        return None

    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """sum_np a_n[i_np] b_n * g'_np, row by row; see the base class."""
        y = self._counted(self._drawn(signs) * self.outgoing(g_dot))
        return y.new_zeros(self.shape).index_add_(0, self.index.flatten(), y.flatten(0, 1))

    def _drawn(self, signs: Signs) -> Tensor:
        """Signs of the rows that are looked up, [N, P, d]."""
        if signs.b is None:
            raise TypeError("signs of a table have two factors")
        return signs.a.gather(1, self.index)[..., None] * signs.b[:, None]

    def _counted(self, y: Tensor) -> Tensor:
        return y if self.padding is None else y * (self.index != self.padding)[..., None]
