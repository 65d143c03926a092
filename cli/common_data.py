"""Several checkpoints on one set of data: what is measured of each, and the record of all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import measuring, records
from .data import Data
from .failures import harmless, say
from .output import Output
from .target import Target

if TYPE_CHECKING:
    from curvkit.measures import Comparison
    from curvkit.resolving import Resolved

SHARED = ("command", "options", "environment", "config", "peak_memory_bytes")
"""What the records of all checkpoints of one command have in common."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose objective is known."""

    target: Target
    resolved: Resolved
    kept: Mapping[str, Any]
    """What the context knew of this checkpoint when it was read."""


def resolved(
    ctx: click.Context, target: Target, others: Sequence[Path], data: Data, output: Output
) -> dict[str, Found]:
    """Find the objective of each checkpoint; where a function makes it, on the data that it gave for the first.

    Args:
        ctx: Of the command.
        target: The first checkpoint, and the options that hold for all.
        others: The other checkpoints.
        data: On which data.
        output: Whether notes are said.

    Returns:
        By the path as it was typed, in order.

    Raises:
        UnknownObjective: If the function gives one and the same model for two checkpoints.
    """
    from curvkit.objectives.data import fingerprint

    found: dict[str, Found] = {}
    paths = (target.checkpoint, *others)
    for path, name in zip(paths, _names(paths, output), strict=True):
        if not output.quiet:
            say(f"{harmless(name)}:")
        it = replace(target, checkpoint=path)
        objective = measuring.resolved_objective(ctx, it, data, output)
        kept = {key: ctx.meta.get(key) for key in (records.READ, records.NOTES)}
        first = next(iter(found.values()), None)
        if first is not None:
            _refuse_one_model(objective, [earlier.resolved for earlier in found.values()])
        if first is not None and _by_function(target, objective):
            batches = first.resolved.objective.batches
            if fingerprint(objective.objective.batches) != fingerprint(batches):
                note = f"the function gave other data for it; the data of {first.target.checkpoint} are used for all"
                kept[records.NOTES] = (*(kept[records.NOTES] or ()), note)
                if not output.quiet:
                    say(f"note: {harmless(note)}")
            objective = replace(objective, objective=objective.objective.with_batches(batches))
        found[name] = Found(it, objective, kept)
    return found


def record(ctx: click.Context, found: Mapping[str, Found], result: Comparison | None) -> dict[str, Any]:
    """What the numbers need to be made again: what all share, and for each checkpoint what is its own.

    Args:
        ctx: Of the command.
        found: The checkpoints.
        result: As far as it is known; None for nothing.

    Returns:
        Plain values.
    """
    from curvkit import results

    each: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    points = {} if result is None else {point.name: point for point in result.points}
    for name, it in found.items():
        ctx.meta.update(it.kept)
        described = records.describe(ctx, it.target, it.resolved)
        shared = {key: value for key, value in described.items() if key in SHARED}
        own = {key: value for key, value in described.items() if key not in SHARED}
        point = points.get(name)
        if point is not None:
            own |= {"plan": results.plain(point.plan), "seconds": point.seconds, "products": point.products}
        each.append({"name": results.without_folders(name), **own})
    whole = {} if result is None else {"seed": result.seed, "seconds": result.seconds, "products": result.products}
    return {**shared, "checkpoints": each, **whole}


def _names(paths: Sequence[Path], output: Output) -> list[str]:
    """The paths as typed; a number behind one that was typed before, and a word on files that are the same."""
    names: list[str] = []
    for index, path in enumerate(paths):
        count = [str(other) for other in paths[:index]].count(str(path))
        names.append(f"{path} ({count + 1})" if count else str(path))
        same = next((other for other in paths[:index] if os.path.samefile(other, path)), None)
        if same is not None and not output.quiet:
            say(f"note: {harmless(str(path))} is the same file as {harmless(str(same))}")
    return names


def _by_function(target: Target, resolved: Resolved) -> bool:
    """Whether the user names a function that brings the data; not a recipe, and not a text."""
    configured = target.config.objective if target.config is not None else None
    return (target.objective is not None or configured is not None) and resolved.tokens_digest is None


def _refuse_one_model(resolved: Resolved, earlier: Sequence[Resolved]) -> None:
    """A function that returns one model for every call would have the weights of the last checkpoint in all of them."""
    from curvkit.errors import UnknownObjective

    own = {tensor.data_ptr() for tensor in resolved.objective.tensors if tensor.numel()}
    for other in earlier:
        if own & {tensor.data_ptr() for tensor in other.objective.tensors}:
            raise UnknownObjective(
                f"compare: {resolved.source} gave the same model for two checkpoints, so that the weights of one have overwritten those of "
                "the other. A new model is needed with each call: build it inside the function, not beside it."
            )
