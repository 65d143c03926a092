"""Frozen results that carry their doubt."""

from curvkit.results.definition import Definition
from curvkit.results.eigenpairs import Eigenpairs

__all__ = ["Definition", "Eigenpairs"]
