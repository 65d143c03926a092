"""The groups of an optimizer in a directory of torch.distributed.checkpoint, without its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from curvkit.checkpoints.distributed_metadata import Metadata
from curvkit.checkpoints.nesting import nested
from curvkit.checkpoints.pieces import Place
from curvkit.checkpoints.training_entries import OPTIMIZER_KEYS

SMALL = 1 << 20
"""Bytes of an item that is read."""
MOST = 10_000
"""Items that are read."""


def optimizer_groups(index: Metadata, content: Callable[[Place], Any], source: str) -> Mapping[str, Any] | None:
    """What `Optimizer.state_dict()` said of its groups.

    Args:
        index: Of the directory.
        content: Reads an item that has no tensors.
        source: For messages.

    Returns:
        A dict with "param_groups"; None if there is none, or if it is too large for a summary.

    Raises:
        RefusedCheckpoint: If an item is damaged, or two names contradict each other.

    Cost: the items of the groups are read, and no tensor.
    """
    for key in OPTIMIZER_KEYS:
        places = {
            path[1:]: index.values[name]
            for name, path in index.paths.items()
            if path[:2] == (key, "param_groups") and name in index.values
        }
        if places and len(places) <= MOST and all(place.length <= SMALL for place in places.values()):
            return nested({path: content(place) for path, place in places.items()}, source)
    return None
