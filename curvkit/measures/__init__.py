"""What people want to know of a minimum."""

from curvkit.measures.data_doubt import Halves, Spread
from curvkit.measures.eigenvalues import Sharpness, SharpnessSettings, sharpness, sharpness_steps

__all__ = ["Halves", "Sharpness", "SharpnessSettings", "Spread", "sharpness", "sharpness_steps"]
