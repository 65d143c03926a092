"""curvkit sharpness: how sharp is this minimum?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .. import limits, planning, render, running
from ..budget import Budget, budget
from ..configured import ConfiguredCommand
from ..data import Data, data
from ..failures import say
from ..groups import option
from ..limits import Limit, limit
from ..measuring import NOT_CONVERGED
from ..output import Lasting, Output, lasting
from ..progress import counted
from ..records import OPTIMIZER
from ..running import Measurement
from ..target import Target, target

if TYPE_CHECKING:
    from torch import Tensor

    from curvkit.measures import Sharpness, SharpnessSettings
    from curvkit.objectives import Objective
    from curvkit.operators import Forecast
    from curvkit.results import Journal

HEADING = "Eigenvalues"


@click.command(cls=ConfiguredCommand)
@target
@option(
    "-k",
    "--num",
    heading=HEADING,
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many eigenvalues.",
)
@option(
    "--which",
    heading=HEADING,
    type=click.Choice(["largest", "smallest", "both", "magnitude"]),
    default="largest",
    show_default=True,
    help="Largest or smallest algebraic, both ends, or largest magnitude.",
)
@option(
    "--block-size",
    heading=HEADING,
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Vectors per step; b shows multiplicities up to b.",
)
@data
@option(
    "--data-doubt/--no-data-doubt",
    heading="Data",
    default=True,
    show_default=True,
    help="Also measure how far the result depends on the sample (doubles the cost).",
)
@limit
@budget
@lasting
@click.pass_context
def sharpness(
    ctx: click.Context,
    target: Target,
    num: int,
    which: str,
    block_size: int,
    data: Data,
    data_doubt: bool,
    limit: Limit,
    budget: Budget,
    lasting: Lasting,
) -> int:
    """Largest Hessian eigenvalues of a CHECKPOINT, with intervals.

    A checkpoint is a file of torch.save or safetensors, or a directory of Hugging Face, PEFT or torch.distributed. Language models of
    Hugging Face and nanoGPT need --data alone, files of curvkit.save with a recipe nothing; for others `curvkit init` writes a function to
    fill in. Weights are read as data; nothing in the file is run.

    Each eigenvalue comes with a residual that is recomputed by a true product, and with the interval that follows from it. Doubt
    from the sample of data is measured apart. Where the checkpoint has the state of its optimizer, the largest learning rate at which that
    would still be stable is said, too.
    """
    limits.refuse_idle(limit)
    settings = _settings(num, which, block_size, data_doubt, budget)
    if budget.plan:
        searches = partial(limits.searches, limit)
        make = partial(_forecast, settings=settings, searches=lambda: searches(ctx.meta.get(OPTIMIZER)))
        return planning.planned(ctx, target, data, lasting, make)
    beside = partial(limits.beside, limit, lambda: ctx.meta.get(OPTIMIZER), settings)
    return running.run(ctx, target, data, lasting, _measurement(settings, budget, lasting, limit, beside))


def _measurement(
    settings: SharpnessSettings, budget: Budget, output: Lasting, limit: Limit, beside: limits.Beside
) -> Measurement[Sharpness]:
    from curvkit.measures import sharpness_steps
    from curvkit.measures.restored import sharpness_of

    search = settings.search

    def steps(objective: Objective, journal: Journal) -> Iterator[Sharpness]:
        found = sharpness_steps(objective, settings, seed=budget.seed, journal=journal)
        return beside(objective, journal, found)

    return Measurement(
        name="sharpness",
        settings=settings,
        seed=budget.seed,
        cross_check=budget.cross_check,
        which=search.which,
        most=100 * search.num,
        steps=steps,
        told=partial(_told, settings=settings),
        read=sharpness_of,
        beside=_vectors,
        plain=render.sharpness_plain,
        table=lambda result, name: render.sharpness_table(result, f"sharpness of {name}", output.color),
        judge=partial(_judge, output=output),
        wanted=limits.wanted(limit),
    )


def _vectors(result: Sharpness) -> tuple[str, dict[str, Tensor], dict[str, Any]] | None:
    """The eigenvectors, one per row, with the parameters that their coordinates belong to."""
    vectors, space = result.eigenpairs.vectors, result.eigenpairs.space
    if vectors is None or space is None:
        return None
    said = {
        "names": [entry.name for entry in space.entries],
        "shapes": [list(entry.shape) for entry in space.entries],
        "values": result.eigenpairs.values.tolist(),
    }
    return "vectors", {"vectors": vectors.T.cpu().contiguous()}, said


def _settings(num: int, which: Any, block_size: int, data_doubt: bool, budget: Budget) -> SharpnessSettings:
    from curvkit.linalg import lanczos
    from curvkit.measures import SharpnessSettings

    search = lanczos.Settings(
        num=num,
        which=which,
        tolerance=budget.tolerance,
        block_size=block_size,
        max_products=budget.max_products or max(500, 20 * num),
        max_seconds=budget.max_time,
    )
    residency: Any = budget.residency
    rule: Any = budget.rule
    rounding: Any = budget.rounding
    arithmetic: Any = budget.arithmetic
    return SharpnessSettings(
        search,
        residency=residency,
        memory_bytes=budget.memory,
        data_doubt=data_doubt,
        rule=rule,
        rounding=rounding,
        arithmetic=arithmetic,
        preflight=budget.preflight,
    )


def _forecast(objective: Objective, settings: SharpnessSettings, searches: Callable[[], int]) -> Forecast:
    from curvkit.measures import forecast_sharpness

    return forecast_sharpness(objective, settings, searches=searches())


def _told(result: Sharpness, settings: SharpnessSettings) -> tuple[float, str]:
    return _share(result, settings), _detail(result)


def _share(result: Sharpness, settings: SharpnessSettings) -> float:
    """Estimated share of the work done: residuals fall about geometrically, and the data doubt costs as much again."""
    of_search = 0.4 if settings.data_doubt and settings.search.which != "smallest" else 0.7
    from curvkit.linalg import lanczos

    pairs = result.eigenpairs
    if result.stage == "searching":
        enough = lanczos.allowed(pairs.values, pairs.scale, pairs.tolerance).clamp(min=1e-300)
        worst = (pairs.residuals / enough).max().item()
        missing = len(pairs.values) < settings.search.num
        share = (
            0.05
            if missing or worst <= 0
            else 1 - math.log10(max(worst, 1.0)) / max(math.log10(1 / pairs.tolerance), 1e-9)
        )
        return of_search * min(max(share, 0.02), 0.98)
    if result.stage == "complete":
        return 1.0
    after = result.products - pairs.products
    return of_search + (1 - of_search) * min(after / max(2 * pairs.products, 1), 0.95)


def _detail(result: Sharpness) -> str:
    pairs, products = result.eigenpairs, counted(result.products, "product")
    if result.stage == "searching":
        return f"{products}, largest residual {pairs.residuals.max().item():.1e}"
    if result.stage in ("spread", "halves"):
        return f"doubt from data, {products}"
    if result.stage == "stability" and result.stability is not None and result.stability.products:
        return f"the optimizer's limit, {products}"
    return f"adaptive sharpness, {products}" if result.stage == "adaptive" and result.adaptive else products


def _judge(result: Sharpness | None, output: Output) -> int:
    if result is not None and result.eigenpairs.all_converged:
        return 0
    say(
        "Warning: not converged: a residual is above the tolerance. The intervals hold; for narrower ones raise --max-products or "
        "--max-time, or use --dtype float64."
    )
    return NOT_CONVERGED if output.strict else 0
