"""Files with weights: recognised without unpickling, read as data, written so that they say what they are.

The names below are resolved when they are first used, so that `curvkit.checkpoints.detection` and `.inspection` import no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvkit.checkpoints.checkpoint import Checkpoint as Checkpoint
    from curvkit.checkpoints.detection import Detected as Detected
    from curvkit.checkpoints.detection import detect as detect
    from curvkit.checkpoints.fitting import fit as fit
    from curvkit.checkpoints.inspection import Inspection as Inspection
    from curvkit.checkpoints.inspection import inspect as inspect
    from curvkit.checkpoints.reading import digest as digest
    from curvkit.checkpoints.reading import read as read
    from curvkit.checkpoints.recipes import Recipe as Recipe
    from curvkit.checkpoints.trust import Trust as Trust
    from curvkit.checkpoints.writing import save as save

_HOMES = {
    "Checkpoint": "checkpoint",
    "Detected": "detection",
    "Inspection": "inspection",
    "Recipe": "recipes",
    "Trust": "trust",
    "detect": "detection",
    "digest": "reading",
    "fit": "fitting",
    "inspect": "inspection",
    "read": "reading",
    "save": "writing",
}

__all__ = [
    "Checkpoint",
    "Detected",
    "Inspection",
    "Recipe",
    "Trust",
    "detect",
    "digest",
    "fit",
    "inspect",
    "read",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'curvkit.checkpoints' has no attribute {name!r}")
    return getattr(importlib.import_module(f"curvkit.checkpoints.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
