"""Gradients at points near the one that is measured, on a copy of the model, so that nothing of the user's moves."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.linalg.basis import norm
from curvkit.losses.batches import Batch
from curvkit.objectives import Objective


class Moving:
    """A copy of an objective whose parameters can be anywhere.

    Args:
        objective: Model, loss and data; it stays where it is.

    Cost: a copy of the model.

    Example:
        >>> import torch.nn.functional as F
        >>> it = Objective(torch.nn.Linear(1, 1, bias=False), F.mse_loss, [(torch.ones(2, 1), torch.zeros(2, 1))])
        >>> Moving(it).gradient(it.batches[0], torch.tensor([3.0])).tolist()   # of the sum of w^2 over two rows
        [12.0]
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective.copied()
        space = self.objective.parameters
        self.theta = space.join(tensor.detach().clone() for tensor in self.objective.tensors)
        """[n], the point of the original."""
        self.scale = 1.0 + norm(self.theta)
        """1 + ||theta||, the unit of steps in a direction of unit length."""

    def gradient(self, batch: Batch, theta: Tensor) -> Tensor:
        """The gradient of a batch's total at a point.

        Args:
            batch: One batch.
            theta: [n].

        Returns:
            [n]; zero where the loss does not depend on a parameter.

        Cost: one gradient of the batch.
        """
        it = self._at(batch, theta)
        with it.measuring():
            total = it.terms(0).total
            if not total.requires_grad:
                return torch.zeros_like(theta)
            return it.parameters.join(torch.autograd.grad(total, it.tensors, materialize_grads=True)).detach()

    def value(self, batch: Batch, theta: Tensor) -> float:
        """A batch's total at a point.

        Args:
            batch: One batch.
            theta: [n].

        Returns:
            The sum over its terms.

        Cost: one forward pass of the batch.
        """
        it = self._at(batch, theta)
        with it.measuring():
            return it.numbers(0)[0]

    def quotient(self, batch: Batch, v: Tensor, h: float) -> Tensor:
        """The central difference of gradients, (g(theta + h v) - g(theta - h v)) / 2h.

        Args:
            batch: One batch.
            v: [n], the direction.
            h: The step.

        Returns:
            [n]: H v up to h^2 times fourth derivatives and rounding / h, where the function is smooth.

        Cost: two gradients of the batch.
        """
        return (self.gradient(batch, self.theta + h * v) - self.gradient(batch, self.theta - h * v)) / (2 * h)

    def _at(self, batch: Batch, theta: Tensor) -> Objective:
        it = self.objective.with_batches([batch])
        with torch.no_grad():
            for tensor, piece in zip(it.tensors, it.parameters.split(theta), strict=True):
                tensor.copy_(piece)
        return it
