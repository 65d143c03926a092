"""What goes beside a result: the record of how it was made, and the file of -o."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .failures import say
from .options import Output, Target

if TYPE_CHECKING:
    from curvkit.resolving import Resolved


def describe(ctx: click.Context, target: Target, resolved: Resolved) -> dict[str, Any]:
    """Everything that a number needs to be made again; neither the environment nor folders of this machine."""
    from curvkit import results
    from curvkit.checkpoints import digest
    from curvkit.objectives.data import fingerprint

    chosen: dict[str, Any] = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            chosen[name] = {"value": results.without_folders(str(value)), "source": source.name.lower()}
    return {
        "command": ["curvkit", *(results.without_folders(argument) for argument in ctx.obj or ())],
        "options": chosen,
        "environment": results.environment(),
        "checkpoint": {"name": target.checkpoint.name, "digest": digest(target.checkpoint)},
        "objective": {"source": results.without_folders(resolved.source), **_objective_source(target)},
        "data_fingerprint": fingerprint(resolved.objective.batches),
        "peak_memory_bytes": results.peak_memory(),
    }


def _objective_source(target: Target) -> dict[str, Any]:
    """Hash and repository of the file that the user named."""
    from curvkit import results

    place = (target.objective or "").rpartition(":")[0]
    path = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    if path is None:
        return {}
    source = Path(path)
    return {"sha256": hashlib.sha256(source.read_bytes()).hexdigest()[:16], "repository": results.repository(source)}


def destination(output: Output, name: str) -> Path | None:
    """Where -o writes, made and checked before the work."""
    if output.out is None:
        return None
    path = output.out / name
    if path.exists() and not output.fresh:
        raise click.UsageError(
            f"{path} is already there and is not overwritten. Choose another folder, or pass --fresh."
        )
    try:
        output.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(
            f"--out {output.out}: the folder cannot be made ({(error.strerror or str(error)).lower()}). Choose another one."
        ) from error
    return path


def write(path: Path, document: dict[str, Any], output: Output) -> None:
    """Write under another name and then rename, so that a reader sees all of it or nothing."""
    from curvkit import results

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(results.to_json(document) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    if not output.quiet:
        say(f"wrote {path}")
