"""What people want to know of a minimum."""

from curvkit.measures.data_doubt import Halves, Spread
from curvkit.measures.eigenvalues import SharpnessSettings, sharpness, sharpness_steps
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.trace_result import Trace, TraceShare
from curvkit.measures.traces import TraceSettings, trace, trace_steps

__all__ = [
    "Halves",
    "Sharpness",
    "SharpnessSettings",
    "Spread",
    "Trace",
    "TraceSettings",
    "TraceShare",
    "sharpness",
    "sharpness_steps",
    "trace",
    "trace_steps",
]
