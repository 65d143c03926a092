"""What the graph of recorded outputs reaches: parameters that no recorded call shows, and what hides parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvkit.errors import UnsupportedModel
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.uses import Use

CHECKPOINT = "CheckpointFunctionBackward"


def refuse_checkpoints(name: str, outputs: Tensor) -> None:
    """Refuse reentrant checkpoints, which run without a graph and make theirs in the backward pass.

    Args:
        name: Of estimator and method, for messages.
        outputs: Of the model, with their graph.

    Raises:
        UnsupportedModel: If there is one.
    """
    if any(node.name() == CHECKPOINT for node in _nodes(outputs)):
        raise UnsupportedModel(
            f"{name}: a reentrant checkpoint hides the parameters in it from the graph. Use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or estimate()."
        )


def unseen(recording: Recording, outputs: Tensor) -> str | None:
    """Look for a parameter that the graph of the outputs reaches otherwise than through the calls that were recorded.

    Args:
        recording: Of the forward pass.
        outputs: Of the model.

    Returns:
        The first name that is found; None if there is none.
    """
    names = {get_gradient_edge(p).node: name for name, p in recording.parameters.items() if p.requires_grad}
    calls: dict[Any, list[Use]] = {}
    for use in recording.uses:
        calls.setdefault(use.output.node, []).append(use)
    seen: set[Any] = {None}
    stack: list[Any] = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in names:
            return names[node]
        if node in calls:
            stack += [get_gradient_edge(x).node for use in calls[node] for x in use.inputs if x.requires_grad]
        else:
            stack += [before for before, _ in node.next_functions]
    return None


def _nodes(outputs: Tensor) -> Iterator[Any]:
    """All of the graph."""
    seen: set[Any] = {None}
    stack: list[Any] = [outputs.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [before for before, _ in node.next_functions]
            yield node
