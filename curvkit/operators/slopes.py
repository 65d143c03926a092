"""Is the gradient the derivative of the loss? Differences of the loss itself, parameter by parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.linalg.basis import dot, norm
from curvkit.operators.moving import Moving

TINY = torch.finfo(torch.float64).tiny
FIRST_IN_DOUBLE, FIRST_IN_SINGLE, FIRST_AGREES = (1e-4, 1e-6), (1e-2, 3e-3), 1e-2
"""Steps for differences of the loss, which tell whether the gradient is its derivative; the best must agree to a hundredth, in float32 to a
tenth. Seen: right at most 1e-5, wrong 0.1 to 1."""
MOST_NAMES = 200
"""Parameters that are looked at so, at four forward passes of two rows each."""
FLOOR = 1e-3
"""Slopes below this share of the gradient's norm are judged relative to that share."""


def estimated(moving: Moving, v: Tensor) -> tuple[str, ...]:
    """Find the parameters whose gradient is estimated: something else than the derivative of the loss.

        | (L(theta + h v_p) - L(theta - h v_p)) / 2h - g'v_p |     for the part v_p of each parameter p, at two steps, the best one counting

    Where one is, g is no gradient of the loss, so that no rule gives a Hessian: detached activations, straight-through estimators,
    gradients scaled by hooks.

    Args:
        moving: The function, on few rows.
        v: [n], a random direction; parameters of which it is zero are left out.

    Returns:
        Their names.

    Cost: four forward passes per parameter, and one gradient.
    """
    probe, batch = moving.objective, moving.objective.batches[0]
    gradient, value = moving.gradient(batch, moving.theta), moving.value(batch, moving.theta)
    double = probe.dtype == torch.float64
    steps, limit = (FIRST_IN_DOUBLE, FIRST_AGREES) if double else (FIRST_IN_SINGLE, 10 * FIRST_AGREES)
    size, eps, found = norm(gradient), torch.finfo(probe.dtype).eps, []
    for index, name in enumerate(probe.parameters.names[:MOST_NAMES]):
        w = torch.zeros_like(v)
        list(probe.parameters.split(w))[index].copy_(list(probe.parameters.split(v))[index])
        length = norm(w)
        if length == 0.0:
            continue
        w, errors = w / length, []
        slope = dot(gradient, w)
        for step in steps:
            h = step * moving.scale
            quotient = (moving.value(batch, moving.theta + h * w) - moving.value(batch, moving.theta - h * w)) / (2 * h)
            noise = 1e3 * eps * abs(value) / h
            errors.append(abs(quotient - slope) / max(abs(slope), abs(quotient), FLOOR * size, noise, TINY))
        if not min(errors) <= limit:
            found.append(name)
    return tuple(found)
