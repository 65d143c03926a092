"""How a diagonal is estimated and where it is written; and what of --set is an option of the estimator."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .budget import HEADING, PREFLIGHT
from .groups import Command, grouped, option
from .output import COLOR, FORMAT, JSON, PLAIN, Output
from .target import Target
from .values import Assignment

if TYPE_CHECKING:
    from curvkit.estimators import DiagonalEstimator
    from curvkit.estimators.registry import Description

DEFAULT = "example-hutchinson"
"""The Hessian's own diagonal, of any model with rules for its layers, at a tenth and less of the cost of other unbiased estimates."""
DRAWS = ("num_probes", "num_samples")
"""Options that say how often the same is drawn anew. Once leaves the error unknown: where that is the default, the command draws more."""
DRAWN = 8
ESTIMATOR, FUNCTION = "estimator.", "objective."
"""Before a name in --set: whose it is, where both have it."""
SET_OF_BOTH = option(
    "--set",
    type=Assignment(),
    multiple=True,
    metavar="K=V",
    help="Option of the estimator, num_probes=4 or inner.num_probes=4; other names are arguments of that function.",
)


@dataclass(frozen=True)
class Estimation:
    """How it is estimated."""

    estimator: str
    preflight: bool
    plan: bool
    seed: int | None


@dataclass(frozen=True)
class Saving:
    """How it is shown, and in which file it is kept."""

    format: str
    out: Path | None
    fresh: bool
    quiet: bool
    color: str

    @property
    def shown(self) -> Output:
        """What commands with a folder have; the file is apart."""
        return Output(self.format, None, self.fresh, False, self.quiet, self.color)


@dataclass(frozen=True)
class Chosen:
    """An estimator and what is left of --set."""

    name: str
    estimator: DiagonalEstimator
    arguments: tuple[tuple[str, str], ...]
    """For the function that makes the objective."""
    takes: str
    """Its options, in words."""


def estimation(command: Command) -> Command:
    """Estimator, accuracy and cost."""
    return grouped(
        Estimation,
        HEADING,
        option(
            "-e",
            "--estimator",
            default=DEFAULT,
            show_default=True,
            metavar="NAME",
            help="One of those that `curvkit estimators` lists.",
        ),
        PREFLIGHT,
        option("--plan", is_flag=True, help="Only say what it would take, and stop."),
        option("--seed", type=click.IntRange(min=0), help="Of every draw; drawn and recorded if absent."),
    )(command)


def saving(command: Command) -> Command:
    """Format and file."""
    return grouped(
        Saving,
        "Output",
        FORMAT,
        JSON,
        PLAIN,
        option(
            "-o",
            "--out",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="Also write values, errors and record into FILE, as safetensors.",
        ),
        option("--fresh", is_flag=True, help="With -o: replace an earlier file."),
        option("-q", "--quiet", is_flag=True, help="No progress and notes on stderr."),
        COLOR,
    )(command)


def choose(it: Estimation, target: Target) -> Chosen:
    """Make the estimator, before anything is read."""
    from curvkit.estimators import registry

    own = {option.name: option for option in _described(it.estimator).options}
    given, arguments = dict[str, str](), list[tuple[str, str]]()
    for key, text in target.set:
        if key.startswith(ESTIMATOR):
            given[key.removeprefix(ESTIMATOR)] = text
        elif key.startswith(FUNCTION):
            arguments.append((key.removeprefix(FUNCTION), text))
        elif key.partition(".")[0] in own or "." in key or not _may_have_a_function(target):
            _refuse_ambiguous(it.estimator, key, target)
            given[key] = text
        else:
            arguments.append((key, text))
    inner = {key: text for key, text in given.items() if "." not in key and text in registry.names()}
    more = {f"{key}.{name}": str(DRAWN) for key, text in inner.items() for name in _drawn_once(text)}
    more |= {name: str(DRAWN) for name in _drawn_once(it.estimator)}
    return Chosen(
        it.estimator,
        _made(it.estimator, given, more),
        tuple(arguments),
        ", ".join(map(str, own.values())) or "no options",
    )


def _described(name: str) -> Description:
    """Of a name that was typed, or that stands in the configuration."""
    from curvkit.errors import InvalidArgument
    from curvkit.estimators import registry

    try:
        return registry.describe(name)
    except InvalidArgument as error:
        raise InvalidArgument(f"--estimator {name}: {error}") from error


def _drawn_once(name: str) -> list[str]:
    """Options of an estimator that say how often it draws, and that are once by default."""
    from curvkit.estimators import registry

    return [option.name for option in registry.describe(name).options if option.name in DRAWS and option.default == "1"]


def _made(name: str, given: dict[str, str], more: dict[str, str]) -> DiagonalEstimator:
    """The estimator with more draws; without them where what was given leaves nothing to draw, or is refused itself."""
    from curvkit.errors import InvalidArgument
    from curvkit.estimators import registry

    try:
        return registry.build(name, {**more, **given})
    except InvalidArgument:
        return registry.build(name, given)


def destination(output: Saving, target: Target, *, plan: bool) -> Path | None:
    """Where -o writes, looked at before the work."""
    path = output.out
    if path is None:
        return None
    if plan:
        raise click.UsageError("--plan estimates nothing that -o could write: pass one of them.")
    if path.exists() and path.samefile(target.checkpoint):
        raise click.UsageError(f"--out {path} is the checkpoint itself. Choose another name.")
    if path.exists() and not output.fresh:
        raise click.UsageError(f"{path} is already there and is not overwritten. Choose another name, or pass --fresh.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(
            f"--out {path}: its folder cannot be made ({(error.strerror or str(error)).lower()}). Choose another one."
        ) from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise click.UsageError(f"--out {path}: nothing can be written in its folder. Choose another one.")
    return path


def _may_have_a_function(target: Target) -> bool:
    """Whether a function could take what the estimator does not know; of one that a checkpoint names resolving knows."""
    configured = target.config is not None and target.config.objective is not None
    return target.objective is not None or configured


def _refuse_ambiguous(name: str, key: str, target: Target) -> None:
    """Refuse a name that the function has as well."""
    if key in _arguments(target):
        raise click.UsageError(
            f"--set {key}=...: the estimator {name} has {key}, and the function of the objective has it too. Write "
            f"--set {ESTIMATOR}{key}=... or --set {FUNCTION}{key}=..."
        )


def _arguments(target: Target) -> Iterable[str]:
    """Names of the function's arguments, read off its file without running it; nothing where that does not show them."""
    reference, base = target.objective, Path()
    if reference is None and target.config is not None:
        reference, base = target.config.objective, target.config.directory
    place, _, function = (reference or "").rpartition(":")
    if not place.endswith(".py"):
        return ()
    try:
        tree = ast.parse((base / place).read_bytes())
    except (OSError, SyntaxError, ValueError):  # which resolving says
        return ()
    made = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return [argument.arg for node in made[-1:] for argument in (*node.args.args, *node.args.kwonlyargs)]
