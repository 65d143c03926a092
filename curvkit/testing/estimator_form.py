"""The form that every estimate of a diagonal has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from curvkit.estimators import DiagonalEstimator
from curvkit.objectives import Objective
from curvkit.results.diagonal_estimate import DiagonalEstimate
from curvkit.testing.contract import CHECK_ESTIMATOR as CONTRACT

WORD = re.compile(r"[a-z][a-z0-9_]*")
FREE = "second_moment"
"""The matrix that nothing is computed for."""


def estimated(estimator: DiagonalEstimator, objective: Objective, seed: int | None) -> DiagonalEstimate:
    """An estimate, with the checks that hold for each.

    Args:
        estimator: That is checked.
        objective: The function.
        seed: Of the estimate.

    Returns:
        The estimate.
    """
    found = estimator.estimate(objective, seed=seed)
    check_form(estimator, found, objective)
    return found


def check_form(estimator: DiagonalEstimator, found: DiagonalEstimate, objective: Objective) -> None:
    """Check names, shapes, dtypes, devices, words and cost.

    Args:
        estimator: That made it.
        found: The estimate.
        objective: The function.

    Raises:
        InvalidArgument: If it is not of the form that is asked for.
    """
    if not isinstance(found, DiagonalEstimate):
        CONTRACT.refuse("an estimate", f"estimate returned a {type(found).__name__}", "a DiagonalEstimate")
    _check_tensors("values", found.values, objective)
    for name, value in found.values.items():
        if not bool(torch.isfinite(value).all()):
            CONTRACT.refuse(
                "finite", f"the value of {name!r} has NaN or infinite entries", "finite numbers, or an error"
            )
    if found.stderr is not None:
        _check_tensors("stderr", found.stderr, objective)
        for name, error in found.stderr.items():
            if bool((error < 0).any()) or bool(torch.isinf(error).any()):
                CONTRACT.refuse(
                    "standard errors", f"that of {name!r} has negative or infinite entries", "at least 0, or NaN"
                )
    _check_words(estimator, found)


def _check_tensors(what: str, named: Mapping[str, Tensor], objective: Objective) -> None:
    space, dtype = objective.parameters, objective.raised().dtype
    if tuple(named) != space.names:
        CONTRACT.refuse(f"{what} by name", f"they are {_listed(named)}", _listed(space.names))
    for entry in space.entries:
        value = named[entry.name]
        for property_, got, allowed in (
            ("shape", list(value.shape), list(entry.shape)),
            ("dtype", value.dtype, dtype),
            ("device", value.device, objective.device),
            ("requires_grad", value.requires_grad, False),
        ):
            if got != allowed:
                CONTRACT.refuse(
                    f"{what} have shape, dtype and device",
                    f"{entry.name!r} has {property_} {got}",
                    f"{property_} {allowed}",
                )


def _check_words(estimator: Any, found: DiagonalEstimate) -> None:
    if not isinstance(found.matrix, str) or not WORD.fullmatch(found.matrix):
        CONTRACT.refuse("the matrix is named", f"matrix is {found.matrix!r}", "a word of small letters, digits and _")
    said = getattr(estimator, "matrix", found.matrix)
    if said != found.matrix:
        CONTRACT.refuse(
            "the matrix is named", f"the estimate says {found.matrix!r}, its estimator {said!r}", "the same"
        )
    if found.estimator != repr(estimator):
        CONTRACT.refuse("the estimator is named", f"estimator is {found.estimator!r}", repr(repr(estimator)))
    cost = found.cost
    work = cost.gradients > 0.0 or (cost.gradients == 0.0 and found.matrix == FREE)
    if not (work and math.isfinite(cost.gradients) and 0.0 < cost.seconds < math.inf and cost.products >= 0):
        CONTRACT.refuse("the cost is positive", f"it is {cost}", "gradients and seconds above 0")
    if cost.peak_bytes is not None and cost.peak_bytes <= 0:
        CONTRACT.refuse("the cost is positive", f"peak_bytes is {cost.peak_bytes}", "above 0, or None")


def _listed(names: Any, most: int = 4) -> str:
    listed = [*map(repr, names)]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
