"""What people want to know of a minimum."""

from curvkit.measures.adaptive import adaptive_sharpness, adaptive_sharpness_steps
from curvkit.measures.adaptive_result import AdaptiveSharpness
from curvkit.measures.companions import Companions
from curvkit.measures.compared import Difference, Measured, Overlap
from curvkit.measures.comparison import compare, compare_steps
from curvkit.measures.comparison_result import Comparison
from curvkit.measures.comparison_stages import ComparisonSettings
from curvkit.measures.cross_check import check_against_pyhessian, refuse_uncheckable
from curvkit.measures.cross_check_result import CrossCheck
from curvkit.measures.data_doubt import Halves, Spread
from curvkit.measures.eigenvalues import SharpnessSettings, sharpness, sharpness_steps
from curvkit.measures.forecasts import forecast_sharpness, forecast_trace
from curvkit.measures.frozen_state import NoLimit
from curvkit.measures.invariances import ScaleInvariance, scale_invariance
from curvkit.measures.paired import Contributions, Gap
from curvkit.measures.probed_trace import ProbedTrace
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.stabilities import stability, stability_steps
from curvkit.measures.stability_result import RateRatio, Stability
from curvkit.measures.trace_result import Trace, TraceShare
from curvkit.measures.traces import TraceSettings, trace, trace_steps
from curvkit.measures.updates import Update
from curvkit.measures.verdicts import Verdict

__all__ = [
    "AdaptiveSharpness",
    "Companions",
    "Comparison",
    "ComparisonSettings",
    "Contributions",
    "CrossCheck",
    "Difference",
    "Gap",
    "Halves",
    "Measured",
    "NoLimit",
    "Overlap",
    "ProbedTrace",
    "RateRatio",
    "ScaleInvariance",
    "Sharpness",
    "SharpnessSettings",
    "Spread",
    "Stability",
    "Trace",
    "TraceSettings",
    "TraceShare",
    "Update",
    "Verdict",
    "adaptive_sharpness",
    "adaptive_sharpness_steps",
    "check_against_pyhessian",
    "compare",
    "compare_steps",
    "forecast_sharpness",
    "forecast_trace",
    "refuse_uncheckable",
    "scale_invariance",
    "sharpness",
    "sharpness_steps",
    "stability",
    "stability_steps",
    "trace",
    "trace_steps",
]
