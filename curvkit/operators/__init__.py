"""Curvature matrices of an objective, seen through their products."""

from curvkit.operators.copies import DoubleGGN, DoubleHessian, PerturbedHessian
from curvkit.operators.difference import DifferenceHessian
from curvkit.operators.forecast import Forecast
from curvkit.operators.ggn import GGN
from curvkit.operators.hessian import Hessian
from curvkit.operators.mixed import MixedHessian
from curvkit.operators.plan import Plan
from curvkit.operators.preconditioned import Preconditioned
from curvkit.operators.protocol import CurvatureOperator
from curvkit.operators.residual import Residual
from curvkit.operators.scaled import Scaled

__all__ = [
    "GGN",
    "CurvatureOperator",
    "DifferenceHessian",
    "DoubleGGN",
    "DoubleHessian",
    "Forecast",
    "Hessian",
    "MixedHessian",
    "PerturbedHessian",
    "Plan",
    "Preconditioned",
    "Residual",
    "Scaled",
]
