"""curvkit trace: how much curvature is there in all, and where?"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .. import planning, render_trace, running
from ..budget import HEADING, Sampling, sampling
from ..configured import ConfiguredCommand
from ..data import Data, data
from ..failures import say
from ..groups import option
from ..measuring import NOT_CONVERGED
from ..output import Lasting, Output, lasting
from ..progress import counted
from ..running import Measurement
from ..target import Target, target

if TYPE_CHECKING:
    from torch import Tensor

    from curvkit.measures import Trace, TraceSettings
    from curvkit.objectives import Objective
    from curvkit.operators import Forecast


@click.command(cls=ConfiguredCommand)
@target
@data
@sampling
@option(
    "--structure/--no-structure",
    heading=HEADING,
    default=True,
    show_default=True,
    help="Take the exact trace of a piecewise linear network from its structure, where that is shown and no dearer.",
)
@option(
    "--by",
    heading="Output",
    type=click.Choice(["layer", "param"]),
    default="layer",
    show_default=True,
    help="Rows of the table: layers, or parameter tensors.",
)
@lasting
@click.pass_context
def trace(
    ctx: click.Context, target: Target, by: str, data: Data, sampling: Sampling, structure: bool, lasting: Lasting
) -> int:
    """Hessian trace of a CHECKPOINT, with its interval, by layer.

    A checkpoint is a file of torch.save or safetensors, or a directory of Hugging Face, PEFT or torch.distributed. Language models of
    Hugging Face and nanoGPT need --data alone, files of curvkit.save with a recipe nothing; for others `curvkit init` writes a function to
    fill in. Weights are read as data; nothing in the file is run.

    The trace is the sum of all eigenvalues. It is exact where that is cheap; else the 95 % interval holds it for the data at hand.
    """
    settings = _settings(sampling, structure)
    if sampling.plan:
        return planning.planned(ctx, target, data, lasting, partial(_forecast, settings=settings))
    return running.run(ctx, target, data, lasting, _measurement(settings, sampling, by, lasting))


def _measurement(settings: TraceSettings, sampling: Sampling, by: str, output: Lasting) -> Measurement[Trace]:
    from curvkit.measures import trace_steps
    from curvkit.measures.restored import trace_of

    return Measurement(
        name="trace",
        settings=settings,
        seed=sampling.seed,
        cross_check=sampling.cross_check,
        which="magnitude",
        most=100,
        steps=lambda objective, journal: trace_steps(objective, settings, seed=sampling.seed, journal=journal),
        told=partial(_told, most=sampling.max_products),
        read=trace_of,
        beside=_samples,
        plain=lambda result, name: render_trace.plain(result, name, by),
        table=lambda result, name: render_trace.table(result, f"trace of {name}", by, output.color),
        judge=partial(_judge, output=output),
    )


def _samples(result: Trace) -> tuple[str, dict[str, Tensor], dict[str, Any]] | None:
    """What the probes gave, one per row, with the parameters that its columns belong to."""
    parts = result.estimate.parts
    if parts is None:
        return None
    said = {"names": [share.name for share in result.parameters], "coordinates": list(parts.lengths)}
    return "samples", {"samples": parts.samples.clone(), "known": parts.known.clone()}, said


def _settings(sampling: Sampling, structure: bool) -> TraceSettings:
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
        search,
        residency=residency,
        memory_bytes=sampling.memory,
        rule=rule,
        preflight=sampling.preflight,
        structure=structure,
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
