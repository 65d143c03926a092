"""What an estimator of a diagonal is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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
