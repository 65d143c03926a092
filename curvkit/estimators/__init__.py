"""Estimators of the diagonal of a curvature matrix, each with its doubt, the name of its matrix and its cost."""

from curvkit.estimators.example_hutchinson import ExampleHutchinson
from curvkit.estimators.fisher import EmpiricalFisher, Fisher, SquaredGradient
from curvkit.estimators.hutchinson import Hutchinson
from curvkit.estimators.protocol import DiagonalEstimator

__all__ = ["DiagonalEstimator", "EmpiricalFisher", "ExampleHutchinson", "Fisher", "Hutchinson", "SquaredGradient"]
