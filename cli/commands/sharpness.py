"""curvkit sharpness: how sharp is this minimum?"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING, Any

import click

from .. import interrupts, options, records, render
from ..failures import say
from ..interrupts import INTERRUPTED
from ..options import Budget, Data, Output, Target
from ..progress import ProgressLine

if TYPE_CHECKING:
    from curvkit.measures import Sharpness, SharpnessSettings
    from curvkit.objectives import Objective
    from curvkit.resolving import Resolved

NOT_CONVERGED = 5


@click.command()
@options.target
@click.option("-k", "--num", type=click.IntRange(min=1), default=1, show_default=True, help="How many eigenvalues.")
@click.option(
    "--which",
    type=click.Choice(["largest", "smallest", "both", "magnitude"]),
    default="largest",
    show_default=True,
    help="Largest or smallest algebraic, both ends, or largest magnitude.",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Vectors per step; b shows multiplicities up to b.",
)
@options.data
@options.budget
@options.output
@click.pass_context
def sharpness(
    ctx: click.Context,
    target: Target,
    num: int,
    which: str,
    block_size: int,
    data: Data,
    budget: Budget,
    output: Output,
) -> int:
    """Largest Hessian eigenvalues of a CHECKPOINT, with intervals.

    The checkpoint is a file of torch.save. If curvkit.save wrote it with a recipe, nothing else is needed; else say with --objective
    which function returns curvkit.Objective(model, loss, data). Only weights are read from the file; nothing in it is run.

    Each eigenvalue comes with a residual that is recomputed by a true product, and with the interval that follows from it. Doubt
    from the sample of data is measured apart.
    """
    settings = _settings(num, which, block_size, data, budget)
    destination = records.destination(output, "sharpness.json")
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        resolved = _resolve(target, data, output)
        latest, interrupted = _measure(resolved.objective, settings, budget.seed, target, output)
    result = {"interrupted": interrupted} if latest is None else {**latest.to_dict(), "interrupted": interrupted}
    record = records.describe(ctx, target, resolved) | _facts(latest)
    document = render.json_document("sharpness", result, record)
    _show(latest, document, target, output)
    if destination is not None and latest is not None:
        records.write(destination, document, output)
    if interrupted:
        say("Interrupted." if latest is not None else "Interrupted before the first product: nothing is known yet.")
        return INTERRUPTED
    return _judge(latest, output)


def _settings(num: int, which: Any, block_size: int, data: Data, budget: Budget) -> SharpnessSettings:
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
    return SharpnessSettings(
        search,
        residency=residency,
        memory_bytes=budget.memory,
        data_doubt=data.data_doubt,
        float64_residuals=budget.float64_residuals,
    )


def _resolve(target: Target, data: Data, output: Output) -> Resolved:
    import torch

    from curvkit.checkpoints import read
    from curvkit.parameters import ParameterSpace
    from curvkit.resolving import Resolved, resolve

    resolved = resolve(
        read(target.checkpoint), reference=target.objective, settings=dict(target.set), num_batches=data.batches
    )
    objective = resolved.objective
    if target.mode != "asis":
        objective.model.train(target.mode == "train")
    if target.params:
        from dataclasses import replace

        objective = replace(objective, parameters=ParameterSpace.of(objective.model, target.params))
    device = ("cuda" if torch.cuda.is_available() else None) if target.device == "auto" else _device(target.device)
    dtype = {"auto": None, "float32": torch.float32, "float64": torch.float64}[target.dtype]
    objective = objective.converted(dtype=dtype, device=device)
    if not output.quiet:
        say(f"objective: {resolved.source}")
    return Resolved(objective, resolved.source)


def _device(name: str) -> str:
    """Check that something can be computed there."""
    import torch

    from curvkit.errors import InvalidArgument

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(
            f"--device {name}: torch knows no such device. Write cpu, cuda, cuda:1, or auto, the default."
        ) from error
    try:
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        raise InvalidArgument(f"--device {name}: this machine cannot use it ({reason}). Use --device cpu.") from error
    return name


def _measure(
    objective: Objective, settings: SharpnessSettings, seed: int | None, target: Target, output: Output
) -> tuple[Sharpness | None, bool]:
    """Run the steps under a progress bar; the last result, and whether Ctrl-C cut it short."""
    from curvkit.errors import UnsupportedModel
    from curvkit.measures import sharpness_steps

    latest = None
    try:
        with interrupts.watched(), ProgressLine("sharpness", quiet=output.quiet, color=output.color) as progress:
            for latest in sharpness_steps(objective, settings, seed=seed):
                progress.update(_share(latest, settings), _detail(latest))
    except KeyboardInterrupt:
        return latest, True
    except UnsupportedModel as error:
        if target.mode == "eval":
            raise
        raise UnsupportedModel(f"{error} Here that is --mode eval, the default.") from error
    return latest, False


def _share(result: Sharpness, settings: SharpnessSettings) -> float:
    """Estimated share of the work done: residuals fall about geometrically, and the data doubt costs as much again."""
    of_search = 0.5 if settings.data_doubt and settings.search.which != "smallest" else 1.0
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
    after = result.products - pairs.products
    return (
        1.0 if result.stage == "complete" else of_search + (1 - of_search) * min(after / max(pairs.products, 1), 0.95)
    )


def _detail(result: Sharpness) -> str:
    pairs = result.eigenpairs
    if result.stage == "searching":
        return f"{pairs.products} products, largest residual {pairs.residuals.max().item():.1e}"
    return f"doubt from data, {result.products} products"


def _facts(result: Sharpness | None) -> dict[str, Any]:
    from curvkit import results

    if result is None:
        return {}
    return {
        "seed": result.seed,
        "plan": results.plain(result.plan),
        "seconds": result.seconds,
        "products": result.products,
    }


def _show(result: Sharpness | None, document: dict[str, Any], target: Target, output: Output) -> None:
    from curvkit import results

    shape = render.chosen_format(output.format)
    if shape == "json":
        click.echo(results.to_json(document))
    elif result is None:
        return
    elif shape == "plain":
        click.echo(render.sharpness_plain(result, str(target.checkpoint)))
    else:
        render.sharpness_table(result, f"sharpness of {target.checkpoint}", output.color)


def _judge(result: Sharpness | None, output: Output) -> int:
    if result is not None and result.eigenpairs.all_converged:
        return 0
    say(
        "Warning: not converged: a residual is above the tolerance. The intervals hold; for narrower ones raise --max-products or "
        "--max-time, or use --dtype float64."
    )
    return NOT_CONVERGED if output.strict else 0
