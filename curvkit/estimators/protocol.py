"""What an estimator of a diagonal is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import DiagonalEstimate


@runtime_checkable
class DiagonalEstimator(Protocol):
    """A frozen dataclass of options; model, loss and data come in the call."""

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        """Estimate the diagonal of the matrix that the estimator names.

        Args:
            objective: The function.
            seed: Of every draw; None draws one.

        Returns:
            The diagonal, with its doubt and its cost.
        """
        ...


@runtime_checkable
class TrainingEstimator(DiagonalEstimator, Protocol):
    """An estimator that also works on a forward pass of training, in which the user's own model runs as it is."""

    def recording(self, model: nn.Module, *, parameters: Any = None) -> AbstractContextManager[Any]:
        """Record one forward pass.

        Args:
            model: Whose call is recorded, in whatever mode it is; the first tensor of the call has the examples in dimension 0.
            parameters: Shell patterns for names; None takes all that require a gradient.

        Returns:
            A context manager for the forward pass, which is then given to `from_recording`.
        """
        ...

    def from_recording(
        self, recording: Any, outputs: Tensor, targets: Any = None, *, loss: Any = None, seed: int | None = None
    ) -> DiagonalEstimate:
        """Estimate the diagonal from that pass, before its backward pass; `.grad` is not touched.

        Args:
            recording: Of `recording`, whose block was left.
            outputs: Of the model, with their graph, which stays.
            targets: Of the batch.
            loss: One of torch's; None takes cross-entropy for outputs [N, C].
            seed: Of every draw; None draws one.

        Returns:
            The diagonal, with its doubt and its cost.
        """
        ...
