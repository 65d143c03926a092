"""What may be claimed of a search: estimates while it runs, residuals from true products at its end."""

from __future__ import annotations

from dataclasses import replace

import torch

from curvkit.linalg import missed
from curvkit.linalg.basis import dot, norm
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.settings import Settings, allowed
from curvkit.linalg.state import LanczosState
from curvkit.results.eigenpairs import Eigenpairs

ROUNDING = 8.0
"""The rounding error of a product is taken as ROUNDING eps ||A||. Measured for Hessian products in float32: 3 to 4 eps for networks on
standardised data, above 100 eps where inputs have a mean many times their spread; then float64 is the way."""
CONFIDENCE = 0.99
"""Probability of the claim that no eigenvalue lies above the one bound or below the other."""


def partial(A: LinearMap, state: LanczosState, settings: Settings, spent: int) -> Eigenpairs:
    """Say what a state shows, its residuals being the recurrence's estimates.

    Args:
        A: The matrix; only its dtype and order are read.
        state: The latest.
        settings: What is wanted.
        spent: Products beside those of the state.

    Returns:
        A result without vectors.
    """
    rounding = ROUNDING * torch.finfo(A.dtype).eps * state.scale
    if state.spanned:
        upper, lower, confidence = state.highest + rounding, state.lowest - rounding, 1.0
    elif state.chain:
        each = (1 + CONFIDENCE) / 2  # so that both hold together with CONFIDENCE
        upper, lower = missed.upper_bound(state.chain, each), missed.lower_bound(state.chain, each)
        upper = (
            None if upper is None else max(upper, state.highest + rounding)
        )  # later values may have grown by rounding
        lower = None if lower is None else min(lower, state.lowest - rounding)
        confidence = CONFIDENCE
    else:
        upper, lower, confidence = None, None, None
    return Eigenpairs(
        values=state.values,
        residuals=state.residuals,
        converged=state.residuals <= allowed(state.values, state.scale, settings.tolerance),
        vectors=None,
        recomputed=False,
        which=settings.which,
        tolerance=settings.tolerance,
        scale=state.scale,
        asymmetry=state.asymmetry,
        rounding=rounding,
        products=state.products + spent,
        upper_bound=upper,
        lower_bound=lower,
        confidence=confidence,
        multiplicities_below=A.n + 1 if state.spanned else settings.block_size,
        asked=settings.num,
    )


def certified(A: LinearMap, state: LanczosState, partial: Eigenpairs) -> Eigenpairs:
    """Compute Rayleigh quotients and residuals anew, from one true product per vector.

    Args:
        A: The matrix.
        state: The latest.
        partial: What it showed.

    Returns:
        The result with vectors and recomputed residuals.

    Cost: k products.
    """
    rows = state.vectors()  # [k, n]
    products = A.matmat(rows.T).T if len(rows) > 1 else A.matvec(rows[0])[None]
    values = torch.tensor([dot(v, Av) / dot(v, v) for v, Av in zip(rows, products, strict=True)], dtype=torch.float64)
    residuals = torch.tensor(
        [norm(Av - theta * v) / norm(v) for v, Av, theta in zip(rows, products, values.tolist(), strict=True)],
        dtype=torch.float64,
    )
    order = values.argsort(descending=True)
    return replace(
        partial,
        values=values[order],
        residuals=residuals[order],
        converged=residuals[order] <= allowed(values[order], state.scale, partial.tolerance),
        vectors=rows[order].T,
        recomputed=True,
        products=partial.products + len(rows),
    )
