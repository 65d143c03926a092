"""Curvature matrices of an objective, seen through their products."""

from curvkit.operators.double import DoubleHessian
from curvkit.operators.hessian import Hessian
from curvkit.operators.plan import Plan
from curvkit.operators.protocol import CurvatureOperator

__all__ = ["CurvatureOperator", "DoubleHessian", "Hessian", "Plan"]
