"""Which model, loss and data belong to a checkpoint."""

from curvkit.resolving.factories import FactoryFailed
from curvkit.resolving.resolution import Resolved, resolve

__all__ = ["FactoryFailed", "Resolved", "resolve"]
