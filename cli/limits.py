"""The options of what stands beside the eigenvalues: the limit of the optimizer, and adaptive sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from .groups import Command, grouped, option

if TYPE_CHECKING:
    from curvkit.checkpoints.optimizer_state import OptimizerState, Unassigned
    from curvkit.measures import Sharpness, SharpnessSettings
    from curvkit.objectives import Objective
    from curvkit.results import Journal

Beside = Callable[["Objective", "Journal", "Iterator[Sharpness]"], "Iterator[Sharpness]"]
"""(objective, journal, steps of sharpness) -> the same steps, and those of what stands beside it."""


@dataclass(frozen=True)
class Limit:
    """What is wanted beside the eigenvalues."""

    limit: bool
    lr: float | None
    adaptive: bool | None


def _checked(ctx: click.Context, parameter: click.Parameter, lr: float | None) -> float | None:
    if lr is not None and not math.isfinite(lr):
        raise click.BadParameter(f"{lr} is no learning rate. Write a finite number above 0, for example 0.001.")
    return lr


def refuse_idle(it: Limit) -> None:
    """Refuse a learning rate that nothing is done with."""
    if it.lr is not None and not it.limit:
        raise click.UsageError("--lr asks what the limit would be, and --no-limit leaves it out: pass one of them.")


def limit(command: Command) -> Command:
    """The optimizer's limit and adaptive sharpness."""
    return grouped(
        Limit,
        "Beside",
        option(
            "--limit/--no-limit",
            default=True,
            show_default=True,
            help="Compare with the limit of stability of the checkpoint's optimizer (another search for Adam and its like).",
        ),
        option(
            "--lr",
            type=click.FloatRange(min=0.0, min_open=True),
            callback=_checked,
            metavar="LR",
            help="What if: the limit at this learning rate, all groups scaled together.",
        ),
        option(
            "--adaptive/--no-adaptive",
            default=None,
            help="Curvature per relative change of the weights, too  [default: where weights are scale-invariant]",
        ),
    )(command)


def searches(it: Limit, state: OptimizerState | Unassigned | None) -> int:
    """How many searches stand beside that for the eigenvalues, as far as that is known before anything is measured."""
    from curvkit.checkpoints.optimizer_state import OptimizerState

    alone = isinstance(state, OptimizerState) and state.name == "SGD" and len(state.groups) == 1
    return int(it.adaptive is True) + int(isinstance(state, OptimizerState) and not alone)


def wanted(it: Limit) -> dict[str, Any]:
    """What a run that is gone on with must have in common."""
    return asdict(it)


def beside(
    it: Limit,
    state: Callable[[], OptimizerState | Unassigned | None],
    settings: SharpnessSettings,
    objective: Objective,
    journal: Journal,
    steps: Iterator[Sharpness],
) -> Iterator[Sharpness]:
    """Follow the steps of sharpness with those of what stands beside it; the last of them alone is complete."""
    from curvkit.measures import Companions

    result: Sharpness | None = None
    for result in steps:
        yield replace(result, stage="adaptive") if result.stage == "complete" else result
    if result is not None and result.stage == "complete":
        yield from Companions(state(), it.lr, it.adaptive).steps(objective, result, settings, journal=journal)
