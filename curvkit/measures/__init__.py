"""What people want to know of a minimum."""

from curvkit.measures.cross_check import check_against_pyhessian, refuse_uncheckable
from curvkit.measures.cross_check_result import CrossCheck
from curvkit.measures.data_doubt import Halves, Spread
from curvkit.measures.eigenvalues import SharpnessSettings, sharpness, sharpness_steps
from curvkit.measures.forecasts import forecast_sharpness, forecast_trace
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.trace_result import Trace, TraceShare
from curvkit.measures.traces import TraceSettings, trace, trace_steps

__all__ = [
    "CrossCheck",
    "Halves",
    "Sharpness",
    "SharpnessSettings",
    "Spread",
    "Trace",
    "TraceSettings",
    "TraceShare",
    "check_against_pyhessian",
    "forecast_sharpness",
    "forecast_trace",
    "refuse_uncheckable",
    "sharpness",
    "sharpness_steps",
    "trace",
    "trace_steps",
]
