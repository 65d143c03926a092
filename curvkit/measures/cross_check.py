"""The same measurement by PyHessian: a number from code that is not ours, beside ours."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from curvkit.errors import CurvkitError, InvalidArgument, MissingExtra
from curvkit.linalg import student
from curvkit.linalg.basis import norm
from curvkit.measures.cross_check_operator import Theirs, on_a_copy
from curvkit.measures.cross_check_result import CrossCheck
from curvkit.measures.cross_check_weighting import weighting
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.trace_result import Trace
from curvkit.objectives import Objective
from curvkit.objectives.surroundings import random_state

SEED = 0
"""PyHessian draws from the global generator; it is given this seed, and put back."""
TOLERANCE, MOST = 1e-3, 100
"""PyHessian's defaults: change of successive values at which it stops, and most iterations for each."""
EPSILONS = 8
"""A product may err by so many machine epsilons of ||H||, where no larger error was seen."""
STOPPING = "it stops when two successive values differ by less than 0.001 of themselves, or after 100 products, whatever the residual"
MAGNITUDE = "it searches for the largest magnitude, not the largest algebraic value; on an indefinite Hessian compare with 'magnitude'"
SAMPLING = "it stops when a probe changes the running mean by less than 0.001 of itself, a negative mean at once, whatever their spread"


def refuse_uncheckable(objective: Objective, which: str = "magnitude") -> None:
    """Say before a measurement whether it could be cross-checked after it.

    Args:
        objective: What is to be measured.
        which: Which eigenvalues; of no account for a trace.

    Raises:
        MissingExtra: If PyHessian is not installed.
        InvalidArgument: If parameters are left out by patterns, or `which` is an end that PyHessian does not search.
        UnknownObjective: If loss or batches are not of the form that it takes.
        UnsupportedModel: If it would measure another function, or stop with an error.
    """
    _package()
    weighting(objective, which)


def check_against_pyhessian(
    objective: Objective,
    result: Sharpness | Trace,
    *,
    seed: int = SEED,
    on_product: Callable[[int], None] | None = None,
) -> CrossCheck:
    """Measure the same with PyHessian, at its default settings, and compare.

    PyHessian runs on a copy of the model, on math attention and in full float32. Where its number lies outside our interval, its
    *product* decides whether that was to be expected: weighted over loss terms it has to leave, at our eigenvectors v,

        ||H v - lambda v||  <=  our residual + the rounding of two products,

    and for a trace its probes, so weighted, have to surround our value by twice the half-width that they leave.

    Args:
        objective: What was measured.
        result: The complete result.
        seed: Of PyHessian's draws.
        on_product: Called after each of its products with their number.

    Returns:
        Both numbers, with the reasons for a difference.

    Raises:
        MissingExtra: If PyHessian is not installed.
        InvalidArgument: If the result is partial, parameters are left out by patterns, or PyHessian does not search that end.
        UnknownObjective: If loss or batches are not of the form that it takes.
        UnsupportedModel: If it would measure another function.
        CurvkitError: If PyHessian fails.

    Cost: that of PyHessian; for eigenvalues one product each on top, for a trace as much again if it weights the batches in another way.
    """
    package = _package()
    if result.stage != "complete":
        raise InvalidArgument(
            f"cross-check: the result is partial (stage={result.stage!r}). Pass the last one of the steps, whose stage is 'complete'."
        )
    shares = weighting(objective, result.eigenpairs.which if isinstance(result, Sharpness) else "magnitude")
    with on_a_copy(package, objective, shares, on_product) as theirs, random_state():
        torch.manual_seed(seed)
        if isinstance(result, Sharpness):
            return _of_eigenvalues(theirs, result, seed)
        return _of_trace(theirs, result, seed)


def _of_eigenvalues(theirs: Theirs, result: Sharpness, seed: int) -> CrossCheck:
    pairs, began = result.eigenpairs, time.perf_counter()
    found, _ = theirs.operator.eigenvalues(maxIter=MOST, tol=TOLERANCE, top_n=len(pairs.values))
    seconds = theirs.seconds_to_build + time.perf_counter() - began
    values = sorted(map(float, _finite(found)), reverse=True)
    eps = torch.finfo(theirs.objective.dtype).eps
    rounding = 2 * max(pairs.product_error, EPSILONS * eps) * pairs.scale
    vectors = () if pairs.vectors is None else pairs.vectors.to(theirs.objective.device, theirs.objective.dtype).T
    residuals = [norm(theirs.product(v) - value * v) for v, value in zip(vectors, pairs.values.tolist(), strict=True)]
    allowed = (pairs.residuals + pairs.rounding + rounding).tolist()
    confirmed = all(residual <= limit for residual, limit in zip(residuals, allowed, strict=True))
    intervals = tuple((low, high) for low, high in pairs.intervals.tolist())
    differs, largest = theirs.shares.differs, pairs.which == "largest"
    beyond = max(values) if largest else max(map(abs, values))
    top = intervals[0][1] if largest else max(abs(end) for interval in intervals for end in interval)
    reasons: list[str] = [str(theirs.shares)] if differs else []
    if (
        not differs and beyond <= top + rounding
    ):  # a Rayleigh quotient above the largest eigenvalue has no innocent reason
        reasons += [MAGNITUDE] if largest and min(values) < 0.0 else []
        reasons += [STOPPING] if not reasons or 0.0 <= max(values) < intervals[0][0] else []
    return CrossCheck(
        quantity="eigenvalues",
        package=_name(),
        ours=tuple(pairs.values.tolist()),
        intervals=intervals,
        theirs=tuple(values),
        stderr=None,
        rounding=rounding,
        products=theirs.products,
        seconds=seconds,
        seed=seed,
        expected=(STOPPING, *([MAGNITUDE] if largest else []), *([str(theirs.shares)] if differs else [])),
        confirmed=confirmed,
        confirmation=f"Its product, weighted as here, {'confirms' if confirmed else 'does not confirm'} our eigenvectors: "
        f"largest residual {max(residuals):.1e}, {max(allowed):.1e} allowed",
        reasons=tuple(reasons),
    )


def _of_trace(theirs: Theirs, result: Trace, seed: int) -> CrossCheck:
    ours, began = result.estimate, time.perf_counter()
    mean, stderr, probes = _sampled(theirs)
    seconds, products = theirs.seconds_to_build + time.perf_counter() - began, theirs.products
    here, doubt, number = mean, stderr, probes
    if theirs.shares.differs:
        theirs.as_here = True
        with random_state():
            torch.manual_seed(seed)
            here, doubt, number = _sampled(theirs)
    rounding = EPSILONS * torch.finfo(theirs.objective.dtype).eps * abs(ours.value)
    allowed = ours.half_width + 2 * (math.inf if number < 2 else student.half_width(doubt, number)) + rounding
    confirmed = abs(here - ours.value) <= allowed
    spread = f"its {probes} probes leave a standard error of {stderr:.2g}, at which its stopping rule does not look"
    weighted = (str(theirs.shares),) if theirs.shares.differs else ()
    told = f"Weighted as here, its {number} probes have the mean {here:.6g} ± {doubt:.2g}: " if weighted else ""
    told += f"By the spread of its probes the two numbers {'can' if confirmed else 'cannot'} be of one matrix"
    return CrossCheck(
        quantity="trace",
        package=_name(),
        ours=(ours.value,),
        intervals=((ours.low, ours.high),),
        theirs=(mean,),
        stderr=stderr,
        rounding=rounding,
        products=products,
        seconds=seconds,
        seed=seed,
        expected=(SAMPLING, *weighted),
        confirmed=confirmed,
        confirmation=told,
        reasons=(*weighted, spread),
    )


def _sampled(theirs: Theirs) -> tuple[float, float, int]:
    """Mean of its probes, standard error, number."""
    found = _finite(theirs.operator.trace(maxIter=MOST, tol=TOLERANCE))
    m = len(found)
    return statistics.fmean(found), statistics.stdev(found) / m**0.5 if m > 1 else math.nan, m


def _finite(values: list[float]) -> list[float]:
    if not all(map(math.isfinite, values)):
        raise CurvkitError(
            "cross-check: PyHessian gave a number that is not finite. The result itself does not depend on it; leave out the cross-check."
        )
    return values


def _package() -> Any:
    """PyHessian's module, which the package hides behind a class of the same name; or a `MissingExtra`."""
    try:
        return importlib.import_module("pyhessian.hessian")
    except ImportError as error:
        raise MissingExtra(
            "cross-check: the package pyhessian is not installed. Install it with: pip install 'curvkit[pyhessian]'"
        ) from error


def _name() -> str:
    return f"PyHessian {importlib.metadata.version('pyhessian')}"
