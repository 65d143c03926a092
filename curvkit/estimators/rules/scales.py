"""The form in which factors and offsets enter, entry by entry: norms, biases, positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from curvkit.estimators.rules.forms import Form, Map, Signs, same, seen


@dataclass(frozen=True, eq=False)
class Scale(Form):
    """z = w * normal(x) entry by entry, w the same at all positions; without x, z = ... + w. `outgoing` gives [N, ...]."""

    x: Tensor | None
    """[N, ...], in the graph; None for an offset."""
    gathered: Map
    """Sums over positions, [N, ...] -> [N, *shape]."""
    spread: Map
    """Its transpose, [N, *shape] -> [N, ...] up to broadcasting."""
    normal: Map = same
    """Entry by entry from x to what w multiplies: (x - mean) / sqrt(variance) with fixed statistics."""
    linear: Map = same
    """Its linear part."""

    @property
    def written(self) -> int:
        """At most as many as z has for an example."""
        return 1 if self.x is None else math.prod(self.x.shape[1:])

    @property
    def factor(self) -> Tensor | None:
        """X."""
        return self.x

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Write out sum_p g_np * x_np of some examples; see the base class."""
        y = self.outgoing(g)
        return self.gathered(y if self.x is None else y * self.normal(self.x.detach()))[rows]

    def has_one_position(self, shape: tuple[int, ...]) -> bool:
        """Whether nothing is summed over; see the base class."""
        y = seen(self, shape)
        return self.gathered(y).numel() == y.numel()

    def weighed(self, q: Tensor) -> Tensor:
        """sum_n q_n x_n^2; see the base class."""
        y = self.outgoing(q)
        return self.gathered(y if self.x is None else y * self.normal(self.x.detach()).square()).sum(0)

    def moved(self, x_dot: Tensor) -> Scale:
        """With a derivative of x in its place; see the base class."""
        return replace(self, x=x_dot, normal=self.linear)

    def probe(self, signs: Signs) -> Tensor:
        """v_n * x_np; see the base class."""
        v = self.spread(signs.a)
        return self.incoming(v if self.x is None else v * self.normal(self.x))

    def pulled(self, signs: Signs, g: Tensor) -> Tensor | None:
        """v_n * g_np; see the base class."""
        return None if self.x is None else self.linear(self.spread(signs.a) * self.outgoing(g))

    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """sum_n v_n * sum_p (g'_np * x_np + g_np * x'_np); see the base class."""
        total = self.outgoing(g_dot) if self.x is None else self.outgoing(g_dot) * self.normal(self.x.detach())
        if factor_dot is not None:
            total = total + self.outgoing(g) * self.linear(factor_dot)
        return (signs.a * self.gathered(total)).sum(0)
