"""What goes beside a result: the record of how it was made, and the file of -o."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import identity
from .failures import say
from .output import Output
from .target import Target

if TYPE_CHECKING:
    from curvkit.resolving import Resolved


READ = "curvkit.read"
"""Where a context keeps what `identified` said of the checkpoint and of its base when they were read."""
OTHERS = re.compile(r"\.|checkpoint-\d+$")
"""Directories within a checkpoint's that are not its own: hidden ones, and other checkpoints of the run."""
OPTIMIZER = "curvkit.optimizer"
"""Where it keeps the state of the optimizer, for commands that have an option `limit`, or that ask for it under `STATE_WANTED`."""
STATE_WANTED = "curvkit.optimizer wanted"
NOTES = "curvkit.notes"
"""Where it keeps what was noted while the objective was found."""


def describe(ctx: click.Context, target: Target, resolved: Resolved) -> dict[str, Any]:
    """Everything that a number needs to be made again; neither the environment nor folders of this machine."""
    from curvkit import results
    from curvkit.objectives.data import fingerprint

    read, notes = _read(ctx, target)
    chosen: dict[str, Any] = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT" and name != "config":
            chosen[name] = {"value": results.without_folders(str(value)), "source": source.name.lower()}
    return {
        "command": ["curvkit", *(results.without_folders(argument) for argument in ctx.obj or ())],
        "options": chosen,
        "environment": results.environment(),
        "checkpoint": {
            **read,
            **({"key": target.key} if target.key else {}),
            **({"weights": "ema"} if target.ema else {}),
        },
        **_configuration(target),
        "objective": {"source": results.without_folders(resolved.source), **_objective_source(target)},
        "data_fingerprint": fingerprint(resolved.objective.batches),
        **({"tokens_digest": resolved.tokens_digest} if resolved.tokens_digest else {}),
        **({} if resolved.own_data else {"own_data": False}),
        **({"notes": notes} if notes else {}),
        "peak_memory_bytes": results.peak_memory(),
    }


def run(ctx: click.Context, target: Target, resolved: Resolved, how: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be gone on with: all that a number depends on but its seed, its plan and the machine."""
    from curvkit import results

    return {**ground(ctx, target, resolved), **identity.function(resolved.objective), **results.plain(how)}


def ground(ctx: click.Context, target: Target, resolved: Resolved) -> dict[str, Any]:
    """Of which function at which point a number is."""
    from curvkit import results
    from curvkit.objectives.data import fingerprint

    objective, (_, read) = resolved.objective, ctx.meta[READ]
    source = _objective_source(target)
    return results.plain(
        {
            "checkpoint": {**_digests(read), "parameters_and_buffers": identity.weights(objective)},
            **identity.optimizer(ctx.meta.get(OPTIMIZER)),
            "weights": target.key or ("ema" if target.ema else None),
            "objective": source.get("sha256") or results.without_folders(resolved.source),
            "arguments": [f"{key}={value}" for key, value in target.set],
            "data": [fingerprint(objective.batches), resolved.tokens_digest],
            "parameters": [entry.name for entry in objective.parameters.entries] if target.params else "all",
            "model": {"mode": target.mode, "dtype": str(objective.dtype), "device": str(objective.device)},
        }
    )


def _digests(read: dict[str, Any]) -> dict[str, Any]:
    """Without the name of the checkpoint, which may move."""
    base = read.get("base")
    return {"digest": read.get("digest") or read["files"], **({"base": _digests(base)} if base else {})}


def identified(checkpoint: Path, base: Path | None) -> dict[str, Any]:
    """Name and digest of a file, or of each file of a directory; the base of an adapter likewise."""
    return {**_identified(checkpoint), **({"base": _identified(base)} if base else {})}


def _identified(path: Path) -> dict[str, Any]:
    name = path.resolve().name  # also of `.`
    if not path.is_dir():
        return {"name": name, "digest": _digest(path)}
    inner = [child for child in path.iterdir() if child.is_dir() and not OTHERS.match(child.name)]
    files = sorted(file for folder in (path, *inner) for file in folder.iterdir() if file.is_file())
    return {"name": name, "files": {file.relative_to(path).as_posix(): _digest(file) for file in files}}


def _digest(file: Path) -> str:
    from curvkit.checkpoints import digest

    try:
        return digest(file)
    except OSError:
        return "not readable"


def _read(ctx: click.Context, target: Target) -> tuple[dict[str, Any], list[str]]:
    """What the checkpoint was when it was read, and the notes; a warning if it is something else by now."""
    from curvkit import results

    paths, then = ctx.meta[READ]
    notes = [" ".join(map(results.without_folders, note.split(" "))) for note in ctx.meta.get(NOTES, ())]
    try:
        now = identified(*paths)
    except OSError:  # the directory is gone
        now = None
    if now != then:
        said = "the checkpoint has changed since it was read; the digest in the record is that of what was read"
        say(f"warning: {target.checkpoint}: {said}")
        notes.append(said)
    return then, notes


def _configuration(target: Target) -> dict[str, Any]:
    from curvkit import results
    from curvkit.checkpoints import digest

    if target.config is None:
        return {}
    path = target.config.path
    return {"config": {"path": results.without_folders(str(path)), "digest": digest(path)}}


def _objective_source(target: Target) -> dict[str, Any]:
    """Hash and repository of the file that the user named, typed or in the configuration."""
    from curvkit import results

    config = target.config
    reference, base = target.objective, Path()
    if reference is None and config is not None:
        reference, base = config.objective, config.directory
    place = (reference or "").rpartition(":")[0]
    path = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    if path is None:
        return {}
    source = base / path
    if not source.is_file():
        return {}
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
    from curvkit.results.files import replaced

    text = results.to_json(document) + "\n"
    replaced(path, lambda part: part.write_text(text, encoding="utf-8"))
    if not output.quiet:
        say(f"wrote {path}")
