"""What people want to know of a minimum."""

from curvkit.measures.data_doubt import Halves, Spread
from curvkit.measures.eigenvalues import SharpnessSettings, sharpness, sharpness_steps
from curvkit.measures.sharpness_result import Sharpness

__all__ = ["Halves", "Sharpness", "SharpnessSettings", "Spread", "sharpness", "sharpness_steps"]
