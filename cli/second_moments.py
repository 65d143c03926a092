"""The state of the checkpoint's optimizer, for the estimator that reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from .estimation import Chosen
from .records import OPTIMIZER

if TYPE_CHECKING:
    from curvkit.checkpoints.optimizer_state import OptimizerState as StoredState
    from curvkit.checkpoints.optimizer_state import Unassigned
    from curvkit.errors import CurvkitError
    from curvkit.objectives import Objective


def are_read(chosen: Chosen) -> bool:
    """Whether the estimator reads them."""
    from curvkit.estimators import OptimizerState

    return isinstance(chosen.estimator, OptimizerState)


def found(ctx: click.Context, chosen: Chosen, objective: Objective) -> Chosen:
    """Give the state of the checkpoint's optimizer to the estimator that reads it, if it is there and surely of these parameters."""
    from curvkit.checkpoints.optimizer_state import Unassigned
    from curvkit.estimators import OptimizerState
    from curvkit.measures.state_evidence import confirm

    if not isinstance(chosen.estimator, OptimizerState):
        return chosen
    state: StoredState | Unassigned = ctx.meta[OPTIMIZER]
    if isinstance(state, Unassigned):
        raise _stateless(chosen, state.reason)
    doubt = None if state.certain else confirm(state, objective)
    if doubt is not None:
        raise _stateless(chosen, doubt)
    return replace(chosen, estimator=chosen.estimator.bound(replace(state, certain=True)))


def _stateless(chosen: Chosen, reason: str) -> CurvkitError:
    from curvkit.errors import UnknownObjective

    return UnknownObjective(
        f"--estimator {chosen.name}: no second moment can be read: {reason}. Use --estimator fisher or empirical-fisher, which need the "
        "model and data alone."
    )
