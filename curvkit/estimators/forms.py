"""How a parameter enters a call: the forms in which the gradient of each example follows from what goes in and what comes out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import ran_out_of_memory
from curvkit.operators.memory import release

CHUNK_BYTES, CACHE_BYTES = 64 << 20, 4 << 20
"""For the gradients of examples that are written out together: at most, and where they are used at once."""
Map = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


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

    @property
    @abstractmethod
    def written(self) -> int:
        """Numbers in the gradient of one example, written out."""

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

    @abstractmethod
    def has_one_position(self, shape: tuple[int, ...]) -> bool:
        """Whether each entry of W meets one entry of z in an example: dense layers on vectors, say.

        Args:
            shape: Of z.

        Returns:
            True or False.
        """

    @abstractmethod
    def weighed(self, q: Tensor) -> Tensor:
        """Add up squares of dz/dW with weights, where an example has one position.

        Args:
            q: Of the shape of z.

        Returns:
            sum_n q_n (dz_n/dW)^2, each entry of W with the entry of z that it meets, in the shape of W.
        """

    @property
    def factored(self) -> bool:
        """Whether `Signs` have two factors."""
        return False

    @property
    @abstractmethod
    def factor(self) -> Tensor | None:
        """What W is multiplied with, in the graph, as it depends on earlier parameters; None where nothing does."""

    def moved(self, x_dot: Tensor) -> Form:
        """The same call with a derivative of `factor` in its place, so that `probe` is its change.

        Args:
            x_dot: Of the shape of `factor`.

        Returns:
            Another form; this one where there is no factor.
        """
        return self

    @abstractmethod
    def probe(self, signs: Signs) -> Tensor:
        """The change of z, of its shape, if each example moves W by its own signs."""

    @abstractmethod
    def pulled(self, signs: Signs, g: Tensor) -> Tensor | None:
        """The gradient of <g, `probe`> in `factor`, of its shape; None where it has none."""

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
        return self._shaped(_outer(self.outgoing(g)[rows], self.features(self.x.detach())[rows]))

    def squares(self, g: Tensor) -> Tensor:
        """Add up squares; where an example has one position, as (g^2)'(x^2), and nothing is written out."""
        if self.has_one_position(tuple(g.shape)):
            return self.weighed(g.square())
        Y, X = self.outgoing(g), self.features(self.x.detach())
        N, _, C, k = X.shape
        o = Y.shape[-1]

        def part(piece: slice) -> Tensor:
            return _outer(Y[piece], X[piece]).square_().sum(0)

        total = summed_in_chunks(N, C * o * k * X.element_size(), X.device, part)
        return self._shaped(total[None])[0]

    def has_one_position(self, shape: tuple[int, ...]) -> bool:
        """Whether there is one; see the base class."""
        return _seen(self, shape).shape[1] == 1

    def weighed(self, q: Tensor) -> Tensor:
        """sum_n q_n (x_n^2)'; see the base class."""
        X = self.features(self.x.detach())
        return self._shaped(_outer(self.outgoing(q).transpose(0, 1), X.square().transpose(0, 1)))[0]

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
            J = sum((_outer(Y, X) for Y, X in pairs), start=A.new_zeros(()))
            return self._shaped(torch.einsum("ncok,nco,nk->cok", J, A[:, 0], B[:, 0, 0])[None])[0]
        total = sum(
            (_outer((A * Y).flatten(0, 1)[None], (B * X).flatten(0, 1)[None]) for Y, X in pairs), A.new_zeros(())
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
    """z = w * normal(x) entry by entry, w the same at all positions; without x, z = ... + w. `outgoing` gives [N, ...]."""

    x: Tensor | None
    """[N, ...], in the graph; None for an offset."""
    gathered: Map
    """Sums over positions, [N, ...] -> [N, *shape]."""
    spread: Map
    """Its transpose, [N, *shape] -> [N, ...] up to broadcasting."""
    normal: Map = _same
    """Entry by entry from x to what w multiplies: (x - mean) / sqrt(variance) with fixed statistics."""
    linear: Map = _same
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
        y = _seen(self, shape)
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


def summed_in_chunks(count: int, size: int, device: torch.device, part: Callable[[slice], Tensor]) -> Tensor:
    """Add up what is made of a few examples at a time; half as many after memory ran out.

    Args:
        count: Examples.
        size: Bytes that one of them takes.
        device: Where.
        part: Makes the sum over some of them.

    Returns:
        The sum over all.

    Raises:
        RuntimeError: Torch's, also where memory does not suffice for one example.
        MemoryError: Likewise.

    Example:
        >>> x = torch.arange(5.0)
        >>> summed_in_chunks(5, CACHE_BYTES // 2, x.device, lambda piece: x[piece].sum()).item()
        10.0
    """
    step, begin = max(1, CACHE_BYTES // max(size, 1)), 0
    total: Tensor | None = None
    while begin < count:
        try:
            found = part(slice(begin, begin + step))
            total = found if total is None else total.add_(found)
            begin += step
            continue
        except (RuntimeError, MemoryError) as error:
            if step == 1 or not ran_out_of_memory(error):
                raise
        step = (min(step, count) + 1) // 2
        release(device)  # outside of the handler, whose frames hold tensors
    return part(slice(0, 0)) if total is None else total


def _seen(form: Form, shape: tuple[int, ...]) -> Tensor:
    """Z as examples, positions and features, without numbers."""
    return form.outgoing(torch.empty(shape, device="meta"))


def _outer(Y: Tensor, X: Tensor) -> Tensor:
    """sum_p of outer products: [n, P, C, o] and [n, P, C, k] -> [n, C, o, k]."""
    n, P, C, o = Y.shape
    left = Y.permute(0, 2, 3, 1).reshape(n * C, o, P)
    right = X.permute(0, 2, 1, 3).reshape(n * C, P, X.shape[-1])
    return torch.bmm(left, right).view(n, C, o, -1)
