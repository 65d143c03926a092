"""Linear algebra on a matrix that is seen through its products alone; nothing here knows a model."""

from curvkit.linalg import lanczos, trace
from curvkit.linalg.maps import DenseMap, FunctionMap, LinearMap

__all__ = ["DenseMap", "FunctionMap", "LinearMap", "lanczos", "trace"]
