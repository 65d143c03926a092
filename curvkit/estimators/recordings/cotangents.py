"""Cotangents of outputs, sent back to the calls of a recorded pass."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.estimators.recordings.recording import Recording


def pull(outputs: Tensor, recording: Recording, s: Tensor, *, keep: bool = True) -> tuple[Tensor | None, ...]:
    """Send a cotangent of the outputs back to the calls that were recorded.

    Args:
        outputs: In the graph.
        recording: Of their forward pass.
        s: Of the shape of the outputs.
        keep: Whether the graph will be used again.

    Returns:
        For each call J's, in the shape of what came out; None where the outputs do not depend on it.

    Cost: a backward pass without gradients of the parameters.
    """
    calls = [use.output for use in recording.uses]
    if not calls or not outputs.requires_grad:
        return (None,) * len(calls)
    return torch.autograd.grad(outputs, calls, s, retain_graph=keep, allow_unused=True)
