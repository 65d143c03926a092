"""curvkit compare: the same quantities of several checkpoints, on the same data and probes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import common_data, measuring, records, render, render_comparison
from ..budget import MAX_TIME, MEMORY, PREFLIGHT, RESIDENCY, RULE
from ..configured import ConfiguredCommand
from ..data import Data, data
from ..failures import say
from ..groups import Command, grouped, option
from ..interrupts import INTERRUPTED, conclude
from ..measuring import NOT_CONVERGED
from ..output import Output, output
from ..progress import counted
from ..target import Target, target

if TYPE_CHECKING:
    from curvkit.measures import Comparison, ComparisonSettings


@dataclass(frozen=True)
class Pairing:
    """What is compared, how exactly, and at what cost."""

    num: int
    probes: int
    tolerance: float
    max_products: int | None
    max_time: float | None
    memory: int | None
    residency: str
    rule: str
    rounding: str
    preflight: bool
    data_doubt: bool
    seed: int | None


def pairing(command: Command) -> Command:
    """Accuracy and cost."""
    return grouped(
        Pairing,
        "Accuracy and cost",
        option(
            "-k",
            "--num",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Eigenvalues, and dimensions of the eigenspaces whose overlap is measured.",
        ),
        option(
            "--probes",
            type=click.IntRange(min=2),
            default=60,
            show_default=True,
            help="Of the trace, the same for all checkpoints.",
        ),
        option("--tolerance", "--tol", type=float, default=1e-3, show_default=True, help="Relative residual to reach."),
        option(
            "--max-products",
            "--max-hvp",
            type=click.IntRange(min=2),
            help="Most Hessian products of one search.  [default: 500, or 20 per eigenvalue]",
        ),
        MAX_TIME,
        MEMORY,
        RESIDENCY,
        RULE,
        option(
            "--rounding",
            type=click.Choice(["auto", "float64", "perturbation"]),
            default="auto",
            show_default=True,
            help="How rounding is seen; auto takes the cheaper.",
        ),
        PREFLIGHT,
        option(
            "--data-doubt/--no-data-doubt",
            default=True,
            show_default=True,
            help="Also measure how far the difference of lambda_max depends on the sample.",
        ),
        option("--seed", type=click.IntRange(min=0), help="Of every draw; drawn and recorded if absent."),
    )(command)


@click.command(cls=ConfiguredCommand)
@target
@click.argument("others", nargs=-1, metavar="CHECKPOINT...", type=click.Path(exists=True, path_type=Path))
@data
@pairing
@output
@option("--md", is_flag=True, heading="Output", help="A Markdown table, for a pull request.")
@click.pass_context
def compare(
    ctx: click.Context, target: Target, others: tuple[Path, ...], data: Data, pairing: Pairing, md: bool, output: Output
) -> int:
    """Several CHECKPOINTs on the same data, with differences.

    They are of one model, and the first one is the reference. Loss, largest eigenvalue, trace and adaptive sharpness of each; differences
    to the reference are paired, over the parts of the data and over the probes of the trace. A checkpoint is called flatter only at equal
    loss, and only if the measure that no rescaling of the weights changes is lower, too. With --objective all are measured on the data of
    the first.
    """
    if not others:
        raise click.UsageError(
            f"Only one checkpoint was given, {target.checkpoint}: two or more are compared. For one alone there are "
            "`curvkit sharpness` and `curvkit trace`."
        )
    if md and output.format != "auto":
        raise click.UsageError(f"--md and --format {output.format} contradict each other: leave out one of them.")
    output = replace(output, format="md" if md else output.format)
    settings = _settings(pairing)
    destination = records.destination(output, "compare.json")
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        from curvkit.measures import compare_steps

        found = common_data.resolved(ctx, target, others, data, output)
        steps = compare_steps({name: it.resolved.objective for name, it in found.items()}, settings, seed=pairing.seed)
        told = partial(_told, number=len(found), settings=settings)
        latest, interrupted = measuring.followed(steps, "compare", told, target=target, output=output)
    result = {"interrupted": interrupted} if latest is None else {**latest.to_dict(), "interrupted": interrupted}
    document = render.json_document("compare", result, common_data.record(ctx, found, latest))
    own = all(it.resolved.own_data for it in found.values())
    _show(latest, document, output, "" if own else " on bundled text, not your data")
    if destination is not None and latest is not None:
        records.write(destination, document, output)
    if interrupted:
        conclude("Interrupted." if latest is not None else "Interrupted before the first loss: nothing is known yet.")
        return INTERRUPTED
    return _judge(latest, output)


def _settings(pairing: Pairing) -> ComparisonSettings:
    from curvkit.linalg import lanczos
    from curvkit.measures import ComparisonSettings

    search = lanczos.Settings(
        num=pairing.num,
        tolerance=pairing.tolerance,
        max_products=pairing.max_products or max(500, 20 * pairing.num),
        max_seconds=pairing.max_time,
    )
    residency: Any = pairing.residency
    rule: Any = pairing.rule
    rounding: Any = pairing.rounding
    return ComparisonSettings(
        search=search,
        probes=pairing.probes,
        data_doubt=pairing.data_doubt,
        rounding=rounding,
        residency=residency,
        memory_bytes=pairing.memory,
        rule=rule,
        preflight=pairing.preflight,
    )


def _show(result: Comparison | None, document: dict[str, Any], output: Output, where: str) -> None:
    if output.format == "md" and result is not None:
        click.echo(render_comparison.markdown(result, where))
        return
    measuring.show(
        result,
        document,
        output,
        plain=partial(render_comparison.plain, where=where),
        table=partial(render_comparison.table, where=where, color=output.color),
    )


STAGES: Sequence[str] = ("loss", "eigenvalues", "data", "adaptive", "trace", "complete")
BEGIN = {"loss": 0.0, "eigenvalues": 0.02, "data": 0.25, "adaptive": 0.3, "trace": 0.5, "complete": 1.0}
"""Share of the work at a point that is done when a stage begins: about 20 products for each search, 60 probes."""


def _told(result: Comparison, number: int, settings: ComparisonSettings) -> tuple[float, str]:
    """Share of the work done, and a few words."""
    done = sum(point.stage == "complete" for point in result.points)
    if done == number:
        return 1.0, counted(result.products, "product")
    at = next((point for point in result.points if point.stage not in ("loss", "complete")), result.points[-1])
    begin, end = BEGIN[at.stage], BEGIN[STAGES[STAGES.index(at.stage) + 1]]
    probes = at.trace.probes if at.trace is not None else 0
    within = probes / settings.probes if at.stage == "trace" else 0.5
    return (
        done + begin + within * (end - begin)
    ) / number, f"{at.name}: {at.stage}, {counted(result.products, 'product')}"


def _judge(result: Comparison | None, output: Output) -> int:
    if result is not None and result.converged:
        return 0
    say(
        "Warning: not converged: a residual is above the tolerance. The intervals hold; for narrower ones raise --max-products or "
        "--max-time, or use --dtype float64."
    )
    return NOT_CONVERGED if output.strict else 0
