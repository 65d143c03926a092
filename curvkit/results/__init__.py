"""Frozen results that carry their doubt, and the record that goes with them."""

from curvkit.results.definition import Definition
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate, DiagonalSamples, LayerDiagonal
from curvkit.results.eigen_diagonal import EigenDiagonal
from curvkit.results.eigenpairs import Eigenpairs
from curvkit.results.journal import Journal
from curvkit.results.manifest import differences
from curvkit.results.record import environment, peak_memory, plain, repository, to_json, without_folders
from curvkit.results.state_folder import StateFolder
from curvkit.results.trace_estimate import ProductCheck, TraceEstimate, TraceParts

__all__ = [
    "Cost",
    "Definition",
    "DiagonalEstimate",
    "DiagonalSamples",
    "EigenDiagonal",
    "Eigenpairs",
    "Journal",
    "LayerDiagonal",
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
