"""What every measuring command does: find the objective, follow the steps under a progress line, show, write, judge."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from click.core import ParameterSource

from curvkit.resolving.config import VARIABLE

from . import render
from .data import Data
from .failures import harmless, say
from .output import Output
from .progress import ProgressLine
from .records import NOTES, OPTIMIZER, READ, STATE_WANTED, identified
from .target import Target

if TYPE_CHECKING:
    from curvkit.checkpoints import Checkpoint
    from curvkit.checkpoints.optimizer_state import OptimizerState, Unassigned
    from curvkit.measures import CrossCheck
    from curvkit.objectives import Objective
    from curvkit.operators import Plan
    from curvkit.resolving import Resolved
    from curvkit.resolving.request import Request

NOT_CONVERGED = 5


class Result(Protocol):
    """What the record needs of a result."""

    @property
    def seed(self) -> int: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def seconds(self) -> float: ...
    @property
    def products(self) -> int: ...
    @property
    def cross_check(self) -> CrossCheck | None: ...


Measured = TypeVar("Measured")


def resolved_objective(ctx: click.Context, target: Target, data: Data, output: Output) -> Resolved:
    """Find model, loss and data, with the weights of the checkpoint, in the mode, precision and place that were asked for."""
    import torch

    from curvkit.checkpoints import read
    from curvkit.parameters import ParameterSpace
    from curvkit.resolving import resolve

    request = _request(ctx, target, data)
    checkpoint = read(target.checkpoint, key=target.key, ema=target.ema, trust=target.trusted)
    if checkpoint.recipe is not None and not _typed(ctx, "data") and not _typed(ctx, "demo_data"):
        request = replace(request, data=None, demo_data=False)
    paths = checkpoint.path, checkpoint.base
    ctx.meta[READ] = paths, identified(*paths)
    resolved = resolve(checkpoint, request)
    ctx.meta[NOTES] = notes = (*_choices(checkpoint), *checkpoint.notes, *resolved.notes)
    objective = resolved.objective
    if target.mode != "asis":
        objective.model.train(target.mode == "train")
    if target.params:
        objective = replace(objective, parameters=ParameterSpace.of(objective.model, target.params))
    device = ("cuda" if torch.cuda.is_available() else None) if target.device == "auto" else _device(target.device)
    dtype = {"auto": None, "float32": torch.float32, "float64": torch.float64}[target.dtype]
    objective = objective.converted(dtype=dtype, device=device)
    if not output.quiet:
        say(f"objective: {harmless(resolved.source)}")
        for note in notes:
            say(f"note: {harmless(note)}")
        there = len(objective.batches)
        if data.batches is not None and there < data.batches:
            say(f"note: --batches {data.batches}, but the data has only {there}: all of it is used")
    if ctx.params.get("limit"):
        ctx.meta[OPTIMIZER] = _optimizer(checkpoint, target, replace(resolved, objective=objective))
    elif ctx.meta.get(STATE_WANTED):
        ctx.meta[OPTIMIZER] = _stored(checkpoint, target, objective)
    return replace(resolved, objective=objective)


def _optimizer(checkpoint: Checkpoint, target: Target, resolved: Resolved) -> OptimizerState | Unassigned:
    """The state of the optimizer that belongs to these weights, or why there is none."""
    from curvkit.checkpoints.optimizer_state import Unassigned

    if not resolved.own_data:
        return Unassigned("bundled text is not the data that was trained on")
    if target.params:
        return Unassigned("--params leaves parameters out, and the optimizer moves them all")
    return _stored(checkpoint, target, resolved.objective)


def _stored(checkpoint: Checkpoint, target: Target, objective: Objective) -> OptimizerState | Unassigned:
    """The state that the checkpoint has, by the names of the model's parameters."""
    from curvkit.checkpoints.optimizer_state import Unassigned, optimizer_state

    if target.ema:
        return Unassigned("the optimizer's state belongs to the weights of the last step, not to the averaged ones")
    named = dict(objective.model.named_parameters())
    trained = {name: p.shape for name, p in named.items() if p.requires_grad}
    found = optimizer_state(checkpoint, {name: p.shape for name, p in named.items()})
    if isinstance(found, Unassigned) and len(trained) < len(named):
        again = optimizer_state(checkpoint, trained)
        return found if isinstance(again, Unassigned) else again
    return found


def _choices(checkpoint: Checkpoint) -> Iterator[str]:
    """What was done with the names and the sets of weights in the file."""
    if checkpoint.removed:
        yield f"{', '.join(checkpoint.removed)} taken from the names of the weights"
    if "ema" in checkpoint.variants:
        yield "the weights of the last step; the averaged ones, which are there too, are taken with --ema"


def title(target: Target, resolved: Resolved) -> str:
    """The checkpoint, and the word that the data is not the user's where it is not."""
    own = "" if resolved.own_data else " on bundled text, not your data"
    return f"{target.checkpoint}{own}"


def _request(ctx: click.Context, target: Target, data: Data) -> Request:
    """What resolving is asked for. A text that is typed wins over a function that is configured, and a text that is configured over none.

    A function that the environment names is left to resolving, which says so.
    """
    from curvkit.resolving.request import Request, TextData

    configured = target.config.objective if target.config is not None else None
    passed = ctx.get_parameter_source("objective") is ParameterSource.ENVIRONMENT and VARIABLE in os.environ
    function = target.objective is not None or configured is not None
    text = None
    if data.data is not None and (_typed(ctx, "data") or not function):
        text = TextData(data.data, data.seq_len, data.tokens, data.split)
    return Request(
        objective=None if passed else target.objective,
        settings=dict(target.set),
        num_batches=data.batches,
        data=text,
        config=target.config,
        trust=target.trusted,
        demo_data=data.demo_data and (_typed(ctx, "demo_data") or not function),
        seq_len=data.seq_len,
        tokens=data.tokens,
    )


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


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


def followed(
    steps: Iterable[Measured],
    title: str,
    told: Callable[[Measured], tuple[float, str]],
    *,
    target: Target,
    output: Output,
) -> tuple[Measured | None, bool]:
    """Follow the steps under a progress line: the last result, and whether Ctrl-C cut them short.

    `told` says of a result which share of the work is done, and a few words.
    """
    latest = None
    try:
        with pointing_to_mode(target), ProgressLine(title, quiet=output.quiet, color=output.color) as progress:
            for latest in steps:
                progress.update(*told(latest))
    except KeyboardInterrupt:
        return latest, True
    return latest, False


@contextlib.contextmanager
def pointing_to_mode(target: Target) -> Generator[None]:
    """Name --mode where what is refused would be measured in eval mode."""
    from curvkit.errors import UnsupportedModel

    try:
        yield
    except UnsupportedModel as error:
        if target.mode == "eval" or "model.eval()" not in str(error):
            raise
        raise UnsupportedModel(str(error).replace("Call model.eval()", "Use --mode eval, the default")) from error


def facts(result: Result | None) -> dict[str, Any]:
    """What the record says of the run itself."""
    from curvkit import results

    if result is None:
        return {}
    check = result.cross_check
    checked = {} if check is None else {"package": check.package, "seed": check.seed, "products": check.products}
    return {
        "seed": result.seed,
        "plan": results.plain(result.plan),
        "seconds": result.seconds,
        "products": result.products,
        **({"cross_check": checked} if checked else {}),
    }


def show(
    result: Measured | None,
    document: dict[str, Any],
    output: Output,
    *,
    plain: Callable[[Measured], str],
    table: Callable[[Measured], None],
) -> None:
    """Print the result in the format that was asked for; of nothing only the JSON document."""
    from curvkit import results

    shape = render.chosen_format(output.format)
    if shape == "json":
        click.echo(results.to_json(document))
    elif result is None:
        return
    elif shape == "plain":
        click.echo(plain(result))
    else:
        table(result)
