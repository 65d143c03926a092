"""--plan: how a measurement would be made and what it would take, without making it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import click

from . import measuring, records, render
from .data import Data
from .interrupts import INTERRUPTED, conclude
from .output import Output
from .progress import counted, duration, styled
from .target import Target

if TYPE_CHECKING:
    from curvkit.objectives import Objective
    from curvkit.operators import Forecast

Make = Callable[["Objective"], "Forecast"]


def planned(ctx: click.Context, target: Target, data: Data, output: Output, make: Make) -> int:
    """Find the objective, forecast, show and write; the exit code."""
    destination = records.destination(output, "plan.json")
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        resolved = measuring.resolved_objective(ctx, target, data, output)
        steps = _once(make, resolved.objective)
        found, interrupted = measuring.followed(steps, "plan", _told, target=target, output=output)
    if found is None or interrupted:
        conclude("Interrupted before the plan was made.")
        return INTERRUPTED
    document = render.json_document("plan", found.to_dict(), records.describe(ctx, target, resolved))
    title = f"plan of {ctx.info_name} for {measuring.title(target, resolved)}"
    measuring.show(
        found, document, output, plain=partial(_plain, title=title), table=partial(_table, title=title, output=output)
    )
    if destination is not None:
        records.write(destination, document, output)
    return 0


def _once(make: Make, objective: Objective) -> Iterator[Forecast]:
    yield make(objective)


def _told(found: Forecast) -> tuple[float, str]:
    return 1.0, str(found.plan)


def lines(found: Forecast) -> list[tuple[str, str]]:
    """What is said, name by name."""
    plan = found.plan
    allowed = "" if plan.basis_rows is None else f", {plan.basis_rows:,} fit"
    return [
        ("engine", plan.rule),
        ("residency", f"{plan.residency}: {plan.reason}"),
        ("parts", f"{counted(plan.micro_batches, 'part')} per batch"),
        ("graphs", f"{_size(found.graph_bytes)} at a time"),
        ("basis", f"{_size(found.basis_bytes)}: {counted(found.basis_rows, 'vector')} of the parameters{allowed}"),
        ("copies", f"{_size(found.vector_bytes)}: other vectors of the parameters"),
        ("peak", f"about {_size(found.peak_bytes)}, an estimate, beside the model and the data"),
        ("budget", f"{_size(plan.budget_bytes)} for graphs"),
        ("free", f"{_size(found.free_bytes)} on {plan.device}"),
        ("time", f"about {duration(found.seconds)}, an estimate: {_origin(found)}"),
    ]


def _origin(found: Forecast) -> str:
    products = counted(found.products, "product")
    return f"{products} of {found.gradients_per_product:g} gradients, {found.gradient_seconds:.2g} s each, scaled from one of a few rows"


def _size(number: int) -> str:
    """Bytes in the unit that --memory takes."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"


def _plain(found: Forecast, title: str) -> str:
    return render.tab_separated([("plan", title), *lines(found)])


def _table(found: Forecast, title: str, output: Output) -> None:
    console = styled(output.color)
    console.print(title, style="bold", markup=False)
    render.print_remarks(console, lines(found))
