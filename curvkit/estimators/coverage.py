"""Which parameters have a rule for the gradients of single examples that holds, as numbers show."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import CurvkitError, UnsupportedModel
from curvkit.estimators.recording import Recording, grouped
from curvkit.losses.batches import rows, take_rows, tensors
from curvkit.objectives import Objective
from curvkit.operators.independence import rows_are_independent

AGREES = 1e4
"""Gradients of an example from the rules and from torch.autograd may differ by so many eps of the largest entry of all."""
EXAMPLES = 2
"""That are compared, taken alone and together."""


@dataclass(frozen=True)
class Coverage:
    """What the rules may be used for."""

    ruled: tuple[str, ...]
    """Parameters whose rules hold."""
    refused: dict[str, str]
    """The others, with the reason."""


def coverage(objective: Objective) -> Coverage:
    """Hold the rules against torch.autograd, on two examples of a batch taken alone and together, for batches of every shape.

    A parameter is refused that enters a call without a rule; and one whose gradient of an example, by the rules and with the whole batch
    run, is not that of the example run alone: where examples lie elsewhere than the shapes suggest, or are coupled.

    Args:
        objective: The function; its loss is a sum over examples.

    Returns:
        Which parameters are covered.

    Raises:
        UnsupportedModel: If the examples of a batch are coupled, or not to be told apart.
        CurvkitError: If the gradient is not finite.

    Cost: for each shape of batches one pass without gradients of the parameters, and two gradients of one example.
    """
    refuse_coupled(objective)
    refused: dict[str, str] = {}
    shapes: dict[tuple[Any, ...], int] = {}
    for index, batch in enumerate(objective.batches):
        shapes.setdefault(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors(batch)), index)
    for index in shapes.values():
        refused |= _refused(objective, index)
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
            raise UnsupportedModel(
                f"{estimator}: one batch uses {name} in another way than the first of its shape ({refused[name]}): the model takes another "
                "path for some data. Leave the parameter out by patterns, or use Hutchinson."
            )


def _refused(objective: Objective, index: int) -> dict[str, str]:
    """The parameters whose rules do not hold on a batch, with the reason."""
    batch, space = objective.batches[index], objective.parameters
    count = rows(batch) or 0
    parameters: Any = dict(zip(space.names, objective.tensors, strict=True))
    first = slice(0, min(EXAMPLES, count))
    with objective.measuring():
        with Recording(parameters, count) as recording:
            outputs, targets = objective.outputs(index)
        total = objective.terms_of(outputs, targets).total
        found = grouped(recording.uses, _gradients(total, [use.output for use in recording.uses]))
        by_rules = {
            name: sum((form.gradients(g, first) for form, g in uses), start=torch.zeros(()))
            for name, uses in found.items()
            if name not in recording.refused
        }
    alone = [_alone(objective, index, row) for row in range(first.stop)]
    largest = max((g.abs().max().item() for row in alone for g in row if g.numel()), default=0.0)
    limit, refused = AGREES * torch.finfo(objective.dtype).eps * largest, dict(recording.refused)
    for position, name in enumerate(space.names):
        truth = torch.stack([row[position] for row in alone])
        if name in refused or not truth.numel():
            continue
        difference = (by_rules.get(name, torch.zeros_like(truth)) - truth).abs().max().item()
        if not difference <= limit:
            by = f"by {difference / largest:.1e} of the largest"
            refused[name] = f"the rules give another gradient than torch.autograd ({by})"
    return refused


def _alone(objective: Objective, index: int, row: int) -> list[Tensor]:
    """The gradient of one example's share of the loss, by autograd."""
    one = objective.with_batches([take_rows(objective.batches[index], torch.tensor([row]))])
    with one.measuring():
        found = _gradients(one.terms(0).total, list(one.tensors))
        return [torch.zeros_like(p) if g is None else g for p, g in zip(one.tensors, found, strict=True)]


def refuse_coupled(objective: Objective) -> None:
    """Refuse what has no gradients of single examples.

    Args:
        objective: The function.

    Raises:
        UnsupportedModel: If the loss is not known to be a sum over rows, or rows are coupled.
        CurvkitError: If the gradient is not finite.

    Cost: some forward passes over the data, and gradients of a few rows.
    """
    if not objective.divisible:
        raise UnsupportedModel(
            f"per-example estimators: the loss {objective.loss.name} is not known to be a sum over the rows of a batch. Use one of torch's "
            "own losses, for example F.cross_entropy, or an estimator that needs no single examples: Hutchinson."
        )
    if any(rows(batch) is None for batch in objective.batches):
        raise UnsupportedModel(
            "per-example estimators: the tensors of a batch differ in dimension 0, so that its examples are not known. Put examples into "
            "dimension 0 of each tensor, or use Hutchinson."
        )
    large = [batch for batch in objective.batches if (rows(batch) or 0) > 1]
    if large and not rows_are_independent(objective, large):
        refuse_not_finite("per-example estimators", objective.parameters.unflatten(objective.gradient()))
        raise UnsupportedModel(
            "per-example estimators: the loss of a batch is not the sum of the losses of its rows, so that rows are no examples: something "
            "couples them (normalisation over the batch, time in dimension 0). Put examples into dimension 0, or use Hutchinson."
        )


def refuse_not_finite(estimator: str, found: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Args:
        estimator: For the message.
        found: Parameter-shaped.

    Raises:
        CurvkitError: Naming the parameter.
    """
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise CurvkitError(
                f"{estimator}: the gradient of {name} has NaN or infinite entries. Check weights and data for NaN, or compute in float64."
            )


def _gradients(total: Tensor, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not tensors or not total.requires_grad:
        return (None,) * len(tensors)
    return torch.autograd.grad(total, tensors, allow_unused=True)
