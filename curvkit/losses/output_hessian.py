"""The Hessian of a loss in the outputs of the model, as a matrix that multiplies and, where it has one, its factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from curvkit.errors import UnsupportedModel


class OutputHessian(Protocol):
    """H_out, the second derivative of a batch's total in the outputs z, at the z and the targets of that batch.

    H_out[i, j] = d^2 total / dz_i dz_j,   i and j over all elements of z
    """

    def multiply(self, V: Tensor) -> Tensor:
        """H_out V, with V of the shape of the outputs."""
        ...

    def root(self, V: Tensor) -> Tensor:
        """S V with H_out = S S', V of the shape of the outputs; so for random signs V the mean of (S V)(S V)' is H_out."""
        ...

    def factor_columns(self) -> Iterator[Tensor]:
        """Columns s_c, each of the shape of the outputs, such that H_out of each row alone is sum_c s_c s_c'."""
        ...


@dataclass(frozen=True, eq=False)
class SoftmaxHessian:
    """Of the cross-entropies; every distribution has a block of its own.

        H_out = m (diag p - p p'),   S = sqrt(m) (diag sqrt(p) - p sqrt(p)'),   p = softmax(z)

    m is the sum of the coefficients of -log p_c in the term: class weight, smoothing and soft targets enter there alone, and m = 0 where
    the target is ignored. A product first subtracts the entry of the likeliest class k, which changes nothing since H_out 1 = 0,

        H_out V = m p (D - p'D),   D = V - V_k

    and so keeps its relative accuracy where p_k is nearly 1, as in a model that fits its data.

    Example:
        >>> H = SoftmaxHessian.at(torch.zeros(1, 2), torch.ones(1, 1), dim=1)
        >>> H.multiply(torch.tensor([[1.0, 0.0]])).tolist()   # diag p - p p' = [[1/4, -1/4], [-1/4, 1/4]]
        [[0.25, -0.25]]
    """

    p: Tensor
    weighted: Tensor
    """m p."""
    mass: Tensor
    likeliest: Tensor
    dim: int

    @classmethod
    def at(cls, outputs: Tensor, mass: Tensor, *, dim: int) -> SoftmaxHessian:
        """Prepare what every product needs.

        Args:
            outputs: z.
            mass: m, of size 1 in the dimension of the classes.
            dim: That dimension.

        Returns:
            H_out at z.

        Cost: two tensors of the size of z are kept.
        """
        p = outputs.detach().softmax(dim)
        return cls(p, p * mass, mass, p.argmax(dim, keepdim=True), dim)

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply.

        Args:
            V: Of the shape of the outputs.

        Returns:
            H_out V.
        """
        D = V - V.gather(self.dim, self.likeliest)
        return self.weighted * (D - (self.p * D).sum(self.dim, keepdim=True))

    def root(self, V: Tensor) -> Tensor:
        """Multiply with S.

        Args:
            V: Of the shape of the outputs.

        Returns:
            S V.

        Raises:
            UnsupportedModel: If a mass is negative.
        """
        scale, rooted = _square_root(self.mass), self.p.sqrt() * V
        return scale * (rooted - self.p * rooted.sum(self.dim, keepdim=True))

    def factor_columns(self) -> Iterator[Tensor]:
        """S e_i of all rows at once.

        Yields:
            One column for each output of a row.

        Raises:
            UnsupportedModel: If a mass is negative.
        """
        yield from _columns(self.root, self.p, rows=1 if self.p.ndim == 1 else len(self.p))


@dataclass(frozen=True, eq=False)
class DiagonalHessian:
    """Of losses that are sums over the elements of the outputs.

        H_out = diag h,   S = diag sqrt(h)

    Args:
        h: Of the shape of the outputs.

    Example:
        >>> DiagonalHessian(torch.tensor([[2.0, 3.0]])).multiply(torch.ones(1, 2)).tolist()
        [[2.0, 3.0]]
    """

    h: Tensor

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply.

        Args:
            V: Of the shape of the outputs.

        Returns:
            H_out V.
        """
        return self.h * V

    def root(self, V: Tensor) -> Tensor:
        """Multiply with S.

        Args:
            V: Of the shape of the outputs.

        Returns:
            S V.

        Raises:
            UnsupportedModel: If an entry of h is negative.
        """
        return _square_root(self.h) * V

    def factor_columns(self) -> Iterator[Tensor]:
        """S e_i of all rows at once.

        Yields:
            One column for each output of a row.

        Raises:
            UnsupportedModel: If an entry of h is negative.
        """
        yield from _columns(self.root, self.h, rows=len(self.h) if self.h.ndim else 1)


@dataclass(frozen=True, eq=False)
class DifferentiatedHessian:
    """Of any other loss, by double backward through the loss alone.

        H_out V = d/dz (grad_z total . V)

    Args:
        outputs: z, a leaf that requires a gradient.
        gradient: grad_z total, with its graph.
        name: Of the loss, for messages.
    """

    outputs: Tensor
    gradient: Tensor
    name: str

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply.

        Args:
            V: Of the shape of the outputs.

        Returns:
            H_out V.
        """
        arguments: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        return torch.autograd.grad(self.gradient, self.outputs, V, **arguments)[0]

    def root(self, V: Tensor) -> Tensor:
        """There is none that is known.

        Args:
            V: Of the shape of the outputs.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel(
            f"OutputHessian: no factor S of the output Hessian S S' of {self.name} is known. "
            "Use cross_entropy, token_cross_entropy, mse_loss or binary_cross_entropy_with_logits, or products alone."
        )

    def factor_columns(self) -> Iterator[Tensor]:
        """There are none that are known.

        Raises:
            UnsupportedModel: Always.
        """
        self.root(self.outputs)
        yield self.outputs


def _square_root(values: Tensor) -> Tensor:
    if bool((values < 0).any()):
        raise UnsupportedModel(
            "OutputHessian: a weight of the loss is negative, so that the output Hessian is not positive semidefinite and has no real "
            "factor S. Use weights of at least 0, or products alone."
        )
    return values.sqrt()


def _columns(root: Callable[[Tensor], Tensor], like: Tensor, *, rows: int) -> Iterator[Tensor]:
    """S e_i, with the i-th output of every row set to 1."""
    width = like.numel() // rows if rows else 0
    for i in range(width):
        unit = torch.zeros_like(like, memory_format=torch.contiguous_format)
        unit.view(rows, width)[:, i] = 1.0
        yield root(unit)
