"""curvkit trace: how much curvature is there in all, and where?"""

from __future__ import annotations

import contextlib
import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .. import cross_checking, measuring, planning, records, render, render_trace
from ..budget import Sampling, sampling
from ..configured import ConfiguredCommand
from ..data import Data, data
from ..failures import say
from ..groups import option
from ..interrupts import INTERRUPTED, conclude
from ..measuring import NOT_CONVERGED
from ..output import Output, output
from ..progress import counted
from ..target import Target, target

if TYPE_CHECKING:
    from curvkit.measures import Trace, TraceSettings
    from curvkit.objectives import Objective
    from curvkit.operators import Forecast


@click.command(cls=ConfiguredCommand)
@target
@data
@sampling
@option(
    "--by",
    heading="Output",
    type=click.Choice(["layer", "param"]),
    default="layer",
    show_default=True,
    help="Rows of the table: layers, or parameter tensors.",
)
@output
@click.pass_context
def trace(ctx: click.Context, target: Target, by: str, data: Data, sampling: Sampling, output: Output) -> int:
    """Hessian trace of a CHECKPOINT, with its interval, by layer.

    A checkpoint is a file of torch.save or safetensors, or a directory of Hugging Face, PEFT or torch.distributed. Language models of
    Hugging Face and nanoGPT need --data alone, files of curvkit.save with a recipe nothing; for others `curvkit init` writes a function to
    fill in. Weights are read as data; nothing in the file is run.

    The trace is the sum of all eigenvalues. It is exact where that is cheap; else the 95 % interval holds it for the data at hand.
    """
    settings = _settings(sampling)
    if sampling.plan:
        return planning.planned(ctx, target, data, output, partial(_forecast, settings=settings))
    destination = records.destination(output, "trace.json")
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        from curvkit.measures import trace_steps

        resolved = measuring.resolved_objective(ctx, target, data, output)
        cross_checking.refuse(sampling.cross_check, resolved.objective)
        steps = trace_steps(resolved.objective, settings, seed=sampling.seed)
        told = partial(_told, most=sampling.max_products)
        followed = measuring.followed(steps, "trace", told, target=target, output=output)
        outcome = cross_checking.compared(sampling.cross_check, resolved.objective, followed, 100, output)
        latest, interrupted = outcome.latest, outcome.interrupted
    result = {"interrupted": interrupted} if latest is None else {**latest.to_dict(), "interrupted": interrupted}
    record = records.describe(ctx, target, resolved) | measuring.facts(latest)
    document = render.json_document("trace", result, record)
    name = measuring.title(target, resolved)
    measuring.show(
        latest,
        document,
        output,
        plain=partial(render_trace.plain, title=name, by=by),
        table=partial(render_trace.table, title=f"trace of {name}", by=by, color=output.color),
    )
    if destination is not None and latest is not None:
        records.write(destination, document, output)
    if interrupted:
        conclude(
            "Interrupted." if latest is not None else "Interrupted before the first product: nothing is known yet."
        )
        return INTERRUPTED
    if outcome.failure is not None:
        raise outcome.failure
    return _judge(latest, output)


def _settings(sampling: Sampling) -> TraceSettings:
    from curvkit.linalg import trace as linalg_trace
    from curvkit.measures import TraceSettings

    method: Any = sampling.method
    residency: Any = sampling.residency
    rule: Any = sampling.rule
    search = linalg_trace.Settings(
        method=method,
        tolerance=sampling.tolerance,
        absolute_tolerance=sampling.absolute_tolerance,
        rank=sampling.rank,
        max_products=sampling.max_products,
        max_seconds=sampling.max_time,
    )
    return TraceSettings(
        search, residency=residency, memory_bytes=sampling.memory, rule=rule, preflight=sampling.preflight
    )


def _forecast(objective: Objective, settings: TraceSettings) -> Forecast:
    from curvkit.measures import forecast_trace

    return forecast_trace(objective, settings)


def _told(result: Trace, most: int) -> tuple[float, str]:
    """Share of the work done: of the budget, or of the probes, whose number goes as one over the square of the half-width."""
    found, products = result.estimate, counted(result.products, "product")
    if result.stage == "complete":
        return 1.0, products
    spent = found.products / most
    if not math.isfinite(found.half_width):
        return min(spent, 0.98), products
    width = (found.allowed / found.half_width) ** 2 if found.half_width > 0 else 1.0
    return min(
        max(spent, min(width, found.probes / 30)), 0.98
    ), f"{products}, {found.value:.4g} ± {found.half_width:.2g}"


def _judge(result: Trace | None, output: Output) -> int:
    if result is not None and result.estimate.converged:
        return 0
    say(
        "Warning: not converged: the interval is wider than the tolerance. It holds as it is; for a narrower one raise --max-products or "
        "--max-time; where the trace is near zero set --absolute-tolerance."
    )
    return NOT_CONVERGED if output.strict else 0
