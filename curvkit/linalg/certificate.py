"""What may be claimed of a search: estimates while it runs, residuals from true products at its end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from curvkit.linalg import missed
from curvkit.linalg.basis import dot, norm
from curvkit.linalg.maps import LinearMap
from curvkit.linalg.settings import Settings, allowed
from curvkit.linalg.state import LanczosState
from curvkit.results.eigenpairs import Eigenpairs

ROUNDING = 8.0
"""The rounding error of a product is taken as ROUNDING eps ||A|| where it is not measured. Hessian products in float32: 1 to 4 eps for
small networks on standardised data, but up to several hundred on deep ReLU networks and on badly scaled inputs: there it is measured."""
ASYMMETRY = 100.0
"""Asymmetry above this times eps ||A|| is no rounding. Seen in float32, two draws each: at most 0.7 on MLP, ResNet and decoder; on networks
with a wrong second derivative at least 1.9e3."""
PERTURBATION = 4.0
"""What perturbations by one rounding change is multiplied by this. Held against float64 on 17 networks: four times the larger of two draws
was 2 to 120 times the true error, and 0.75 times on one whose inputs were of size 1e4: an estimate, not a bound."""
CONFIDENCE = 0.99
"""Probability of the claim that no eigenvalue lies above the one bound or below the other."""
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class OtherArithmetic:
    """The same matrix computed in other ways, to see what rounding does to its products."""

    reference: LinearMap | None = None
    """In a higher precision: residuals are recomputed with it."""
    perturbed: tuple[LinearMap, ...] = ()
    """With everything moved by one rounding, where there is no reference."""

    def products(self, num: int) -> int:
        """How many products a certificate of `num` vectors takes.

        Args:
            num: Vectors.

        Returns:
            Products with any of the maps.
        """
        return num + (1 if self.reference is not None else num * len(self.perturbed))


AS_COMPUTED = OtherArithmetic()


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
    pairs = Eigenpairs(
        values=state.values,
        residuals=state.residuals,
        converged=state.residuals <= allowed(state.values, state.scale, settings.tolerance),
        vectors=None,
        recomputed=False,
        which=settings.which,
        tolerance=settings.tolerance,
        scale=state.scale,
        asymmetry=state.asymmetry,
        rounding=assumed_error(A) * state.scale,
        products=state.products + spent,
        multiplicities_below=A.n + 1 if state.spanned else settings.block_size,
        residual_dtype=str(A.dtype).removeprefix("torch."),
        asked=settings.num,
    )
    return bounded(pairs, A, state, assumed_error(A))


def certified(
    A: LinearMap, state: LanczosState, partial: Eigenpairs, other: OtherArithmetic = AS_COMPUTED
) -> Eigenpairs:
    """Compute Rayleigh quotients and residuals anew, from one true product per vector.

        theta_i = v_i'A v_i / v_i'v_i,    r_i = ||A v_i - theta_i v_i|| / ||v_i||

    With a reference, the same matrix in a higher precision, these products are the reference's, so that the rounding of A is part of
    the residual, not an assumption beside it; one more product with A, of the outermost vector, measures its error for the bounds.
    With perturbed maps the products are A's, and their rounding is taken as four times the largest difference that a perturbation makes.

    Args:
        A: The matrix.
        state: The latest.
        partial: What it showed.
        other: The same matrix by other arithmetic, if there is any.

    Returns:
        The result with vectors and recomputed residuals.

    Cost: k products; one more with a reference, k more with each perturbed map.
    """
    exact = A if other.reference is None else other.reference
    rows = state.vectors()  # [k, n]
    V = rows.T.to(exact.dtype)
    products = exact.matmat(V).T if len(rows) > 1 else exact.matvec(V[:, 0])[None]
    values = torch.tensor([dot(v, Av) / dot(v, v) for v, Av in zip(V.T, products, strict=True)], dtype=torch.float64)
    residuals = torch.tensor(
        [norm(Av - theta * v) / norm(v) for v, Av, theta in zip(V.T, products, values.tolist(), strict=True)],
        dtype=torch.float64,
    )
    if other.reference is not None:
        outermost = int(values.abs().argmax())
        error = norm(A.matvec(rows[outermost]).to(exact.dtype) - products[outermost]) / max(state.scale, TINY)
        partial = bounded(replace(partial, products=partial.products + 1), A, state, max(error, assumed_error(A)))
        partial = replace(partial, rounding=assumed_error(exact) * state.scale, rounding_measured=True)
    elif other.perturbed:
        moved = [norm(row) for P in other.perturbed for row in P.matmat(V).T - products]
        error = max(assumed_error(A), PERTURBATION * max(moved) / max(state.scale, TINY))
        spent = partial.products + len(rows) * len(other.perturbed)
        partial = bounded(replace(partial, products=spent), A, state, error)
        partial = replace(partial, rounding=error * state.scale, rounding_measured=True)
    order = values.argsort(descending=True)
    enough = allowed(values[order], state.scale, partial.tolerance)
    return replace(
        partial,
        values=values[order],
        residuals=residuals[order],
        converged=(residuals[order] <= enough) & (partial.rounding <= enough),
        vectors=rows[order].T,
        recomputed=True,
        residual_dtype=str(exact.dtype).removeprefix("torch."),
        products=partial.products + len(rows),
    )


def bounded(pairs: Eigenpairs, A: LinearMap, state: LanczosState, product_error: float) -> Eigenpairs:
    """State the bounds beyond which no eigenvalue lies.

    Args:
        pairs: A result.
        A: The matrix; only its order is read.
        state: The latest.
        product_error: Error of one product relative to ||A||.

    Returns:
        The result with the bounds.
    """
    rounding = product_error * state.scale
    if state.asymmetry > ASYMMETRY / ROUNDING * rounding:
        upper, lower, confidence = None, None, None  # the bounds are theorems about symmetric matrices
    elif state.spanned:
        upper, lower, confidence = state.highest + rounding, state.lowest - rounding, 1.0
    elif state.chain:
        each = (1 + CONFIDENCE) / 2  # so that both hold together with CONFIDENCE
        chain = replace(state.chain, product_error=product_error)
        upper, lower = missed.upper_bound(chain, each), missed.lower_bound(chain, each)
        # later values may have grown by rounding
        upper = None if upper is None else max(upper, state.highest + rounding)
        lower = None if lower is None else min(lower, state.lowest - rounding)
        confidence = CONFIDENCE
    else:
        upper, lower, confidence = None, None, None
    return replace(pairs, upper_bound=upper, lower_bound=lower, confidence=confidence, product_error=product_error)


def asymmetry_limit(pairs: Eigenpairs) -> float:
    """How far products may be from those of a symmetric matrix by rounding.

    Args:
        pairs: A result; its scale and the error of its products are read.

    Returns:
        In the unit of the eigenvalues.
    """
    return ASYMMETRY / ROUNDING * pairs.product_error * pairs.scale


def assumed_error(A: LinearMap) -> float:
    """The error of a product relative to ||A||, where nothing else is known.

    Args:
        A: The matrix; its attribute `product_error` is read if it has one, as for products by differences.

    Returns:
        The larger of that and 8 eps.
    """
    return max(ROUNDING * torch.finfo(A.dtype).eps, getattr(A, "product_error", 0.0))
