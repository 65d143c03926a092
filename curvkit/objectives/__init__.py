"""The function whose curvature is measured: a model, a loss, data and the parameters that span the space."""

from curvkit.objectives.factory import is_objective, objective
from curvkit.objectives.function import Objective

__all__ = ["Objective", "is_objective", "objective"]
