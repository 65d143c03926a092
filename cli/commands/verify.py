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
from ..failures import say
from ..groups import Command, grouped, option
from ..interrupts import INTERRUPTED, conclude
from ..output import COLOR, FORMAT, JSON, PLAIN, Output
from ..paths import Existing
from ..progress import counted
from ..target import Target, target

if TYPE_CHECKING:
    from torch import Tensor

    from curvkit.measures.verification import Check
    from curvkit.objectives import Objective

FAILED = 1
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
    the verdict. The exit code is 0 if everything holds, and 1 if not.
    """
    document = _document(result)
    output = Output(shown.format, None, False, False, shown.quiet, shown.color)
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        resolved = measuring.resolved_objective(ctx, replace(target, dtype="auto"), data, output)
        there = document["record"]["run"]
        import torch

        resolved = replace(resolved, objective=resolved.objective.converted(dtype=_dtype(there["model"]["dtype"])))
        checks = list(_ground(there, records.ground(ctx, target, resolved)))
        if all(check.holds for check in checks):
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

    document: Any = None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = document["schema"] in FILES and "run" in document["record"]
        reason = (
            f"its schema is {document['schema']!r}" if document["schema"] not in FILES else "it was not written by -o"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        known, reason = False, f"{type(error).__name__}: {error}"
    if known and document["result"].get("interrupted"):
        known, reason = False, "its run was interrupted"
    if not known:
        raise RefusedCheckpoint(
            f"{path} is not a result that can be verified ({reason}); it must be a complete one of curvkit sharpness or curvkit trace with "
            "-o, beside the tensors that were written with it. Measure with -o DIR first."
        )
    return document


def _ground(before: Mapping[str, Any], now: dict[str, Any]) -> Iterator[Check]:
    """Whether it is the same function at the same point; on which device does not matter."""
    from curvkit.measures.verification import Check

    for name, value in now.items():
        stated = before.get(name)
        same = stated == value
        if name == "model" and isinstance(stated, dict):
            same = all(stated[key] == value[key] for key in ("mode", "dtype"))
        if not same or name in ("checkpoint", "data"):
            yield Check(name, stated, value, same)


def _checks(document: dict[str, Any], folder: Path, objective: Objective, again: Again) -> Iterator[Check]:
    from curvkit.errors import RefusedCheckpoint
    from curvkit.linalg import lanczos
    from curvkit.measures import SharpnessSettings, TraceSettings
    from curvkit.measures.verification import Check, verify_sharpness
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
        if what == "samples":
            yield from verify_trace(objective, document, tensors, TraceSettings(**engine), again.probes)
        elif tensors is None:
            raise KeyError("the eigenvectors")
        else:
            yield from verify_sharpness(
                objective, document, tensors["vectors"], SharpnessSettings(lanczos.Settings(), **engine)
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ValueError) and type(error) is not ValueError:
            raise  # ours
        raise RefusedCheckpoint(
            f"the result cannot be verified: {type(error).__name__}: {error}. It must be as curvkit wrote it, with the file of {what} "
            "beside it. Measure again with -o DIR."
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


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, str(name).removeprefix("torch."))


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
    if shape == "json":
        result = {"verified": holding(checks), "of": schema, "checks": checks}
        click.echo(results.to_json(render.json_document("verify", result, record)))
    elif shape == "plain":
        click.echo(render_verification.plain(checks, title))
    else:
        render_verification.table(checks, title, shown.color)
    wrong = [check.what for check in checks if check.holds is False]
    if wrong and not shown.quiet:
        say(f"Warning: not verified: {render.listed(wrong)}.")
