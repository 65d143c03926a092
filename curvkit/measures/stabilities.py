"""How close an optimizer is to its limit of stability, at a checkpoint, from the state that it was saved with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from curvkit.checkpoints.learning_rates import Rate
from curvkit.checkpoints.optimizer_state import OptimizerState, Unassigned
from curvkit.errors import InvalidArgument
from curvkit.measures.definitions import definition, doubts
from curvkit.measures.eigenvalues import SharpnessSettings
from curvkit.measures.frozen_state import NoLimit
from curvkit.measures.invariances import has_fixed_statistics
from curvkit.measures.limit_verdict import IDLE, verdict
from curvkit.measures.rate_ratios import at_rate, ratio_of, reference_rate
from curvkit.measures.remembering import kept_around, settled_seed
from curvkit.measures.scaled_search import largest_between
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.stability_result import Stability
from curvkit.measures.state_evidence import confirm
from curvkit.measures.updates import Update
from curvkit.objectives import Objective
from curvkit.operators import CurvatureOperator
from curvkit.results import Eigenpairs
from curvkit.results.journal import NOTHING_KEPT, Journal

FIXED_STATISTICS = (
    "BatchNorm is measured with fixed statistics and was trained with those of the batch, which is another function: parameters before it "
    "that had no gradient there have curvature here"
)
CONFIRMED = "that order was tested: the moments fit the gradients on this data"


def stability_steps(
    objective: Objective,
    state: OptimizerState | Unassigned,
    settings: SharpnessSettings | None = None,
    *,
    seed: int | None = None,
    lr: float | None = None,
    known: Sharpness | None = None,
    journal: Journal = NOTHING_KEPT,
) -> Iterator[Stability]:
    """Measure stability step by step: one partial result after each product, so that a caller can show progress and stop.

    Args:
        objective: The function.
        state: Of the optimizer, at these weights. One whose order is not certain is tested on the data first, see `confirm`.
        settings: Tolerance, budget and engine, as for sharpness; searched is one eigenvalue, in the precision of the model.
        seed: Of the random part of the start vector; None draws one and records it.
        lr: What if: all learning rates multiplied so that the largest is this; None takes those of the state.
        known: A sharpness of the same objective. For plain SGD with one rule for all parameters nothing more is searched.
        journal: Where products are kept, and recalled from if the run is gone on with.

    Yields:
        Partial results, and last the complete one; a single one where there is no limit.

    Raises:
        InvalidArgument: If a setting or `lr` does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.
    """
    settings, began = settings or SharpnessSettings(), journal.clock()
    if lr is not None and not (math.isfinite(lr) and lr > 0.0):
        raise InvalidArgument(
            f"stability: lr={lr!r} must be positive and finite. Pass the largest learning rate of the groups, or None."
        )
    if isinstance(state, Unassigned):
        yield Stability("unknown", state.reason)
        return
    refuted = confirm(state, objective)
    if refuted is not None:
        yield Stability(state.name, refuted, seconds=journal.clock() - began)
        return
    rates, reference = reference_rate(state, lr)
    frozen, moved = at_rate(state, reference)
    dtype = torch.promote_types(objective.dtype, torch.float32 if settings.rule == "reverse" else torch.float64)
    update = Update.of(frozen, objective.parameters, reference.values, dtype=dtype, device=objective.device)
    if isinstance(update, NoLimit):
        yield Stability(state.name, update.reason, seconds=journal.clock() - began)
        return
    said = (*moved, *update.notes) if state.certain else (*moved, *update.notes, CONFIRMED)
    found = Stability(state.name, None, "searching", update, reference=reference.label, notes=said)
    if update.constant and known is not None and _has_largest(known.eigenpairs):
        found = replace(found, definition=known.definition, seed=known.seed)
        folded = _folded(known.eigenpairs, update)
        found = replace(found, eigenpairs=folded, seconds=journal.clock() - began)
        yield _of_training(_complete(found, state, rates), objective)
        return
    seed = settled_seed(journal, seed)
    preflight = None if known is not None else settings.checked(objective)
    operator = settings.operator(objective, journal)
    start = operator.gradient
    if isinstance(update.steps, torch.Tensor):
        start = start * update.steps.sqrt()
    notes = (*objective.notes, *said, *doubts(preflight))
    found = replace(found, definition=definition(operator), seed=seed, notes=notes)
    for pairs in largest_between(
        operator,
        kept_around(_alone if update.constant else update.operator, journal, "stability"),
        settings,
        measure="stability",
        start=start,
        seed=seed,
    ):
        folded = _folded(pairs, update) if update.constant else pairs
        found = replace(found, eigenpairs=folded, products=pairs.products, seconds=journal.clock() - began)
        yield found
    found = replace(found, notes=(*notes, *operator.notes), seconds=journal.clock() - began)
    yield _of_training(_complete(found, state, rates), objective)


def stability(
    objective: Objective,
    state: OptimizerState | Unassigned,
    *,
    seed: int | None = None,
    lr: float | None = None,
    known: Sharpness | None = None,
    settings: SharpnessSettings | None = None,
) -> Stability:
    """Compare the curvature that an optimizer sees with the limit at which its steps would become unstable.

        stable  <=>  lambda_max(F^1/2 (H + C) F^1/2 + W) < 2

    on a quadratic, with the state of the optimizer frozen: lambda_max(H) < 2 / lr for gradient descent, lambda_max(P^-1 H) < 38 / lr for
    Adam with beta1 = 0.9. It is a limit of full-batch training; for mini-batches it is a heuristic.

    Args:
        objective: The function.
        state: Of the optimizer, at these weights; `curvkit.checkpoints.optimizer_state` reads it.
        seed: Of the random part of the start vector; None draws one and records it.
        lr: What if: all learning rates multiplied so that the largest is this; None takes those of the state.
        known: A sharpness of the same objective. For plain SGD with one rule for all parameters nothing more is searched.
        settings: Tolerance, budget and engine, as for sharpness.

    Returns:
        Eigenvalue, limit, ratio and verdict, or the reason why there is none.

    Raises:
        InvalidArgument: If a setting or `lr` does not fit.
        UnsupportedModel: If the objective has no curvature that could be measured.
        UnknownObjective: If loss and data do not fit.
        CurvkitError: If loss or products are not finite, or memory does not suffice for the smallest parts.

    Cost: as `sharpness`, without its doubt from the data; nothing for SGD with one rule for all parameters if `known` is given.
    Source: Cohen et al. (2021), arXiv 2103.00065; Cohen et al. (2022), arXiv 2207.14484. Differs: see `Update`.

    Example:
        >>> import torch.nn.functional as F
        >>> from curvkit.checkpoints.learning_rates import Rate
        >>> from curvkit.checkpoints.optimizer_state import OptimizerState, ParameterState
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])    # H = 2 x x', lambda_max = 10
        >>> group = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
        >>> rates = (Rate("current", (0.1,), "lr of the groups"),)
        >>> state = OptimizerState("SGD", (group,), {"weight": ParameterState(0, {}, {})}, "by hand", True, rates)
        >>> result = stability(Objective(model, F.mse_loss, [(x, torch.zeros(1, 1))]), state, seed=0)
        >>> round(result.value, 3), result.limit, round(result.ratio, 3), result.verdict
        (10.0, 20.0, 0.5, 'below the full-batch limit')
    """
    *_, last = stability_steps(objective, state, settings, seed=seed, lr=lr, known=known)
    return last


def _alone(A: CurvatureOperator) -> CurvatureOperator:
    """Nothing around a matrix."""
    return A


def _has_largest(pairs: Eigenpairs) -> bool:
    return pairs.recomputed and pairs.which in ("largest", "both")


def _folded(pairs: Eigenpairs, update: Update) -> Eigenpairs:
    """The largest eigenpair of f (H + c) + w from that of H: the same vector, the value stretched and moved."""
    f, c, w = (float(part) for part in (update.steps, update.coupled, update.decay))

    def moved(value: float | None) -> float | None:
        return None if value is None else f * (value + c) + w

    return replace(
        pairs,
        values=f * (pairs.values[:1] + c) + w,
        residuals=f * pairs.residuals[:1],
        converged=pairs.converged[:1],
        vectors=None if pairs.vectors is None else pairs.vectors[:, :1],
        scale=f * (pairs.scale + abs(c)) + w,
        rounding=f * pairs.rounding,
        asymmetry=f * pairs.asymmetry,
        upper_bound=moved(pairs.upper_bound),
        lower_bound=moved(pairs.lower_bound),
        which="largest",
        asked=1,
    )


def _complete(result: Stability, state: OptimizerState, rates: Sequence[Rate]) -> Stability:
    """The last word: ratios of all rates, the mass on idle coordinates, the verdict."""
    result = replace(result, stage="complete", idle_mass=_idle_mass(result))
    reference = next(rate for rate in rates if rate.label == result.reference)
    result = replace(result, rates=tuple(ratio_of(rate, reference, result, state) for rate in rates))
    said, reason = _verdict(result, rates)
    return replace(result, verdict=said, reason=reason)


def _of_training(result: Stability, objective: Objective) -> Stability:
    """Without a verdict where the function that is measured is not the one that was trained."""
    if result.verdict is None or not has_fixed_statistics(objective.model):
        return result
    return replace(result, verdict=None, reason=FIXED_STATISTICS)


def _verdict(result: Stability, rates: Sequence[Rate]) -> tuple[str | None, str | None]:
    interval, mass = result.ratio_interval, result.idle_mass
    if interval is None:
        return None, "no eigenvalue was found"
    if mass is not None and mass > IDLE:
        return None, (
            f"{mass:.0%} of the leading eigenvector lie on coordinates whose second moment is next to nothing, as where there never was a "
            "gradient: what the optimizer would divide by there changes with its first step"
        )
    if result.reference not in ("current", "given"):
        current = max(next(rate for rate in rates if rate.label == "current").values)
        return (
            None,
            f"the learning rate is {current:.3g}, far below its highest; the figures are of its {_called(result.reference)}",
        )
    return verdict(interval, converged=result.converged)


def _idle_mass(result: Stability) -> float | None:
    """The share of ||u||^2 on idle coordinates, u being the eigenvector of the folded matrix."""
    if result.update is None or result.eigenpairs is None or result.eigenpairs.vectors is None:
        return None
    if result.update.idle is None:
        return 0.0
    u = result.eigenpairs.vectors[:, 0].double()
    return (u[result.update.idle].square().sum() / u.square().sum()).item()


def _called(label: str | None) -> str:
    return {"initial_lr": "initial value", "peak": "peak"}.get(label or "", str(label))
