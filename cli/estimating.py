"""A diagonal from its objective to its exit code: foreseen or estimated, shown, written."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import advice, diagonal_rows, estimation, foreseen, measuring, records, render, render_diagonal, second_moments
from .data import Data
from .diagonal_result import Diagonal
from .estimation import Chosen, Estimation, Saving
from .failures import say
from .foreseen import Foreseen
from .interrupts import INTERRUPTED, conclude
from .records import STATE_WANTED
from .target import Target
from .waiting import expecting

if TYPE_CHECKING:
    from curvkit.objectives import Objective
    from curvkit.operators.preflight import Preflight
    from curvkit.resolving import Resolved
    from curvkit.results import Definition
    from curvkit.results.diagonal_estimate import DiagonalEstimate

UNMEASURED = ("second_moment",)
"""What neither the loss nor the data has a part in."""
SECOND_DERIVATIVES = ("hessian", "hessian_top")
"""Matrices whose estimators differentiate twice."""


@dataclass(frozen=True)
class Command:
    """What was typed, beside the target."""

    data: Data
    estimation: Estimation
    output: Saving
    by: str


def run(ctx: click.Context, target: Target, it: Command) -> int:
    """Estimate, and return the exit code."""
    chosen = estimation.choose(it.estimation, target)
    path = estimation.destination(it.output, target, plan=it.estimation.plan)
    with contextlib.redirect_stdout(sys.stderr), advice.typed():  # what the user's code prints is no result
        ctx.meta[STATE_WANTED] = second_moments.are_read(chosen)
        resolved = _resolved(ctx, target, chosen, it)
        chosen = second_moments.found(ctx, chosen, resolved.objective)
        plan = Foreseen.of(chosen, resolved.objective) if it.estimation.plan else None
        shown = None if plan is not None else _measured(ctx, target, resolved, chosen, it)
    title, record = measuring.title(target, resolved), records.describe(ctx, target, resolved)
    if plan is not None:
        foreseen.show(plan, f"plan of {ctx.info_name} for {title}", record, it.output)
        return 0
    if shown is None:
        _show(None, render.json_document("diagonal", {"interrupted": True}, record), title, it)
        conclude("Interrupted: an estimate is known at its end alone, so that nothing is kept.")
        return INTERRUPTED
    record |= _facts(shown, chosen)
    failed = _written(path, shown.estimate, record)
    document = render.json_document("diagonal", {**shown.to_dict(), "interrupted": False}, record)
    _show(shown, document, title, it)
    if failed is not None:
        raise failed
    if path is not None and not it.output.quiet:
        say(f"wrote {path}")
    return 0


def _measured(ctx: click.Context, target: Target, resolved: Resolved, chosen: Chosen, it: Command) -> Diagonal | None:
    """The estimate, with what must stand beside it; None if Ctrl-C came before its end."""
    try:
        with measuring.pointing_to_mode(target):
            checked = _preflight(resolved.objective, chosen, it.estimation)
            found = _estimate(resolved.objective, chosen, it)
        return _diagonal(resolved.objective, found, checked, chosen)
    except KeyboardInterrupt:
        return None


def _show(shown: Diagonal | None, document: dict[str, Any], title: str, it: Command) -> None:
    measuring.show(
        shown,
        document,
        it.output.shown,
        plain=lambda result: render_diagonal.plain(result, title, it.by),
        table=lambda result: render_diagonal.table(result, title, it.by, it.output.color),
    )


def _resolved(ctx: click.Context, target: Target, chosen: Chosen, it: Command) -> Resolved:
    """The objective; where its function refuses an argument, with what the estimator would take."""
    from curvkit.errors import InvalidArgument

    try:
        return measuring.resolved_objective(ctx, replace(target, set=chosen.arguments), it.data, it.output.shown)
    except InvalidArgument as error:
        if any(str(error).startswith(f"--set {key}=") for key, _ in chosen.arguments):
            raise InvalidArgument(f"{error} The estimator {chosen.name} takes {chosen.takes}.") from error
        raise


def _preflight(objective: Objective, chosen: Chosen, it: Estimation) -> Preflight | None:
    """Refuse wrong second derivatives where the estimator uses them."""
    from curvkit.operators.preflight import preflight, refuse_wrong

    if not it.preflight or not _differentiates_twice(chosen):
        return None
    found = preflight(objective)
    refuse_wrong(found)
    return found


def _differentiates_twice(chosen: Chosen) -> bool:
    return getattr(chosen.estimator, "matrix", None) in SECOND_DERIVATIVES


def _estimate(objective: Objective, chosen: Chosen, it: Command) -> DiagonalEstimate:
    """The estimate, under a progress line."""
    seconds, work = None, f"by {chosen.name}"
    if not it.output.quiet:
        expected = foreseen.expected(chosen, objective)
        if expected is not None and expected.gradients:
            seconds = expected.gradients * foreseen.gradient_seconds(objective)
            work += f", {expected.gradients:.3g} gradients"
    with expecting("diagonal", work, seconds, it.output.shown):
        found = chosen.estimator.estimate(objective, seed=it.estimation.seed)
    _refuse_misfit(found, objective, chosen)
    return found


def _refuse_misfit(found: Any, objective: Objective, chosen: Chosen) -> None:
    """Refuse what an estimator of another package returns that is no diagonal of this function."""
    from curvkit.errors import CurvkitError
    from curvkit.results.diagonal_estimate import DiagonalEstimate

    shapes = {entry.name: tuple(entry.shape) for entry in objective.parameters.entries}
    if not isinstance(found, DiagonalEstimate):
        what = f"a {type(found).__name__}"
    elif {name: tuple(value.shape) for name, value in found.values.items()} != shapes:
        what = "other names or shapes than those of the parameters"
    else:
        return
    raise CurvkitError(
        f"the estimator {chosen.name} returned {what}; it must return a DiagonalEstimate, parameter-shaped. Its authors find what is wrong "
        "with curvkit.testing.check_estimator."
    )


def _diagonal(objective: Objective, found: DiagonalEstimate, checked: Preflight | None, chosen: Chosen) -> Diagonal:
    """The estimate, with what must stand beside it."""
    from curvkit.measures.definitions import doubts
    from curvkit.measures.traces import unit

    measured = found.matrix not in UNMEASURED
    definition, loss = _definition(objective.raised(), found) if measured else (None, None)
    notes = (*objective.notes, *found.notes, *doubts(checked))
    rows = diagonal_rows.rows(found, objective.model)
    twice = _differentiates_twice(chosen)
    return Diagonal(
        found,
        rows,
        definition,
        unit(objective) if measured else None,
        loss,
        checked,
        twice,
        tuple(dict.fromkeys(notes)),
    )


def _definition(objective: Objective, found: DiagonalEstimate) -> tuple[Definition, float]:
    """Of which function it is, and the value of that; one pass over the data."""
    from curvkit.operators.attention import AttentionSeen
    from curvkit.results import Definition

    with objective.measuring(), AttentionSeen() as attention:
        terms = [_terms(objective, index) for index in range(len(objective.batches))]
    counts = [count for *_, count in terms if count is not None]
    known = len(counts) == len(terms)
    definition = Definition(
        matrix=found.matrix,
        loss=objective.loss.name,
        reduction="mean" if known and objective.loss.reduction == "as returned" else objective.loss.reduction,
        terms=sum(counts) if known else None,
        examples=objective.examples,
        batches=len(objective.batches),
        parameters=objective.parameters.n,
        mode=objective.mode,
        dtype=str(objective.dtype).removeprefix("torch."),
        attention="math" if attention.found else None,
    )
    return definition, math.fsum(total for total, *_ in terms) / objective.denominator(
        [weight for _, weight, _ in terms]
    )


def _terms(objective: Objective, index: int) -> tuple[float, float, int | None]:
    """Sum, weight and number of the terms of a batch; its graph is let go."""
    found = objective.terms(index)
    return found.total.item(), found.weight, found.count


def _facts(shown: Diagonal, chosen: Chosen) -> dict[str, Any]:
    """What the record says of the run itself."""
    from curvkit.results import plain

    found = shown.estimate
    return {
        "estimator": {"name": chosen.name, "options": found.estimator, "matrix": found.matrix},
        "definition": plain(shown.definition),
        "seed": found.seed,
        "seconds": found.cost.seconds,
    }


def _written(path: Path | None, found: DiagonalEstimate, record: dict[str, Any]) -> Exception | None:
    """Write the file of -o; an error waits until the result is shown."""
    from safetensors import SafetensorError

    from curvkit.errors import CurvkitError
    from curvkit.results.files import sha256

    if path is None:
        return None
    try:
        found.save(path, record=record)
        record["files"] = {"diagonal": {"name": path.name, "sha256": sha256(path)}}
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        return CurvkitError(f"{path} cannot be written ({reason}). Keep what was shown, or estimate again elsewhere.")
    return None
