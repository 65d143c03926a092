"""The form in which a parameter enters that was cut into runs of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from curvkit.estimators.rules.forms import Form, Signs


@dataclass(frozen=True, eq=False)
class Rows(Form):
    """A run of rows of a parameter that enters a call of its own, as the projections of attention do that are packed in one matrix."""

    inner: Form
    """Of the rows alone."""
    rows: slice
    shape: tuple[int, ...]
    """Of the whole parameter."""

    @property
    def written(self) -> int:
        """As many as W has."""
        return math.prod(self.shape)

    @property
    def factored(self) -> bool:
        """As of the inner form."""
        return self.inner.factored

    @property
    def factor(self) -> Tensor | None:
        """As of the inner form."""
        return self.inner.factor

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Zero in the other rows; see the base class."""
        found = self.inner.gradients(g, rows)
        whole = found.new_zeros(len(found), *self.shape)
        whole[:, self.rows] = found
        return whole

    def squares(self, g: Tensor) -> Tensor:
        """Zero in the other rows; see the base class."""
        return self._whole(self.inner.squares(g))

    def has_one_position(self, shape: tuple[int, ...]) -> bool:
        """As of the inner form."""
        return self.inner.has_one_position(shape)

    def weighed(self, q: Tensor) -> Tensor:
        """Zero in the other rows; see the base class."""
        return self._whole(self.inner.weighed(q))

    def moved(self, x_dot: Tensor) -> Rows:
        """As of the inner form."""
        return replace(self, inner=self.inner.moved(x_dot))

    def probe(self, signs: Signs) -> Tensor:
        """With the signs of these rows; see the base class."""
        return self.inner.probe(self._cut(signs))

    def pulled(self, signs: Signs, g: Tensor) -> Tensor | None:
        """With the signs of these rows; see the base class."""
        return self.inner.pulled(self._cut(signs), g)

    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """Zero in the other rows; see the base class."""
        return self._whole(self.inner.collected(self._cut(signs), g, g_dot, factor_dot))

    def _cut(self, signs: Signs) -> Signs:
        return Signs(signs.a[:, self.rows], signs.b)

    def _whole(self, found: Tensor) -> Tensor:
        whole = found.new_zeros(self.shape)
        whole[self.rows] = found
        return whole
