"""Which model, loss and data belong to a checkpoint.

The names below are resolved when they are first used, so that `curvkit.resolving.config` and `.request` import no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvkit.resolving.factories import FactoryFailed as FactoryFailed
    from curvkit.resolving.request import Request as Request
    from curvkit.resolving.request import TextData as TextData
    from curvkit.resolving.resolution import Resolved as Resolved
    from curvkit.resolving.resolution import resolve as resolve

_HOMES = {
    "FactoryFailed": "factories",
    "Request": "request",
    "Resolved": "resolution",
    "TextData": "request",
    "resolve": "resolution",
}

__all__ = ["FactoryFailed", "Request", "Resolved", "TextData", "resolve"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'curvkit.resolving' has no attribute {name!r}")
    return getattr(importlib.import_module(f"curvkit.resolving.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
