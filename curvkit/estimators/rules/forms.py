"""How a parameter enters a call: the forms in which the gradient of each example follows from what goes in and what comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvkit.errors import ran_out_of_memory
from curvkit.operators.memory import release

CHUNK_BYTES, CACHE_BYTES = 64 << 20, 4 << 20
"""For the gradients of examples that are written out together: at most, and where they are used at once."""
Map = Callable[[Tensor], Tensor]


def same(tensor: Tensor) -> Tensor:
    """Return a tensor as it is.

    Args:
        tensor: Any.

    Returns:
        The tensor.
    """
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


def seen(form: Form, shape: tuple[int, ...]) -> Tensor:
    """Z as examples, positions and features, without numbers.

    Args:
        form: Of a parameter.
        shape: Of z.

    Returns:
        A tensor on the meta device.
    """
    return form.outgoing(torch.empty(shape, device="meta"))
