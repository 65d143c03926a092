"""curvkit verify: is a stated result true?"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import measuring, records, render, render_verification
from ..budget import MEMORY, RESIDENCY, RULE
from ..configured import ConfiguredCommand
from ..data import Data, data
from ..failures import harmless, say, while_evaluating
from ..groups import Command, grouped, option
from ..interrupts import INTERRUPTED, conclude
from ..output import COLOR, FORMAT, JSON, PLAIN, Output
from ..paths import Existing
from ..progress import counted
from ..target import Target, target

if TYPE_CHECKING:
    from torch import Tensor

    from curvkit.measures.verified_parts import Check
    from curvkit.objectives import Objective

FAILED = 1
UNREADABLE = (OSError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RecursionError)
"""What reading a document raises that curvkit has not written."""
PARAMETERS = "parameters_and_buffers"
"""A digest of a checkpoint that documents of earlier versions do not state."""
FILES = {"curvkit.sharpness/1": "vectors", "curvkit.trace/1": "samples"}
"""Schema of a document -> what lies beside it."""


@dataclass(frozen=True)
class Again:
    """How products are computed this time."""

    rule: str
    residency: str
    memory: int | None
    probes: int


@dataclass(frozen=True)
class Shown:
    """How it is shown."""

    format: str
    quiet: bool
    color: str


def again(command: Command) -> Command:
    """How products are computed this time."""
    probes = option(
        "--probes",
        type=click.IntRange(min=1),
        default=5,
        show_default=True,
        help="Of a trace: how many are drawn again.",
    )
    return grouped(Again, "Accuracy and cost", RULE, RESIDENCY, MEMORY, probes)(command)


def shown(command: Command) -> Command:
    """How it is shown."""
    quiet = option("-q", "--quiet", is_flag=True, help="No progress and notes on stderr.")
    return grouped(Shown, "Output", FORMAT, JSON, PLAIN, quiet, COLOR)(command)


@click.command(cls=ConfiguredCommand)
@click.argument("result", type=Existing())
@target
@data
@again
@shown
@click.pass_context
def verify(ctx: click.Context, result: Path, target: Target, data: Data, again: Again, shown: Shown) -> int:
    """Whether the RESULT that -o wrote is true of a CHECKPOINT.

    Checkpoint and data must be those of the result. Then residuals are recomputed from the eigenvectors beside it, or probes of a trace are
    drawn again; another machine, --rule, --residency or --dtype may be used. Each line has what was stated, what was recomputed, and
    the verdict. The exit code is 0 if everything that was recomputed holds, and 1 if not; what was not recomputed is named at the end.
    """
    document = _document(result)
    output = Output(shown.format, None, False, False, shown.quiet, shown.color)
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        resolved = measuring.resolved_objective(ctx, replace(target, dtype="auto"), data, output)
        there = document["record"]["run"]
        import torch

        from curvkit.measures.restored import precision_of

        stated = precision_of(there["model"]["dtype"])
        resolved = replace(resolved, objective=resolved.objective.converted(dtype=stated))
        checks = list(_ground(there, records.ground(ctx, target, resolved)))
        if all(check.holds is not False for check in checks):
            wanted = {"auto": None, "float32": torch.float32, "float64": torch.float64}[target.dtype]
            steps = _checks(document, result.parent, resolved.objective.converted(dtype=wanted), again)
            interrupted = measuring.followed(_collected(steps, checks), "verify", _told, target=target, output=output)[
                1
            ]
            if interrupted:
                conclude("Interrupted: what was not recomputed is not verified.")
                return INTERRUPTED
    record = records.describe(ctx, target, resolved)
    _show(checks, document["schema"], record, shown, title=f"{result} of {target.checkpoint}")
    return 0 if all(check.holds is not False for check in checks) else FAILED


def _document(path: Path) -> dict[str, Any]:
    from curvkit.errors import RefusedCheckpoint
    from curvkit.measures.restored import precision_of

    document: Any = None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema, there = document["schema"], document["record"]
        reason = None if schema in FILES else f"its schema is {schema!r}"
        if reason is None and "run" not in there:
            reason = "it was not written by -o"
        elif reason is None and document["result"].get("interrupted"):
            reason = "its run was interrupted"
        elif reason is None:
            model = there["run"]["model"]
            precision_of(model["dtype"])
            reason = None if isinstance(model["mode"], str) else f"its mode is {model['mode']!r}"
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        raise RefusedCheckpoint(
            f"{path} is not a result that can be verified ({harmless(reason)}); it must be a complete one of sharpness or trace with "
            "-o, beside the tensors that were written with it. Measure with -o DIR first."
        )
    return document


def _ground(before: Mapping[str, Any], now: dict[str, Any]) -> Iterator[Check]:
    """Whether it is the same function at the same point; on which device does not matter."""
    from curvkit.measures.verified_parts import Check

    for name, value in now.items():
        stated = before.get(name)
        same = stated == value
        if name == "model" and isinstance(stated, dict):
            same = all(stated[key] == value[key] for key in ("mode", "dtype"))
        younger = PARAMETERS in value and PARAMETERS not in stated if isinstance(stated, dict) else False
        if younger:
            same = stated == {key: digest for key, digest in value.items() if key != PARAMETERS}
        if not same or name in ("checkpoint", "data"):
            yield Check(name, stated, value, same)
        if younger:
            yield Check("parameters and buffers", None, value[PARAMETERS], None)


def _checks(document: dict[str, Any], folder: Path, objective: Objective, again: Again) -> Iterator[Check]:
    from curvkit.errors import CurvkitError, RefusedCheckpoint
    from curvkit.linalg import lanczos
    from curvkit.measures import SharpnessSettings, TraceSettings
    from curvkit.measures.verification import verify_sharpness
    from curvkit.measures.verified_parts import Check
    from curvkit.measures.verified_trace import verify_trace

    rule: Any = again.rule
    residency: Any = again.residency
    engine: dict[str, Any] = {"residency": residency, "memory_bytes": again.memory, "rule": rule}
    what = FILES[document["schema"]]
    try:
        told = document["record"].get("files", {}).get(what)
        tensors = None
        if told is not None:
            tensors, digest = _tensors(folder / Path(told["name"]).name)
            yield Check(f"file of {what}", told["sha256"], digest, told["sha256"] == digest)
            if not all(tensor.is_floating_point() for tensor in tensors.values()):
                raise ValueError(f"the file of {what} has whole numbers")
        if what == "samples":
            yield from verify_trace(objective, document, tensors, TraceSettings(**engine), again.probes)
        elif tensors is None:
            raise KeyError("the eigenvectors")
        else:
            yield from verify_sharpness(
                objective, document, tensors["vectors"], SharpnessSettings(lanczos.Settings(), **engine)
            )
    except UNREADABLE as error:
        if isinstance(error, CurvkitError) or while_evaluating(error):
            raise
        raise RefusedCheckpoint(
            f"the result cannot be verified: {type(error).__name__}: {harmless(str(error))}. It must be as curvkit wrote it, with the file "
            f"of {what} beside it. Measure again with -o DIR."
        ) from error


def _tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from curvkit.errors import RefusedCheckpoint
    from curvkit.results.files import sha256

    try:
        return load_file(path), sha256(path)
    except (OSError, SafetensorError) as error:
        raise RefusedCheckpoint(
            f"{path} cannot be read ({type(error).__name__}: {error}); it must lie beside the result, as it was written. Measure again "
            "with -o DIR, or put it back."
        ) from error


def _collected(steps: Iterator[Check], into: list[Check]) -> Iterator[int]:
    for check in steps:
        into.append(check)
        yield len(into)


def _told(done: int) -> tuple[float, str]:
    return 1.0 - 0.9**done, counted(done, "check")


def _show(checks: list[Check], schema: str, record: dict[str, Any], shown: Shown, *, title: str) -> None:
    from curvkit import results
    from curvkit.measures.verification import holding

    shape = render.chosen_format(shown.format)
    left = [check.what for check in checks if check.holds is None]
    if shape == "json":
        result = {"verified": holding(checks), "of": schema, "not_recomputed": left, "checks": checks}
        click.echo(results.to_json(render.json_document("verify", result, record)))
    elif shape == "plain":
        click.echo(render_verification.plain(checks, title))
    else:
        render_verification.table(checks, title, shown.color)
    wrong = [check.what for check in checks if check.holds is False]
    if shown.quiet:
        return
    if wrong:
        say(f"Warning: not verified: {harmless(render.listed(wrong))}.")
    elif left:
        say(f"What was recomputed holds. Not checked: {', '.join(left)}.")
    else:
        say("What was recomputed holds.")
