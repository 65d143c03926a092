"""Estimators of the diagonal of a curvature matrix, each with its doubt, the name of its matrix and its cost."""

from curvkit.estimators.backpack_diagonal import BackPACK
from curvkit.estimators.controlled_estimate import Controlled
from curvkit.estimators.deflated_diagonal import Deflated
from curvkit.estimators.empirical_fisher import EmpiricalFisher
from curvkit.estimators.exact_diagonal import Exact
from curvkit.estimators.example_hutchinson import ExampleHutchinson
from curvkit.estimators.fisher import Fisher
from curvkit.estimators.hutchinson import Hutchinson
from curvkit.estimators.intervals import interval
from curvkit.estimators.lanczos_diagonal import Lanczos
from curvkit.estimators.optimizer_state_diagonal import OptimizerState
from curvkit.estimators.protocol import DiagonalEstimator, TrainingEstimator
from curvkit.estimators.squared_gradient import SquaredGradient
from curvkit.estimators.xdiag_diagonal import XDiag

__all__ = [
    "BackPACK",
    "Controlled",
    "Deflated",
    "DiagonalEstimator",
    "EmpiricalFisher",
    "Exact",
    "ExampleHutchinson",
    "Fisher",
    "Hutchinson",
    "Lanczos",
    "OptimizerState",
    "SquaredGradient",
    "TrainingEstimator",
    "XDiag",
    "interval",
]
