"""curvkit sharpness: how sharp is this minimum?"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import options, render
from ..options import Budget, Data, Output, Target
from ..progress import ProgressLine

if TYPE_CHECKING:
    from curvkit.measures import Sharpness, SharpnessSettings
    from curvkit.objectives import Objective
    from curvkit.resolving import Resolved

INTERRUPTED, NOT_CONVERGED = 130, 5


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

    The checkpoint is a file of torch.save. If curvkit.save wrote it with a recipe, nothing else is needed; else say with --objective which function
    returns curvkit.Objective(model, loss, data). Only weights are read from the file; nothing in it is run.

    Each eigenvalue comes with a residual that is recomputed by a true product, and with the interval that follows from it. Doubt from the sample of
    data is measured apart.
    """
    settings = _settings(num, which, block_size, data, budget)
    destination = _destination(output)
    resolved = _resolve(target, data, output)
    latest, interrupted = _measure(resolved.objective, settings, budget.seed, output)
    if latest is None:
        click.echo("Interrupted before the first product.", err=True)
        return INTERRUPTED
    document = render.json_document(
        "sharpness", {**latest.to_dict(), "interrupted": interrupted}, _record(ctx, target, resolved, latest)
    )
    _show(latest, document, target, output)
    if destination is not None:
        _write(destination, document, output)
    if interrupted:
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
        max_products=budget.max_products,
        max_seconds=budget.max_time,
    )
    residency: Any = budget.residency
    return SharpnessSettings(search, residency=residency, memory_bytes=budget.memory, data_doubt=data.data_doubt)


def _resolve(target: Target, data: Data, output: Output) -> Resolved:
    import torch

    from curvkit.checkpoints import read
    from curvkit.errors import InvalidArgument
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
    device = ("cuda" if torch.cuda.is_available() else None) if target.device == "auto" else target.device
    try:
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"--device {device}: this machine cannot use it ({reason}). Use --device cpu.") from error
    dtype = {"auto": None, "float32": torch.float32, "float64": torch.float64}[target.dtype]
    objective = objective.converted(dtype=dtype, device=device)
    if not output.quiet:
        click.echo(f"objective: {resolved.source}", err=True)
    return Resolved(objective, resolved.source)


def _measure(
    objective: Objective, settings: SharpnessSettings, seed: int | None, output: Output
) -> tuple[Sharpness | None, bool]:
    """Run the steps under a progress bar; the last result, and whether Ctrl-C cut it short."""
    from curvkit.measures import sharpness_steps

    latest = None
    try:
        with ProgressLine("sharpness", quiet=output.quiet, color=output.color) as progress:
            for latest in sharpness_steps(objective, settings, seed=seed):
                progress.update(_share(latest, settings), _detail(latest))
    except KeyboardInterrupt:
        return latest, True
    return latest, False


def _share(result: Sharpness, settings: SharpnessSettings) -> float:
    """Estimated share of the work done: residuals fall about geometrically, and the data doubt costs as much again."""
    of_search = 0.5 if settings.data_doubt and settings.search.which != "smallest" else 1.0
    pairs = result.eigenpairs
    if result.stage == "searching":
        worst = (
            (pairs.residuals / (pairs.tolerance * pairs.values.abs().clamp(min=0.01 * pairs.scale) + 1e-300))
            .max()
            .item()
        )
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


def _record(ctx: click.Context, target: Target, resolved: Resolved, result: Sharpness) -> dict[str, Any]:
    from curvkit import results
    from curvkit.checkpoints import digest
    from curvkit.objectives.data import fingerprint

    chosen: dict[str, Any] = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            chosen[name] = {"value": str(value), "source": source.name.lower()}
    record = {
        "command": ["curvkit", *sys.argv[1:]] if ctx.parent is not None else [],
        "options": chosen,
        "environment": results.environment(),
        "checkpoint": {"name": target.checkpoint.name, "digest": digest(target.checkpoint)},
        "objective": {"source": resolved.source, **_objective_source(target)},
        "data_fingerprint": fingerprint(resolved.objective.batches),
        "seed": result.seed,
        "plan": results.plain(result.plan),
        "seconds": result.seconds,
        "products": result.products,
        "peak_memory_bytes": results.peak_memory(),
    }
    return record


def _objective_source(target: Target) -> dict[str, Any]:
    if target.objective is None or not target.objective.rpartition(":")[0].endswith(".py"):
        return {}
    import hashlib

    from curvkit import results

    path = Path(target.objective.rpartition(":")[0])
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "repository": results.repository(path)}


def _show(result: Sharpness, document: dict[str, Any], target: Target, output: Output) -> None:
    from curvkit import results

    shape = render.chosen_format(output.format)
    if shape == "json":
        click.echo(results.to_json(document))
    elif shape == "plain":
        click.echo(render.sharpness_plain(result, str(target.checkpoint)))
    else:
        render.sharpness_table(result, f"sharpness of {target.checkpoint}", output.color)


def _destination(output: Output) -> Path | None:
    """Where -o writes, checked before the work."""
    if output.out is None:
        return None
    path = output.out / "sharpness.json"
    if path.exists() and not output.fresh:
        raise click.UsageError(
            f"{path} is already there and is not overwritten. Choose another folder, or pass --fresh."
        )
    return path


def _write(path: Path, document: dict[str, Any], output: Output) -> None:
    from curvkit import results

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(results.to_json(document) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    if not output.quiet:
        click.echo(f"wrote {path}", err=True)


def _judge(result: Sharpness, output: Output) -> int:
    if result.eigenpairs.all_converged:
        return 0
    click.echo(
        "Warning: not converged: a residual is above the tolerance. The intervals hold; for narrower ones raise --max-products or "
        "--max-time, or use --dtype float64.",
        err=True,
    )
    return NOT_CONVERGED if output.strict else 0
