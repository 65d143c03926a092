"""The contracts as checks that anyone can run on a class of their own.

A check returns nothing, or raises an `InvalidArgument` that names the property that fails, what was found and what is allowed.
"""

from curvkit.testing.estimator_contract import check_estimator
from curvkit.testing.operator_contract import check_operator
from curvkit.testing.projection_contract import check_projection

__all__ = ["check_estimator", "check_operator", "check_projection"]
