"""What estimators that work inside training have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from curvkit.estimators.recordings.recording import Recording


class InTraining:
    """An estimator that takes its diagonal from a forward pass of training, which it records."""

    def recording(self, model: nn.Module, *, parameters: Any = None) -> Recording:
        """Record one forward pass of a model in training, which stays as it is.

        Args:
            model: Whose call is recorded, in whatever mode it is; the first tensor of the call has the examples in dimension 0.
            parameters: Shell patterns for names; None takes all that require a gradient.

        Returns:
            A context manager for the forward pass.

        Raises:
            InvalidArgument: If a pattern matches no name.
        """
        return Recording.of(model, parameters)
