"""Frozen results that carry their doubt, and the record that goes with them."""

from curvkit.results.definition import Definition
from curvkit.results.eigenpairs import Eigenpairs
from curvkit.results.journal import Journal
from curvkit.results.manifest import differences
from curvkit.results.record import environment, peak_memory, plain, repository, to_json, without_folders
from curvkit.results.state_folder import StateFolder
from curvkit.results.trace_estimate import ProductCheck, TraceEstimate, TraceParts

__all__ = [
    "Definition",
    "Eigenpairs",
    "Journal",
    "ProductCheck",
    "StateFolder",
    "TraceEstimate",
    "TraceParts",
    "differences",
    "environment",
    "peak_memory",
    "plain",
    "repository",
    "to_json",
    "without_folders",
]
