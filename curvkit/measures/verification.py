"""Is a stated sharpness true? Everything that can be recomputed from its eigenvectors is, beside what was stated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvkit.linalg import lanczos
from curvkit.linalg.basis import dot, norm
from curvkit.linalg.certificate import PERTURBATION, assumed_error
from curvkit.linalg.certificate import ROUNDING as ASSUMED
from curvkit.measures.data_doubt import spread
from curvkit.measures.definitions import definition
from curvkit.measures.eigenvalues import SharpnessSettings
from curvkit.measures.products import other_arithmetic
from curvkit.measures.restored import precision_of, sharpness_of
from curvkit.measures.verified_parts import Check, sharpness_parts
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, Hessian
from curvkit.operators.batchwise import BatchwiseOperator
from curvkit.operators.difference import DifferenceGraph
from curvkit.operators.plan import Plan
from curvkit.results import Definition

ROUNDED = 64.0
"""Numbers that differ by less than ROUNDED eps of their size may be the same; rounding that is stated to be more is measured again."""
LENIENT = 30.0
"""A stated rounding may be so many times what is measured now: two draws of perturbations differ by less."""
DIFFERENCES = 1e-6
"""Error of a product by differences of gradients relative to ||H||; smooth networks show 1e-9 and less."""
CLOSE = 1e-3
"""The norm of a gradient that nearly vanishes, and curvature of a single batch, round more than sums over all the data."""


def verify_sharpness(
    objective: Objective, document: Mapping[str, Any], vectors: Tensor, engine: SharpnessSettings
) -> Iterator[Check]:
    """Recompute what a document of `curvkit sharpness -o` states, from its eigenvectors.

        theta_i = v_i'H v_i,   r_i = ||H v_i - theta_i v_i||,   |theta_i - stated| <= e,   |r_i - stated| <= e

    where e is the rounding of the products then, which is not taken as larger than it can be, or as less than 64 eps, and of those now.

    Args:
        objective: The function, resolved anew; in any precision.
        document: As it was written.
        vectors: [k, n], one per row.
        engine: How products are computed now: rule, residency, memory.

    Yields:
        One check after the other.

    Raises:
        CurvkitError: If products cannot be computed.
        KeyError: If something is missing in the document.

    Cost: k products, and one for the spread; about ten more where the largest |eigenvalue| is not among those stated.
    """
    it, stated = document["result"], sharpness_of(document)
    pairs, operator = stated.eigenpairs, engine.operator(objective)
    yield from compared_definitions(stated.definition, operator)
    yield from compared_point(it, operator)
    rows = it["eigenvalues"]
    fits = vectors.ndim == 2 and vectors.shape == (len(rows), operator.n)
    yield Check("vectors", [len(rows), operator.n], list(vectors.shape), fits)
    if not fits:
        return
    yield from _orthonormal(vectors)
    values, residuals, error = _products(operator, vectors)
    size = values.abs().max().item()
    scale = size if pairs.scale <= (1 + CLOSE) * size else max(size, _largest(operator))
    yield Check("scale", pairs.scale, scale, abs(pairs.scale - scale) <= 0.1 * scale)
    precision = precision_of(pairs.residual_dtype)
    usual = usual_error(stated.plan, precision) * scale
    possible = _possible_rounding(objective, vectors, pairs.rounding, usual)
    least = (1 - CLOSE) * ASSUMED * torch.finfo(precision).eps * pairs.scale
    yield Check("rounding", pairs.rounding, possible, least <= pairs.rounding <= possible, bound=True)
    slack = max(min(pairs.rounding, possible), usual) + error
    found = zip(rows, values.tolist(), residuals.tolist(), strict=True)
    for number, (row, value, residual) in enumerate(found, start=1):
        yield from _pair(number, row, (value, residual), slack, pairs.rounding)
        enough = it["tolerance"] * max(abs(value), 1e-2 * scale)
        stands = row["converged"] is (row["residual"] <= enough and pairs.rounding <= enough)
        stands = stands or abs(residual - enough) <= slack
        yield Check(f"converged {number}", row["converged"], residual <= enough, stands)
    asked = document["record"]["run"]["settings"]["search"]
    yield Check("tolerance", it["tolerance"], asked["tolerance"], it["tolerance"] == asked["tolerance"])
    beyond = {"upper_bound": values.max().item(), "lower_bound": values.min().item()}
    for name, value in beyond.items():
        sign = 1.0 if name == "upper_bound" else -1.0
        if it[name] is not None:
            yield Check(name.replace("_", " "), it[name], value, sign * (it[name] - value) >= -slack, bound=True)
    if it["batch_spread"] is not None:
        yield _spread(it["batch_spread"], operator, vectors[stated.leading])
    yield from sharpness_parts(document, stated, operator)


def compared_definitions(stated: Definition, operator: BatchwiseOperator) -> Iterator[Check]:
    """Hold the matrix that was measured against the one that is there now.

    Args:
        stated: As it was written.
        operator: Of the objective that is there now.

    Yields:
        One check per field that two precisions have in common.
    """
    now = definition(operator)
    for name in ("matrix", "loss", "reduction", "terms", "examples", "batches", "parameters", "mode"):
        before, here = getattr(stated, name), getattr(now, name)
        if before != here or name == "parameters":
            yield Check(name, before, here, before == here)


def compared_point(it: Mapping[str, Any], operator: BatchwiseOperator) -> Iterator[Check]:
    """Hold loss and gradient against those of now.

    Args:
        it: The result, as it was written.
        operator: Of the objective that is there now.

    Yields:
        Two checks.
    """
    eps = torch.finfo(torch.float32 if it["definition"]["dtype"] == "float32" else operator.dtype).eps
    loss, gradient = operator.loss, norm(operator.gradient)
    yield Check("loss", it["loss"], loss, abs(it["loss"] - loss) <= ROUNDED * eps * max(abs(loss), 1.0))
    allowed = CLOSE * gradient + ROUNDED * eps * max(abs(loss), 1.0)
    yield Check("gradient norm", it["gradient_norm"], gradient, abs(it["gradient_norm"] - gradient) <= allowed)


def holding(checks: Sequence[Check]) -> bool:
    """Whether nothing that was recomputed is otherwise.

    Args:
        checks: Of one result.

    Returns:
        True if all hold that could be recomputed.
    """
    return all(check.holds is not False for check in checks)


def _orthonormal(vectors: Tensor) -> Iterator[Check]:
    inner = vectors.double() @ vectors.double().T
    allowed = max(ROUNDED, vectors.shape[1] ** 0.5) * torch.finfo(vectors.dtype).eps  # sums of n squares were rounded
    off = (inner.diagonal().sqrt() - 1.0).abs().max().item()
    yield Check("unit length", 0.0, off, off <= allowed)
    if len(vectors) > 1:
        across = (inner - torch.diag(inner.diagonal())).abs().max().item()
        yield Check("orthogonality", 0.0, across, across <= allowed)


def _products(operator: Hessian | DifferenceHessian, vectors: Tensor) -> tuple[Tensor, Tensor, float]:
    """[k] Rayleigh quotients and residuals, and the rounding of the products that they come from."""
    other, _ = other_arithmetic(operator)
    exact = operator if other.reference is None else other.reference
    V = vectors.T.to(exact.device, exact.dtype)
    Y = exact.matmat(V)
    columns = list(zip(V.unbind(1), Y.unbind(1), strict=True))
    values = torch.tensor([dot(v, y) / dot(v, v) for v, y in columns], dtype=torch.float64)
    residuals = [norm(y - theta * v) / norm(v) for (v, y), theta in zip(columns, values.tolist(), strict=True)]
    error = assumed_error(exact) * max(norm(y) for _, y in columns)
    if other.perturbed:
        moved = [norm(d) for P in other.perturbed for d in (P.matmat(V) - Y).unbind(1)]
        error = max(error, PERTURBATION * max(moved))
    return values, torch.tensor(residuals, dtype=torch.float64), error


def _largest(operator: Hessian | DifferenceHessian) -> float:
    """The largest |eigenvalue|, about: it may lie at the end of the spectrum that was not asked for."""
    found = lanczos.eigenpairs(operator, 1, which="magnitude", tolerance=0.05, max_products=40, seed=0)
    return found.values.abs().max().item()


def usual_error(plan: Plan, dtype: torch.dtype) -> float:
    """The error of a product relative to ||H|| that is believed without being measured again.

    Args:
        plan: By which products were computed.
        dtype: In which they were.

    Returns:
        64 eps; 1e-6 for differences of gradients.
    """
    return DIFFERENCES if plan.rule == DifferenceGraph.rule else ROUNDED * torch.finfo(dtype).eps


def _possible_rounding(objective: Objective, vectors: Tensor, stated: float, usual: float) -> float:
    """How large the rounding of a product can be: measured in float32 where more than usual is stated."""
    if stated <= usual:
        return usual
    operator = Hessian(objective.converted(dtype=torch.float32))
    other, _ = other_arithmetic(operator, "perturbation")
    V = vectors.T.to(operator.device, torch.float32)
    Y = operator.matmat(V)
    moved = [norm(d) for P in other.perturbed for d in (P.matmat(V) - Y).unbind(1)]
    return max(usual, LENIENT * PERTURBATION * max(moved))


def _pair(
    number: int, row: Mapping[str, Any], now: tuple[float, float], slack: float, rounding: float
) -> Iterator[Check]:
    value, residual = now
    yield Check(f"eigenvalue {number}", row["value"], value, abs(row["value"] - value) <= slack)
    yield Check(f"residual {number}", row["residual"], residual, abs(row["residual"] - residual) <= slack)
    half, tiny = row["residual"] + rounding, 1e-12 * (abs(value) + residual)
    ends = abs(row["low"] - (row["value"] - half)) <= tiny and abs(row["high"] - (row["value"] + half)) <= tiny
    ends = ends and row["low"] - slack <= value - residual and value + residual <= row["high"] + slack
    yield Check(f"interval {number}", [row["low"], row["high"]], [value - residual, value + residual], ends)


def _spread(stated: Mapping[str, Any], operator: BatchwiseOperator, v: Tensor) -> Check:
    found = spread(operator, v.to(operator.device, operator.dtype))
    before = [*stated["quotients"], stated["stderr"]]
    now = None if found is None else [*found.quotients, found.stderr]
    weights = [] if found is None else found.weights
    weighted = len(weights) == len(stated["weights"])
    weighted = weighted and all(abs(a - b) <= CLOSE * b for a, b in zip(stated["weights"], weights, strict=True))
    size = max(abs(q) for q in stated["quotients"])
    same = now is not None and len(now) == len(before)
    same = same and all(abs(a - b) <= CLOSE * size for a, b in zip(before, now or before, strict=True))
    return Check("batch spread", before, now, same and weighted and all(math.isfinite(q) for q in before))
