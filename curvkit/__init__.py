"""Second-order curvature of PyTorch models: measured, with its doubt.

The names below are resolved when they are first used, so that `import curvkit` is quick and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvkit.checkpoints import Recipe as Recipe
    from curvkit.checkpoints import save as save
    from curvkit.errors import CurvkitError as CurvkitError
    from curvkit.losses import BatchLoss as BatchLoss
    from curvkit.objectives import Objective as Objective
    from curvkit.objectives import objective as objective
    from curvkit.parameters import ParameterSpace as ParameterSpace

_HOMES = {
    "BatchLoss": "curvkit.losses",
    "CurvkitError": "curvkit.errors",
    "Objective": "curvkit.objectives",
    "ParameterSpace": "curvkit.parameters",
    "Recipe": "curvkit.checkpoints",
    "objective": "curvkit.objectives",
    "save": "curvkit.checkpoints",
}

__all__ = ["BatchLoss", "CurvkitError", "Objective", "ParameterSpace", "Recipe", "objective", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'curvkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
