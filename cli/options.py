"""The options that commands share, in groups; each group reaches the command as one frozen object."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Bytes(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """A number of bytes: 4GiB, 500MB, 1e9."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read text like 4GiB."""
        units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", str(value).strip().lower())
        if match and match[2].removesuffix("ytes") in units:
            try:
                size = int(float(match[1]) * units[match[2]])
            except (ValueError, KeyError, OverflowError):
                size = 0
            if size > 0:
                return size
        self.fail(f"{value!r} is not a size. Write for example 4GiB or 500MB.", param, ctx)


class Seconds(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """A time: 90, 90s, 2m, 1.5h."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read text like 2m."""
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([smh]?)", str(value).strip().lower())
        if match and float(match[1]) > 0:
            return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
        self.fail(f"{value!r} is not a time. Write for example 90s, 2m or 1h.", param, ctx)


class Assignment(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """KEY=VALUE."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Divide at the first equals sign."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not of the form KEY=VALUE, for example hidden=128.", param, ctx)
        return key, text


@dataclass(frozen=True)
class Target:
    """What is measured."""

    checkpoint: Path
    objective: str | None
    set: tuple[tuple[str, str], ...]
    params: tuple[str, ...]
    mode: str
    device: str
    dtype: str


@dataclass(frozen=True)
class Data:
    """On which data."""

    batches: int | None
    data_doubt: bool


@dataclass(frozen=True)
class Budget:
    """How exactly, and at what cost."""

    tolerance: float
    max_products: int | None
    max_time: float | None
    memory: int | None
    residency: str
    rule: str
    rounding: str
    preflight: bool
    cross_check: str | None
    plan: bool
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """How a sampled number is computed, how exactly, and at what cost."""

    method: str
    tolerance: float
    absolute_tolerance: float | None
    rank: int | None
    max_products: int
    max_time: float | None
    memory: int | None
    residency: str
    rule: str
    preflight: bool
    cross_check: str | None
    plan: bool
    seed: int | None


@dataclass(frozen=True)
class Output:
    """How it is shown."""

    format: str
    out: Path | None
    fresh: bool
    strict: bool
    quiet: bool
    color: str


BATCHES = click.option("--batches", type=click.IntRange(min=1), metavar="N", help="Use only the first N batches.")
MAX_TIME = click.option("--max-time", type=Seconds(), metavar="TIME", help="Stop a search after this time, e.g. 60s.")
MEMORY = click.option("--memory", type=Bytes(), metavar="SIZE", help="For graphs and basis together, e.g. 4GiB.")
PREFLIGHT = click.option(
    "--preflight/--no-preflight",
    default=True,
    show_default=True,
    help="Check second derivatives on a few rows before anything long.",
)
CROSS_CHECK = click.option(
    "--cross-check",
    type=click.Choice(["pyhessian"]),
    help="Then also measure by this package, and compare; it needs curvkit[pyhessian].",
)
PLAN = click.option(
    "--plan", is_flag=True, help="Only say how it would be measured, with estimates of memory and time, and stop."
)
RESIDENCY = click.option(
    "--residency",
    type=click.Choice(["auto", "retained", "streamed"]),
    default="auto",
    show_default=True,
    help="Keep gradient graphs, or build them for each product.",
)

RULE = click.option(
    "--rule",
    type=click.Choice(["reverse", "difference"]),
    default="reverse",
    show_default=True,
    help="Second derivatives, or differences of gradients in float64 for smooth models that have none.",
)


def target(command: Command) -> Command:
    """The checkpoint and what is done with its model."""
    return _group(
        Target,
        click.argument("checkpoint", type=click.Path(exists=True, path_type=Path)),
        click.option(
            "--objective", metavar="FILE.py:FUNC", help="Function that returns curvkit.Objective(model, loss, data)."
        ),
        click.option("--set", type=Assignment(), multiple=True, metavar="K=V", help="Argument of that function."),
        click.option(
            "--params", multiple=True, metavar="GLOB", help="Only parameters whose name matches, e.g. 'head.*'."
        ),
        click.option(
            "--mode",
            type=click.Choice(["eval", "train", "asis"]),
            default="eval",
            show_default=True,
            help="Mode of the model.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto takes CUDA if it is there."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "float64"]),
            default="auto",
            show_default=True,
            help="Precision; auto keeps the model's, half precision is raised to float32.",
        ),
    )(command)


def data(command: Command) -> Command:
    """The data."""
    return _group(
        Data,
        BATCHES,
        click.option(
            "--data-doubt/--no-data-doubt",
            default=True,
            show_default=True,
            help="Also measure how far the result depends on the sample (doubles the cost).",
        ),
    )(command)


def budget(command: Command) -> Command:
    """Accuracy and cost."""
    return _group(
        Budget,
        click.option(
            "--tolerance", "--tol", type=float, default=1e-3, show_default=True, help="Relative residual to reach."
        ),
        click.option(
            "--max-products",
            "--max-hvp",
            type=click.IntRange(min=2),
            help="Most Hessian products of the search.  [default: 500, or 20 per eigenvalue]",
        ),
        MAX_TIME,
        MEMORY,
        RESIDENCY,
        RULE,
        click.option(
            "--rounding",
            type=click.Choice(["auto", "float64", "perturbation"]),
            default="auto",
            show_default=True,
            help="How rounding is seen: residuals in float64, or products repeated on perturbed weights; auto takes the cheaper.",
        ),
        PREFLIGHT,
        CROSS_CHECK,
        PLAN,
        click.option("--seed", type=click.IntRange(min=0), help="Of the random start; drawn and recorded if absent."),
    )(command)


def sampling(command: Command) -> Command:
    """Method, accuracy and cost of a trace."""
    return _group(
        Sampling,
        click.option(
            "--method",
            type=click.Choice(["auto", "exact", "hutchinson", "deflated", "hutch++", "xtrace"]),
            default="auto",
            show_default=True,
            help="auto decides by predicted cost, after 30 probes.",
        ),
        click.option(
            "--tolerance",
            "--tol",
            type=float,
            default=0.05,
            show_default=True,
            help="Half-width of the 95 % interval to reach, relative to the trace.",
        ),
        click.option("--absolute-tolerance", type=float, metavar="H", help="A half-width that suffices in any case."),
        click.option(
            "--rank", type=click.IntRange(min=1), metavar="R", help="Dimensions whose trace is taken without sampling."
        ),
        click.option(
            "--max-products",
            "--max-hvp",
            type=click.IntRange(min=2),
            default=500,
            show_default=True,
            help="Most Hessian products.",
        ),
        MAX_TIME,
        MEMORY,
        RESIDENCY,
        RULE,
        PREFLIGHT,
        CROSS_CHECK,
        PLAN,
        click.option("--seed", type=click.IntRange(min=0), help="Of every draw; drawn and recorded if absent."),
    )(command)


def output(command: Command) -> Command:
    """Format and files."""
    return _group(
        Output,
        click.option(
            "--format",
            type=click.Choice(["auto", "table", "plain", "json"]),
            default="auto",
            show_default=True,
            help="auto: a table on a terminal, tab-separated lines elsewhere.",
        ),
        click.option("--json", "format", flag_value="json", help="Same as --format json: one document."),
        click.option("--plain", "format", flag_value="plain", help="Same as --format plain."),
        click.option(
            "-o",
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Also write the JSON document into DIR.",
        ),
        click.option("--fresh", is_flag=True, help="With -o: replace an earlier result."),
        click.option("--strict", is_flag=True, help="Exit with 5 if not converged."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and notes on stderr."),
        click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True),
    )(command)


def _group(kind: type[Any], *options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Add options to a command and hand their values over as one object, named like its class in lower case."""
    names = [field.name for field in fields(kind)]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def bundled(**values: Any) -> Any:
            own = {name: values.pop(name) for name in names}
            return command(**values, **{kind.__name__.lower(): kind(**own)})

        decorated: Any = bundled
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
