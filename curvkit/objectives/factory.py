"""The mark on a function that makes an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])

MARK = "__curvkit_objective__"


def objective(function: F) -> F:
    """Mark a function that returns an `Objective`, so that the command line may call it; nothing else changes.

    Args:
        function: Called with the keyword arguments given by `--set`; returns an `Objective` with the architecture,
            whose weights are then replaced by the checkpoint's.

    Returns:
        The same function.

    Example:
        >>> @objective
        ... def small():
        ...     ...
        >>> is_objective(small)
        True
    """
    setattr(function, MARK, True)
    return function


def is_objective(function: object) -> bool:
    """Whether a function bears the mark.

    Args:
        function: Anything.

    Returns:
        True after `objective(function)`.
    """
    return getattr(function, MARK, False) is True
