"""Containers from paths: ("optimizer", "param_groups", 0, "lr") -> 0.1 becomes a dict of a list of a dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvkit.checkpoints.documents import brief
from curvkit.errors import RefusedCheckpoint

Path = tuple[str | int, ...]
HOLES = 64
"""Items of a list that may be missing: empty containers leave no path."""


def nested(items: Mapping[Path, Any], source: str) -> dict[str, Any]:
    """Build dicts and lists from flattened names.

    Args:
        items: Path -> value; a string is a key of a dict, an integer the position in a list.
        source: For messages.

    Returns:
        The dict at the top. Missing items of lists are None.

    Raises:
        RefusedCheckpoint: If two paths contradict each other, or a list would have far more items than there are values.

    Cost: linear in the number of parts of all paths.

    Example:
        >>> nested({("model", "w"): 1, ("groups", 1, "lr"): 2}, "example")
        {'model': {'w': 1}, 'groups': [None, {'lr': 2}]}
    """
    root: dict[Any, Any] = {}
    nodes: dict[Path, dict[Any, Any]] = {(): root}
    for path, value in items.items():
        parent = _node(nodes, path[:-1], source)
        if path[-1] in parent:
            raise RefusedCheckpoint(_contradiction(source, path))
        parent[path[-1]] = value
    built: dict[Path, Any] = {}
    for path in sorted(nodes, key=len, reverse=True):
        node = nodes[path]
        for key in node:
            if (*path, key) in built:
                node[key] = built[*path, key]
        built[path] = _optimizer(_container(node, path, source))
    return built[()]


def _node(nodes: dict[Path, dict[Any, Any]], path: Path, source: str) -> dict[Any, Any]:
    """The container at a path, made with all those above it."""
    depth = len(path)
    while path[:depth] not in nodes:
        depth -= 1
    node = nodes[path[:depth]]
    for end in range(depth, len(path)):
        if path[end] in node:
            raise RefusedCheckpoint(_contradiction(source, path))
        node[path[end]] = node = nodes[path[: end + 1]] = {}
    return node


def _container(node: dict[Any, Any], path: Path, source: str) -> Any:
    numbers = [key for key in node if isinstance(key, int)]
    if not numbers:
        return node
    if not path or len(numbers) < len(node) or min(numbers) < 0 or max(numbers) > 2 * len(numbers) + HOLES:
        raise RefusedCheckpoint(_contradiction(source, (*path, max(numbers))))
    return [node.get(index) for index in range(max(numbers) + 1)]


def _optimizer(value: Any) -> Any:
    """Give the state of an optimizer its integer keys back where its groups have integers for parameters."""
    groups = value.get("param_groups") if isinstance(value, dict) else None
    if not isinstance(groups, list):
        return value
    state = value.setdefault("state", {})  # empty ones leave no path
    parameters = [p for group in groups if isinstance(group, dict) for p in _list(group.get("params"))]
    numbers = {str(p): p for p in parameters if isinstance(p, int)}
    if numbers and isinstance(state, dict) and all(key in numbers for key in state):
        value["state"] = {numbers[key]: entry for key, entry in state.items()}
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _contradiction(source: str, path: Path) -> str:
    return (
        f"{source}: the metadata is damaged: {brief('.'.join(str(part) for part in path))} contradicts another name. "
        "Take another copy or an earlier checkpoint."
    )
