"""Regions of automatic mixed precision that a model opens by itself: without effect while measuring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Self

import torch


class WithoutAutocast(contextlib.AbstractContextManager["WithoutAutocast"]):
    """While active, every `torch.autocast` is entered as if with `enabled=False`, as a context or as a decorator.

    A forward pass that opens such a region would be computed in bfloat16, whatever the dtype of its parameters. `torch.amp.autocast`,
    `torch.cuda.amp.autocast` and `custom_fwd` are this class or go through it. Its `__enter__` is replaced for the whole process, as the
    global flags of `ExactArithmetic` are, because activation checkpointing enters it again on the threads of the backward pass. What is
    set by `torch.set_autocast_enabled` stays as it is.

    It may be entered again after it was left, and inside itself.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with WithoutAutocast() as without, torch.autocast("cpu", dtype=torch.bfloat16):
        ...     product = x @ x
        >>> product.dtype, without.silenced
        (torch.float32, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.silenced = False
        """Whether a region that was enabled has been entered."""
        self._before: list[Callable[..., Any]] = []

    def __enter__(self) -> Self:
        """Replace the method."""
        present = torch.autocast.__enter__
        self._before.append(present)
        torch.autocast.__enter__ = self._entering(as_written(present))  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        """Put it back."""
        torch.autocast.__enter__ = self._before.pop()  # type: ignore[method-assign]

    def _entering(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def enter(region: Any) -> Any:
            self.silenced |= region._enabled
            enabled, region._enabled = region._enabled, False
            try:
                return original(region)
            finally:
                region._enabled = enabled

        vars(enter)["original"] = original
        return enter


@contextlib.contextmanager
def autocast_as_written() -> Generator[None]:
    """Inside `WithoutAutocast`: regions have their effect again, for products that are meant to be in lower precision."""
    present = torch.autocast.__enter__
    torch.autocast.__enter__ = as_written(present)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = present  # type: ignore[method-assign]


def as_written(method: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own method behind one that `WithoutAutocast` put in place.

    Args:
        method: Either.

    Returns:
        Torch's.
    """
    return getattr(method, "original", method)
