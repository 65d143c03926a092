"""The form in which a matrix enters: dense layers, and convolutions as sums over patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvkit.estimators.rules.forms import CACHE_BYTES, Form, Map, Signs, seen, summed_in_chunks


@dataclass(frozen=True, eq=False)
class Matrix(Form):
    """z_np = W_c x_np for each of C groups of features: dense layers, and convolutions as sums over patches."""

    x: Tensor
    features: Map
    """Linear, from x to [N, P, C, k]; `outgoing` gives [N, P, C, o]."""
    shape: tuple[int, ...]
    """Of the parameter."""
    groups: int = 1
    """C."""
    transposed: bool = False
    """The matrix is stored as [k, o]."""

    @property
    def written(self) -> int:
        """As many as W has."""
        return math.prod(self.shape)

    @property
    def factored(self) -> bool:
        """Yes: a matrix."""
        return True

    @property
    def factor(self) -> Tensor:
        """X."""
        return self.x

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Write out sum_p g_np x_np' of some examples; see the base class."""
        return self._shaped(outer(self.outgoing(g)[rows], self.features(self.x.detach())[rows]))

    def squares(self, g: Tensor) -> Tensor:
        """Add up squares; where an example has one position, as (g^2)'(x^2), and nothing is written out."""
        if self.has_one_position(tuple(g.shape)):
            return self.weighed(g.square())
        Y, X = self.outgoing(g), self.features(self.x.detach())
        N, _, C, k = X.shape
        o = Y.shape[-1]

        def part(piece: slice) -> Tensor:
            return outer(Y[piece], X[piece]).square_().sum(0)

        total = summed_in_chunks(N, C * o * k * X.element_size(), X.device, part)
        return self._shaped(total[None])[0]

    def has_one_position(self, shape: tuple[int, ...]) -> bool:
        """Whether there is one; see the base class."""
        return seen(self, shape).shape[1] == 1

    def weighed(self, q: Tensor) -> Tensor:
        """sum_n q_n (x_n^2)'; see the base class."""
        X = self.features(self.x.detach())
        return self._shaped(outer(self.outgoing(q).transpose(0, 1), X.square().transpose(0, 1)))[0]

    def moved(self, x_dot: Tensor) -> Matrix:
        """With a derivative of x in its place; see the base class."""
        return replace(self, x=x_dot)

    def probe(self, signs: Signs) -> Tensor:
        """a_n (b_n . x_np); see the base class."""
        A, B = self._divided(signs)
        return self.incoming(A * (self.features(self.x) * B).sum(-1, keepdim=True))

    def pulled(self, signs: Signs, g: Tensor) -> Tensor:
        """b_n (a_n . g_np); see the base class."""
        A, B = self._divided(signs)
        transposed: Any = torch.func.vjp(self.features, self.x.detach())
        return transposed[1]((self.outgoing(g) * A).sum(-1, keepdim=True) * B)[0]

    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """sum_np a_n b_n' * (g'_np x_np' + g_np x'_np'), the signs at the sum over positions or at its factors; see the base class."""
        A, B = self._divided(signs)
        pairs = [(self.outgoing(g_dot), self.features(self.x.detach()))]
        if factor_dot is not None:
            pairs.append((self.outgoing(g), self.features(factor_dot)))
        N, P, C, o = pairs[0][0].shape
        k = B.shape[-1]
        if o * k < P * (o + k) and N * C * o * k * A.element_size() <= CACHE_BYTES:
            J = sum((outer(Y, X) for Y, X in pairs), start=A.new_zeros(()))
            return self._shaped(torch.einsum("ncok,nco,nk->cok", J, A[:, 0], B[:, 0, 0])[None])[0]
        total = sum(
            (outer((A * Y).flatten(0, 1)[None], (B * X).flatten(0, 1)[None]) for Y, X in pairs), A.new_zeros(())
        )
        return self._shaped(total)[0]

    def _divided(self, signs: Signs) -> tuple[Tensor, Tensor]:
        """The signs as [N, 1, C, o] and [N, 1, 1, k]."""
        out, into = (signs.b, signs.a) if self.transposed else (signs.a, signs.b)
        if out is None or into is None:
            raise TypeError("signs of a matrix have two factors")
        return out.view(len(out), 1, self.groups, -1), into[:, None, None]

    def _shaped(self, J: Tensor) -> Tensor:
        """[n, C, o, k] -> [n, *shape]."""
        return (J.mT if self.transposed else J).reshape(len(J), *self.shape)


def outer(Y: Tensor, X: Tensor) -> Tensor:
    """Add up outer products over positions.

    Args:
        Y: [n, P, C, o].
        X: [n, P, C, k].

    Returns:
        [n, C, o, k].
    """
    n, P, C, o = Y.shape
    left = Y.permute(0, 2, 3, 1).reshape(n * C, o, P)
    right = X.permute(0, 2, 1, 3).reshape(n * C, P, X.shape[-1])
    return torch.bmm(left, right).view(n, C, o, -1)
