"""The fully connected network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from curvkit.errors import InvalidArgument
from curvkit.models.checks import check_count

Activation = Literal["relu", "tanh", "gelu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLP(nn.Sequential):
    """Alternate affine maps and an elementwise activation.

        z_0 = flatten(x),   a_i = W_i z_i + b_i,   z_{i+1} = phi(a_i),   outputs = a_{L-1}

    The children are `linear0`, `activation0`, `linear1`, ..., in order, and the class is an `nn.Sequential`:
    tools that walk containers (BackPACK's second-order extensions) meet no module that they do not know. The
    last affine map has no activation. For part of the network write `nn.Sequential(*list(model)[:2])`; a
    slice `model[:2]` would call this constructor.

    Args:
        sizes: Layer widths [d_0, ..., d_L], L >= 1: inputs, hidden layers, outputs.
        activation: phi. "tanh" and "gelu" (the exact one) are smooth; "relu" is
            piecewise linear.

    Shapes: inputs [N, ...] with d_0 numbers per example -> outputs [N, d_L].

    Raises:
        InvalidArgument: If a size is not an integer >= 1, there are fewer than two, or the activation is
            unknown.

    Parameters: sum_i (d_i + 1) d_{i+1}, initialised by `nn.Linear` from the global random state.
    Cost: 2 N sum_i d_i d_{i+1} floating point operations per forward pass.

    Example:
        >>> import torch
        >>> MLP([784, 32, 10], activation="tanh")(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, sizes: Sequence[int], activation: Activation = "relu") -> None:
        if isinstance(sizes, str) or not isinstance(sizes, Sequence) or len(sizes) < 2:
            raise InvalidArgument(
                f"MLP: sizes={sizes!r} must be a sequence of at least two integers. "
                "They are the widths from inputs to outputs; pass for example [784, 32, 10]."
            )
        for i, size in enumerate(sizes):
            check_count("MLP", f"sizes[{i}]", size, "the width of one layer", 32)
        if activation not in tuple(ACTIVATIONS):  # a tuple, because a recipe may hold something unhashable
            raise InvalidArgument(
                f"MLP: activation={activation!r} must be one of {', '.join(map(repr, ACTIVATIONS))}. "
                "For another one build an nn.Sequential and pass it in an Objective."
            )
        super().__init__()
        self.sizes = tuple(sizes)
        last = len(sizes) - 2
        for i in range(last + 1):
            self.add_module(f"linear{i}", nn.Linear(sizes[i], sizes[i + 1]))
            if i < last:
                self.add_module(f"activation{i}", ACTIVATIONS[activation]())

    def forward(self, input: Tensor) -> Tensor:  # the argument has the name that nn.Sequential gives it
        """Map inputs to outputs.

        Args:
            input: [N, ...], with sizes[0] numbers per example.

        Returns:
            Outputs, [N, sizes[-1]].

        Raises:
            InvalidArgument: If there is no batch dimension, or an example has another number of entries.

        Example:
            >>> import torch
            >>> MLP([3, 2])(torch.ones(4, 3)).shape
            torch.Size([4, 2])
        """
        if input.dim() < 2 or input.shape[1:].numel() != self.sizes[0]:
            raise InvalidArgument(
                f"MLP: inputs of shape {tuple(input.shape)} must be [N, ...] with {self.sizes[0]} numbers "
                "per example. Reshape the inputs, or give sizes[0] the number of entries of one example."
            )
        z = input.flatten(1)  # [N, d_0]
        for layer in self:
            z = layer(z)
        return z  # [N, d_L]
