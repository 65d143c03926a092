"""Regions of automatic mixed precision that a model opens by itself: without effect while measuring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Self

import torch

SETTERS = ("set_autocast_enabled", "set_autocast_cpu_enabled")
"""Functions of torch that switch autocast; the first takes a kind of device, or none for CUDA."""


class WithoutAutocast(contextlib.AbstractContextManager["WithoutAutocast"]):
    """While active, every `torch.autocast` is entered as if with `enabled=False`, and `torch.set_autocast_enabled` switches nothing on.

    A forward pass that opens such a region would be computed in bfloat16, whatever the dtype of its parameters. `torch.amp.autocast`,
    `torch.cuda.amp.autocast` and `custom_fwd` are this class or go through it. Its `__enter__` is replaced for the whole process, as the
    global flags of `ExactArithmetic` are, because activation checkpointing enters it again on the threads of the backward pass. Regions
    inside TorchScript are out of reach; `refuse_scripted_autocast` finds them.

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
        """Whether a region that was enabled has been entered, or autocast was switched on."""
        self._before: list[list[Callable[..., Any]]] = []

    def __enter__(self) -> Self:
        """Replace the method and the functions."""
        present = _present()
        self._before.append(present)
        enter, *setters = map(as_written, present)
        _replace([self._entering(enter), *map(self._setting, setters)])
        return self

    def __exit__(self, *exception: object) -> None:
        """Put them back."""
        _replace(self._before.pop())

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

    def _setting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def switch(*arguments: Any, **named: Any) -> Any:
            if "enabled" in named:
                self.silenced |= bool(named["enabled"])
                return original(*arguments, **{**named, "enabled": False})
            self.silenced |= any(argument is True for argument in arguments)
            return original(*(argument if isinstance(argument, str) else False for argument in arguments))

        vars(switch)["original"] = original
        return switch


@contextlib.contextmanager
def autocast_as_written() -> Generator[None]:
    """Inside `WithoutAutocast`: regions have their effect again, for products that are meant to be in lower precision."""
    present = _present()
    _replace([*map(as_written, present)])
    try:
        yield
    finally:
        _replace(present)


@contextlib.contextmanager
def switches_kept(kinds: Sequence[str]) -> Generator[None]:
    """Leave autocast switched as it was, whatever is done inside, also by code that kept torch's own function.

    Args:
        kinds: Of devices, "cpu" and "cuda".
    """
    before = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    try:
        yield
    finally:
        for kind, (enabled, dtype) in before.items():
            if torch.is_autocast_enabled(kind) is not enabled:
                as_written(torch.set_autocast_enabled)(kind, enabled)
            if torch.get_autocast_dtype(kind) is not dtype:
                torch.set_autocast_dtype(kind, dtype)


def as_written(method: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own method behind one that `WithoutAutocast` put in place.

    Args:
        method: Either.

    Returns:
        Torch's.
    """
    return getattr(method, "original", method)


def _present() -> list[Callable[..., Any]]:
    """The method that enters a region, and the functions that switch autocast, as they are now."""
    return [torch.autocast.__enter__, *(getattr(torch, name) for name in SETTERS)]


def _replace(functions: Sequence[Callable[..., Any]]) -> None:
    enter, *setters = functions
    torch.autocast.__enter__ = enter  # type: ignore[method-assign]
    for name, setter in zip(SETTERS, setters, strict=True):
        setattr(torch, name, setter)
