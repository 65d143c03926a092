"""The lines on stability that stand below the eigenvalues."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curvkit.measures import Stability
    from curvkit.measures.stability_result import RateRatio

NAMED = ". Names go with the state if the optimizer is made from model.named_parameters(), or saved with curvkit.save"
LABELS = {"current": "the lr of the checkpoint", "initial_lr": "initial_lr", "peak": "the peak lr", "given": "--lr"}


def remarks(found: Stability | None) -> list[tuple[str, str]]:
    """Limit, largest stable learning rate, other learning rates, and what the letters mean."""
    if found is None:
        return []
    if found.value is None or found.interval is None or found.ratio is None:
        advice = NAMED if found.reason is not None and "no names" in found.reason else ""
        return [("limit", f"no stability limit: {found.reason}{advice}")]
    from curvkit.measures.limit_verdict import CAVEAT

    low, high = found.interval
    said = found.verdict or f"no verdict: {found.reason or 'not complete'}"
    made = [
        (
            "limit",
            f"{found.quantity} = {found.value:.4g} in [{low:.4g}, {high:.4g}]; {found.optimizer}'s limit at lr {found.lr:.4g} is "
            f"{found.limit_text} = {found.limit:.4g}: {found.ratio:.3g} of it, {said}",
        ),
        ("largest lr", _largest(found)),
    ]
    others = [_rate(rate) for rate in found.rates if rate.label != found.reference]
    if others:
        made.append(("other lr", "; ".join(others)))
    if found.legend is not None:
        made.append(("letters", found.legend))
    made.append(("caution", CAVEAT))
    return made


def _largest(found: Stability) -> str:
    value, ends = found.largest_stable_lr, found.largest_stable_lr_interval
    if value is None or ends is None or found.interval is None:
        return "not known"
    if found.converged and found.interval[1] <= 0.0:
        return "no curvature is positive: every learning rate is below the limit of the quadratic model"
    if not found.converged:
        most = "" if math.isinf(ends[1]) else f", but at most {ends[1]:.4g}"
        return f"not known{most}: the eigenvalue has not converged and may be larger"
    if math.isinf(value):
        return f"not known: the interval of the eigenvalue reaches above 0, up to {found.interval[1]:.4g}"
    upper = "infinity" if math.isinf(ends[1]) else f"{ends[1]:.4g}"
    return (
        f"{value:.4g} in [{ends[0]:.4g}, {upper}] is the largest that is stable on the quadratic model at these weights"
    )


def _rate(rate: RateRatio) -> str:
    """Another learning rate, as a share of the largest stable one."""
    name = f"{LABELS.get(rate.label, rate.label)} {rate.lr:.4g}"
    if rate.lr == 0.0:
        return f"{name}: no step at all"
    return f"{name}: not comparable ({rate.source})" if rate.ratio is None else f"{name}: {rate.ratio:.3g} of the limit"
