"""Where the examples of a batch lie in a tensor inside a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from curvkit.errors import UnsupportedModel

Place = Literal["first", "second", "flattened", "interleaved"]


class WithoutExamples(UnsupportedModel):
    """A tensor is the same for all examples, as positions are that are looked up once."""


@dataclass(frozen=True)
class Layout:
    """How a tensor of a call holds the N examples of the batch.

    "first": dimension 0 counts examples. "second": dimension 1 does, dimension 0 counts positions (time first). "flattened": dimension 0
    counts the positions of the first example, then those of the second, and so on. "interleaved": dimension 0 counts the first positions
    of all examples, then their second ones, and so on.
    """

    num_examples: int
    place: Place
    shape: tuple[int, ...]
    """Of the tensor."""

    @classmethod
    def of(cls, tensor: Tensor, num_examples: int, *, positions: bool, time_first: bool = False) -> Layout:
        """Tell from the shape; `coverage` checks it with numbers, for batches of every shape.

        Args:
            tensor: Output of a call.
            num_examples: N.
            positions: Whether all dimensions but the last may count positions; False where dimension 1 counts channels.
            time_first: Whether positions are known to come before examples.

        Returns:
            The layout.

        Raises:
            WithoutExamples: If no dimension can count examples.

        Example:
            >>> import torch
            >>> Layout.of(torch.zeros(7, 4, 3), 4, positions=True).place
            'second'
        """
        shape = tuple(tensor.shape)
        if positions and time_first and len(shape) == 2 and shape[0] % num_examples == 0:
            return cls(num_examples, "interleaved", shape)
        if positions and time_first and len(shape) >= 3 and shape[1] == num_examples:
            return cls(num_examples, "second", shape)
        if shape and shape[0] == num_examples:
            place: Place = "first"
        elif positions and len(shape) >= 3 and shape[1] == num_examples:
            place = "second"
        elif positions and len(shape) == 2 and shape[0] > num_examples and shape[0] % num_examples == 0:
            place = "flattened"
        else:
            raise WithoutExamples(
                f"none of the dimensions of a tensor of shape {shape} counts the {num_examples} examples"
            )
        return cls(num_examples, place, shape)

    def examples_first(self, tensor: Tensor) -> Tensor:
        """Bring the examples into dimension 0.

        Args:
            tensor: With the dimensions of this layout, the last one of any size.

        Returns:
            [N, ...], a view.
        """
        if self.place == "second":
            return tensor.transpose(0, 1)
        if self.place == "flattened":
            return tensor.reshape(self.num_examples, -1, *tensor.shape[1:])
        if self.place == "interleaved":
            return tensor.reshape(-1, self.num_examples, *tensor.shape[1:]).transpose(0, 1)
        return tensor

    def back(self, tensor: Tensor) -> Tensor:
        """Undo `examples_first`.

        Args:
            tensor: [N, ...].

        Returns:
            In the layout's dimensions.
        """
        if self.place == "second":
            return tensor.transpose(0, 1)
        if self.place == "flattened":
            return tensor.reshape(self.shape[0], *tensor.shape[2:])
        if self.place == "interleaved":
            return tensor.transpose(0, 1).reshape(self.shape[0], *tensor.shape[2:])
        return tensor

    def positions(self, tensor: Tensor) -> Tensor:
        """See all dimensions between examples and features as one.

        Args:
            tensor: With the dimensions of this layout.

        Returns:
            [N, P, C].
        """
        first = self.examples_first(tensor)
        return first.reshape(first.shape[0], -1, first.shape[-1])

    def from_positions(self, tensor: Tensor) -> Tensor:
        """Undo `positions`.

        Args:
            tensor: [N, P, C].

        Returns:
            In the layout's dimensions, with C features.
        """
        if self.place == "second":
            inner = (self.shape[0], *self.shape[2:-1])
        elif self.place in ("flattened", "interleaved"):
            inner = (self.shape[0] // self.num_examples,)
        else:
            inner = self.shape[1:-1]
        return self.back(tensor.reshape(len(tensor), *inner, tensor.shape[-1]))
