"""How a parameter enters a call: the forms in which the gradient of each example follows from what goes in and what comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""For the gradients of examples that are written out together."""
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Signs:
    """Random signs per example for one parameter, the same at each of its uses.

    For a matrix the signs of example n are the rank-one a_n b_n', whose entries are signs that are uncorrelated in pairs.
    """

    a: Tensor
    """[N, rows] for a matrix, seen as [first dimension, all others]; else [N, *shape]."""
    b: Tensor | None = None
    """[N, columns] for a matrix."""


@dataclass(frozen=True, eq=False)
class Form(ABC):
    """One use of a parameter in a call whose output z is linear in it.

        dL/dW of example n = sum_p (a bilinear function of g_np = dL/dz_np and of what W is multiplied with)

    over the positions p of the example.
    """

    name: str
    """Of the parameter."""
    outgoing: Map
    """From the shape of z to examples, positions and features."""
    incoming: Map
    """Back."""

    @abstractmethod
    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Write out the gradients of some examples.

        Args:
            g: dL/dz, of the shape of z.
            rows: Which examples.

        Returns:
            [n, *shape].
        """

    def squares(self, g: Tensor) -> Tensor:
        """Add up squares of the gradients of single examples.

        Args:
            g: dL/dz, of the shape of z.

        Returns:
            sum_n (dL/dW of example n)^2, in the shape of W.
        """
        return self.gradients(g, slice(None)).square().sum(0)

    @property
    @abstractmethod
    def factor(self) -> Tensor | None:
        """What W is multiplied with, in the graph, as it depends on earlier parameters; None where nothing does."""

    @abstractmethod
    def probe(self, signs: Signs) -> Tensor:
        """The change of z, of its shape, if each example moves W by its own signs."""

    @abstractmethod
    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """Add up the signed derivatives of the gradients of single examples.

        Args:
            signs: V_n of each example n.
            g: dL/dz.
            g_dot: Its derivative in the direction of all probes.
            factor_dot: Likewise of `factor`.

        Returns:
            sum_n V_n * d/d eps (dL/dW of example n), in the shape of W.
        """


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
    def factor(self) -> Tensor:
        """X."""
        return self.x

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Write out sum_p g_np x_np' of some examples; see the base class."""
        return self._shaped(_outer(self.outgoing(g)[rows], self.features(self.x.detach())[rows]))

    def squares(self, g: Tensor) -> Tensor:
        """Add up squares; where an example has one position, as (g^2)'(x^2), and nothing is written out."""
        Y, X = self.outgoing(g), self.features(self.x.detach())
        (N, P, C, k), o = X.shape, Y.shape[-1]
        if P == 1:
            return self._shaped(_outer(Y.square().transpose(0, 1), X.square().transpose(0, 1)))[0]
        step = max(1, CHUNK_BYTES // (C * o * k * X.element_size()))
        total = X.new_zeros(C, o, k)
        for begin in range(0, N, step):
            piece = slice(begin, begin + step)
            total += _outer(Y[piece], X[piece]).square_().sum(0)
        return self._shaped(total[None])[0]

    def probe(self, signs: Signs) -> Tensor:
        """a_n (b_n . x_np); see the base class."""
        A, B = self._divided(signs)
        return self.incoming(A * (self.features(self.x) * B).sum(-1, keepdim=True))

    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """sum_np (a_n * g'_np)(b_n * x_np)' + (a_n * g_np)(b_n * x'_np)'; see the base class."""
        A, B = self._divided(signs)
        total = _outer(
            (A * self.outgoing(g_dot)).flatten(0, 1)[None], (B * self.features(self.x.detach())).flatten(0, 1)[None]
        )
        if factor_dot is not None:
            total += _outer(
                (A * self.outgoing(g)).flatten(0, 1)[None], (B * self.features(factor_dot)).flatten(0, 1)[None]
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


@dataclass(frozen=True, eq=False)
class Scale(Form):
    """z = w * x entry by entry, w the same at all positions; without x, z = ... + w. `outgoing` gives [N, ...]."""

    x: Tensor | None
    """[N, ...], in the graph; None for an offset."""
    gathered: Map
    """Sums over positions, [N, ...] -> [N, *shape]."""
    spread: Map
    """Its transpose, [N, *shape] -> [N, ...] up to broadcasting."""

    @property
    def factor(self) -> Tensor | None:
        """X."""
        return self.x

    def gradients(self, g: Tensor, rows: slice) -> Tensor:
        """Write out sum_p g_np * x_np of some examples; see the base class."""
        y = self.outgoing(g)
        return self.gathered(y if self.x is None else y * self.x.detach())[rows]

    def probe(self, signs: Signs) -> Tensor:
        """v_n * x_np; see the base class."""
        v = self.spread(signs.a)
        return self.incoming(v if self.x is None else v * self.x)

    def collected(self, signs: Signs, g: Tensor, g_dot: Tensor, factor_dot: Tensor | None) -> Tensor:
        """sum_n v_n * sum_p (g'_np * x_np + g_np * x'_np); see the base class."""
        total = self.outgoing(g_dot) if self.x is None else self.outgoing(g_dot) * self.x.detach()
        if factor_dot is not None:
            total = total + self.outgoing(g) * factor_dot
        return (signs.a * self.gathered(total)).sum(0)


@dataclass(frozen=True, eq=False)
class Lookup(Form):
    """z_np = row i_np of a table. `outgoing` gives [N, P, d]."""

    index: Tensor
    """[N, P]"""
    shape: tuple[int, int]
    padding: int | None = None
    """Row that gets no gradient."""

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

    def probe(self, signs: Signs) -> Tensor:
        """a_n[i_np] b_n; see the base class."""
        return self.incoming(self._counted(self._drawn(signs)))

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


def _outer(Y: Tensor, X: Tensor) -> Tensor:
    """sum_p of outer products: [n, P, C, o] and [n, P, C, k] -> [n, C, o, k]."""
    n, P, C, o = Y.shape
    left = Y.permute(0, 2, 3, 1).reshape(n * C, o, P)
    right = X.permute(0, 2, 1, 3).reshape(n * C, P, X.shape[-1])
    return torch.bmm(left, right).view(n, C, o, -1)
