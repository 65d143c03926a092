"""How exactly a number is computed, and at what cost."""

from __future__ import annotations

from dataclasses import dataclass

import click

from .groups import Command, grouped, option
from .values import Bytes, Seconds


@dataclass(frozen=True)
class Budget:
    """How exactly, and at what cost."""

    tolerance: float
    max_products: int | None
    max_time: float | None
    memory: int | None
    residency: str
    rule: str
    arithmetic: str
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


HEADING = "Accuracy and cost"
MAX_TIME = option("--max-time", type=Seconds(), metavar="TIME", help="Stop a search after this time, e.g. 60s.")
MEMORY = option("--memory", type=Bytes(), metavar="SIZE", help="For graphs and basis together, e.g. 4GiB.")
PREFLIGHT = option(
    "--preflight/--no-preflight",
    default=True,
    show_default=True,
    help="Check second derivatives on a few rows before anything long.",
)
CROSS_CHECK = option(
    "--cross-check",
    type=click.Choice(["pyhessian"]),
    help="Then also measure by this package, and compare; it needs curvkit[pyhessian].",
)
PLAN = option(
    "--plan", is_flag=True, help="Only say how it would be measured, with estimates of memory and time, and stop."
)
RESIDENCY = option(
    "--residency",
    type=click.Choice(["auto", "retained", "streamed"]),
    default="auto",
    show_default=True,
    help="Keep gradient graphs, or build them for each product.",
)
RULE = option(
    "--rule",
    type=click.Choice(["reverse", "difference"]),
    default="reverse",
    show_default=True,
    help="Second derivatives, or differences of gradients in float64 for smooth models that have none.",
)


def budget(command: Command) -> Command:
    """Accuracy and cost."""
    return grouped(
        Budget,
        HEADING,
        option("--tolerance", "--tol", type=float, default=1e-3, show_default=True, help="Relative residual to reach."),
        option(
            "--max-products",
            "--max-hvp",
            type=click.IntRange(min=2),
            help="Most Hessian products of the search.  [default: 500, or 20 per eigenvalue]",
        ),
        MAX_TIME,
        MEMORY,
        RESIDENCY,
        RULE,
        option(
            "--arithmetic",
            type=click.Choice(["exact", "bfloat16"]),
            default="exact",
            show_default=True,
            help="bfloat16 searches in mixed precision, and recomputes values and residuals in float32; it needs --tolerance 0.02.",
        ),
        option(
            "--rounding",
            type=click.Choice(["auto", "float64", "perturbation"]),
            default="auto",
            show_default=True,
            help="How rounding is seen: residuals in float64, or products repeated on perturbed weights; auto takes the cheaper.",
        ),
        PREFLIGHT,
        CROSS_CHECK,
        PLAN,
        option("--seed", type=click.IntRange(min=0), help="Of the random start; drawn and recorded if absent."),
    )(command)


def sampling(command: Command) -> Command:
    """Method, accuracy and cost of a trace."""
    return grouped(
        Sampling,
        HEADING,
        option(
            "--method",
            type=click.Choice(
                ["auto", "exact", "hutchinson", "deflated", "hutch++", "xtrace", "example-hutchinson", "controlled"]
            ),
            default="auto",
            show_default=True,
            help="auto decides by predicted cost: signs per example where there are many, else after 30 probes.",
        ),
        option(
            "--tolerance",
            "--tol",
            type=float,
            default=0.05,
            show_default=True,
            help="Half-width of the 95 % interval to reach, relative to the trace.",
        ),
        option("--absolute-tolerance", type=float, metavar="H", help="A half-width that suffices in any case."),
        option(
            "--rank", type=click.IntRange(min=1), metavar="R", help="Dimensions whose trace is taken without sampling."
        ),
        option(
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
        option("--seed", type=click.IntRange(min=0), help="Of every draw; drawn and recorded if absent."),
    )(command)
