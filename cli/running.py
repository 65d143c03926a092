"""A measurement from its objective to its exit code: gone on with or begun, followed, compared, shown, written, judged."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from . import cross_checking, keeping, measuring, records, render
from .cross_checking import Outcome
from .data import Data
from .interrupts import INTERRUPTED, conclude
from .keeping import Place
from .output import Lasting
from .target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from curvkit.measures import Sharpness, SharpnessSettings, Trace, TraceSettings
    from curvkit.objectives import Objective
    from curvkit.results import Journal

Measured = TypeVar("Measured", bound="Sharpness | Trace")


@dataclass(frozen=True)
class Measurement(Generic[Measured]):
    """What one command measures, and how it shows that."""

    name: str
    settings: SharpnessSettings | TraceSettings
    seed: int | None
    cross_check: str | None
    which: str
    """Which eigenvalues another library would have to find; "magnitude" for a trace."""
    most: int
    """Products of that library at most."""
    steps: Callable[[Objective, Journal], Iterator[Measured]]
    told: Callable[[Measured], tuple[float, str]]
    read: Callable[[Mapping[str, Any]], Measured]
    """Reads a document that was written again."""
    beside: Callable[[Measured], tuple[str, dict[str, Tensor], dict[str, Any]] | None]
    """Name, tensors and plain values of the file that is written beside the document; None for none."""
    plain: Callable[[Measured, str], str]
    table: Callable[[Measured, str], None]
    judge: Callable[[Measured | None], int]
    wanted: Mapping[str, Any] = field(default_factory=dict)
    """What else was asked for that numbers depend on."""


def run(ctx: click.Context, target: Target, data: Data, output: Lasting, it: Measurement[Measured]) -> int:
    """Measure, and return the exit code."""
    there = keeping.place(output, it.name)
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        resolved = measuring.resolved_objective(ctx, target, data, output)
        cross_checking.refuse(it.cross_check, resolved.objective, it.which)
        about = records.run(ctx, target, resolved, _how(it)) if there is not None else {}
        earlier = keeping.finished(there, about, output, it.seed, it.read)
    name = measuring.title(target, resolved)
    if earlier is not None:
        result, document = earlier
        _show(result, document, output, it, name)
        return it.judge(result)
    with keeping.journal(there, about, output) as journal:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = _followed(resolved.objective, journal, target, output, it)
        latest, interrupted = outcome.latest, outcome.interrupted
        result = {"interrupted": interrupted} if latest is None else {**latest.to_dict(), "interrupted": interrupted}
        record = records.describe(ctx, target, resolved) | measuring.facts(latest) | ({"run": about} if about else {})
        failed = _beside(there, latest, record, it)
        document = render.json_document(it.name, result, record)
        _show(latest, document, output, it, name)
        if there is not None and latest is not None:
            try:
                if failed is not None:
                    raise failed
                records.write(there.document, document, output)
            except OSError as error:
                raise keeping.not_written(there, error, journal) from error
        if interrupted:
            ended = (
                "Interrupted." if latest is not None else "Interrupted before the first product: nothing is known yet."
            )
            conclude(ended + keeping.how_to_go_on(ctx.obj or (), journal))
            return INTERRUPTED
        keeping.discard(journal)
    if outcome.failure is not None:
        raise outcome.failure
    return it.judge(latest)


def _how(it: Measurement[Any]) -> dict[str, Any]:
    """What is measured, and with which options."""
    return {"measurement": it.name, "settings": it.settings, "cross_check": it.cross_check, **it.wanted}


def _followed(
    objective: Objective, journal: Journal, target: Target, output: Lasting, it: Measurement[Measured]
) -> Outcome[Measured]:
    """The measurement itself, and the other library after it."""
    followed = measuring.followed(it.steps(objective, journal), it.name, it.told, target=target, output=output)
    keeping.save(journal)
    outcome = cross_checking.compared(it.cross_check, objective, followed, it.most, output)
    return replace(outcome, latest=keeping.noted(outcome.latest, journal))


def _show(
    result: Measured | None, document: dict[str, Any], output: Lasting, it: Measurement[Measured], name: str
) -> None:
    measuring.show(
        result, document, output, plain=lambda found: it.plain(found, name), table=lambda found: it.table(found, name)
    )


def _beside(
    there: Place | None, latest: Measured | None, record: dict[str, Any], it: Measurement[Measured]
) -> OSError | None:
    """Write the tensors first, so that the document speaks of a file that is there; an error waits until the result is shown."""
    beside = None if there is None or latest is None else it.beside(latest)
    if there is None or beside is None:
        return None
    what, tensors, said = beside
    try:
        written = keeping.write_tensors(there.folder / f"{there.name}.{what}.safetensors", tensors, said)
    except OSError as error:
        return error
    record["files"] = {what: written}
    return None
