"""Which parameters have a rule for the gradients of single examples that holds, as numbers show."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import CurvkitError, UnsupportedModel
from curvkit.estimators.recordings.probing import TWO_KINDS, of_two_kinds
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.scrutiny import Scrutiny, another_path
from curvkit.losses.batches import rows
from curvkit.objectives import Objective

PURPOSE = "cotangents of outputs"


@dataclass(frozen=True)
class Coverage:
    """What the rules may be used for."""

    ruled: tuple[str, ...]
    """Parameters whose rules hold."""
    refused: dict[str, str]
    """The others, with the reason."""


def coverage(objective: Objective) -> Coverage:
    """Look through the data once; see `Scrutiny`, which estimators that run the data anyway use alongside.

    Args:
        objective: The function; its loss is a sum over examples.

    Returns:
        Which parameters are covered.

    Raises:
        UnsupportedModel: If the examples of a batch are coupled, or not to be told apart.
        CurvkitError: If the gradient is not finite.

    Cost: a forward pass over the data, a second one over an eighth of it or more; for each shape of batches a backward pass without
        gradients of the parameters, and two gradients of one example.
    """
    scrutiny = Scrutiny(objective, "per-example estimators")
    parameters: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
    mixed: dict[str, str] = {}
    for index, batch in enumerate(objective.batches):
        with objective.measuring():
            with Recording(parameters, rows(batch) or 0) as recording:
                outputs, _ = objective.outputs(index)
            draw = seeds.generator(0, PURPOSE, index)
            s = torch.randn(outputs.shape, generator=draw, dtype=torch.float64).to(outputs)
            scrutiny.look(batch, recording, outputs, s)
            mixed |= dict.fromkeys(of_two_kinds(recording), TWO_KINDS)
    refused = scrutiny.refused | mixed
    return Coverage(tuple(name for name in objective.parameters.names if name not in refused), refused)


def refuse_uncovered(estimator: str, refused: Mapping[str, str], ruled: Collection[str]) -> None:
    """Refuse a batch that uses a parameter in another way than those that were looked at.

    Args:
        estimator: For the message.
        refused: Of the recording of this batch.
        ruled: Of the coverage.

    Raises:
        UnsupportedModel: Naming the parameter.
    """
    for name in refused:
        if name in ruled:
            raise UnsupportedModel(another_path(estimator, name, refused[name]))


def refuse_not_finite(estimator: str, found: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Args:
        estimator: For the message.
        found: Parameter-shaped.

    Raises:
        CurvkitError: Naming the parameter.
    """
    for name, value in found.items():
        if value.numel() and not all(math.isfinite(bound.item()) for bound in value.aminmax()):  # NaN is passed on
            raise CurvkitError(
                f"{estimator}: the gradient of {name} has NaN or infinite entries. Check weights and data for NaN, or compute in float64."
            )
