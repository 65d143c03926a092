"""Learning rates beside the largest stable one: which of them the figures are of, and which can be compared with those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from curvkit.checkpoints.learning_rates import Rate
from curvkit.checkpoints.optimizer_state import OptimizerState
from curvkit.measures.frozen_state import common
from curvkit.measures.limit_verdict import DECAYED
from curvkit.measures.stability_result import RateRatio, Stability

CYCLED = {"initial_lr": "max_momentum", "peak": "base_momentum"}
"""What the momentum (beta1) is at a rate: OneCycleLR and CyclicLR, which move it against the learning rate, write it into the groups."""


def reference_rate(state: OptimizerState, lr: float | None) -> tuple[tuple[Rate, ...], Rate]:
    """Choose the rate that the figures are of: the one that is asked for, else the present one unless it says nothing.

    Args:
        state: With its rates.
        lr: What if: the largest of the groups; None for a rate of the state.

    Returns:
        All rates that are to be shown, and the chosen one.
    """
    current = next(rate for rate in state.rates if rate.label == "current")
    highest = max(state.rates, key=lambda rate: max(rate.values))
    base = current if max(current.values) >= DECAYED * max(highest.values) else highest
    if lr is None:
        return state.rates, base
    most = max(base.values)
    given = Rate("given", tuple(lr * value / most if most > 0.0 else lr for value in base.values), "as asked")
    return (*state.rates, given), given


def at_rate(state: OptimizerState, rate: Rate) -> tuple[OptimizerState, tuple[str, ...]]:
    """The state with the momentum that goes with a learning rate, where a schedule moves both.

    Args:
        state: With the momentum of the next step.
        rate: One of its rates, or one that is asked for, at the present momentum.

    Returns:
        The state, and a note if the momentum is another one.
    """
    momenta = _momenta(state, rate)
    if _alike(momenta, _momenta(state)):
        return state, ()
    groups = tuple(_moved(group, momentum) for group, momentum in zip(state.groups, momenta, strict=True))
    there, now = _said(momenta), _said(_momenta(state))
    said = f"at the learning rate {max(rate.values):.4g} the momentum is {there}, which the figures are of; at present it is {now}"
    return replace(state, groups=groups), (said,)


def ratio_of(rate: Rate, reference: Rate, result: Stability, state: OptimizerState) -> RateRatio:
    """A rate over the largest stable one, if its groups stand in the proportions that were measured, at the same momentum.

    Args:
        rate: The rate.
        reference: That the figures are of.
        result: The figures.
        state: Whose rates these are.

    Returns:
        The ratio; None with the reason behind the source where there is none.
    """
    largest, measured, interval = max(rate.values), max(reference.values), result.ratio_interval
    momenta = _momenta(state, rate)
    if largest > 0.0 and not _alike(momenta, _momenta(state, reference)):
        why = f"{rate.source}; the momentum is another one there, {_said(momenta)}"
        return RateRatio(rate.label, largest, why, None)
    if largest > 0.0 and not _alike([a / largest for a in rate.values], [b / measured for b in reference.values]):
        return RateRatio(rate.label, largest, f"{rate.source}; its groups stand in other proportions", None)
    if largest == 0.0 or result.ratio is None or interval is None:
        return RateRatio(rate.label, largest, rate.source, None)
    factor = largest / measured
    return RateRatio(
        rate.label, largest, rate.source, factor * result.ratio, (factor * interval[0], factor * interval[1])
    )


def _momenta(state: OptimizerState, rate: Rate | None = None) -> tuple[float, ...]:
    """Momentum or beta1 of each group; that of the next step for no rate."""
    return tuple(_momentum(group, CYCLED.get(rate.label) if rate is not None else None) for group in state.groups)


def _momentum(group: Mapping[str, Any], key: str | None) -> float:
    betas = group.get("betas")
    own = betas[0] if betas else group.get("momentum") or 0.0
    cycled = group.get(key) if key is not None else None
    return float(cycled if isinstance(cycled, int | float) and not isinstance(cycled, bool) else own)


def _moved(group: Mapping[str, Any], momentum: float) -> Mapping[str, Any]:
    betas = group.get("betas")
    return {**group, "betas": (momentum, *betas[1:])} if betas else {**group, "momentum": momentum}


def _said(momenta: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in dict.fromkeys(momenta))


def _alike(these: Sequence[float], those: Sequence[float]) -> bool:
    return all(a == b or common([a, b]) is not None for a, b in zip(these, those, strict=True))
