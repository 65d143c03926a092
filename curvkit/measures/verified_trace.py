"""Is a stated trace true? Its mean, error and interval again from its samples, and some of the samples from products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.linalg import student
from curvkit.linalg.basis import norm
from curvkit.linalg.certificate import PERTURBATION, assumed_error
from curvkit.linalg.deflation import KrylovSubspace, krylov
from curvkit.linalg.hutchinson import part_sums, probe
from curvkit.linalg.maps import LinearMap
from curvkit.measures.example_way import METHODS
from curvkit.measures.products import other_arithmetic
from curvkit.measures.repeated_trace import again, in_precision
from curvkit.measures.restored import trace_of
from curvkit.measures.trace_result import Trace, TraceShare, shares
from curvkit.measures.traces import Operator, TraceSettings, lengths_of, unit
from curvkit.measures.vectors import rows_that_fit
from curvkit.measures.verification import CLOSE, compared_definitions, compared_point, usual_error
from curvkit.measures.verified_examples import sampled_again
from curvkit.measures.verified_parts import Check, common_parts, same_number
from curvkit.objectives import Objective
from curvkit.results import TraceParts

ALONG = 10.0
"""The part of a rounding error along a probe is about its length, seldom more; this many times is allowed."""
MOST = 10_000
"""More products beside those with every basis vector are not repeated: no document may ask for work without bound."""
PURPOSE = "verified probes"


def verify_trace(
    objective: Objective,
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None,
    engine: TraceSettings,
    num_probes: int,
) -> Iterator[Check]:
    """Recompute what a document of `curvkit trace -o` states.

    Mean, standard error, interval and shares follow from the samples; of these, `num_probes` are drawn and computed anew: x'Hx for
    "hutchinson", with signs per example for "example-hutchinson" and "controlled", whose exact part is computed again; for "deflated" the
    subspace is made again as well. The other methods, whose samples do not stand for themselves, are run again with the same seed.

    Args:
        objective: The function, resolved anew; in any precision.
        document: As it was written.
        tensors: "samples" [m, p] and "known" [p]; None where the method gives none.
        engine: How products are computed now: rule, residency, memory.
        num_probes: How many samples.

    Yields:
        One check after the other.

    Raises:
        CurvkitError: If products cannot be computed.
        InvalidArgument: If the vectors of a subspace do not fit into the memory.
        KeyError: If something is missing in the document.
        ValueError: If it has a number that cannot be, or would take more than 10,000 products beside those with every basis vector.

    Cost: `num_probes` products, and the subspace's; for the other methods what it cost then.
    """
    it, stated = document["result"], trace_of(document)
    found, operator = stated.estimate, engine.operator(objective)
    yield from compared_definitions(stated.definition, operator)
    yield from compared_point(it, operator)
    yield Check("quantity", it["quantity"], "trace of the Hessian", it["quantity"] == "trace of the Hessian")
    yield from common_parts(it, stated)
    now = unit(operator.objective)
    if it["unit"] != now:
        yield Check("unit", it["unit"], now, False)
    _refuse_impossible(document, operator, engine)
    samples = None if tensors is None else tensors["samples"]
    known = None if tensors is None else tensors["known"]
    if samples is not None and known is not None:
        p = len(operator.space.entries)
        fits = samples.shape == (found.probes, p) and known.shape == (p,)
        yield Check("samples", [found.probes, p], list(samples.shape), fits)
        if not fits:
            return
        yield from _shares(stated, it, operator, TraceParts(lengths_of(operator), known, samples))
    elif it["parameters"] or it["layers"]:
        yield Check("samples", [found.probes, len(it["parameters"])], None, False)
    yield from _interval(document, samples, known)
    if found.method in ("hutchinson", "deflated") and samples is not None and known is not None and len(samples):
        yield from _probes(operator, stated, (samples, known), num_probes)
    elif found.method in METHODS and samples is not None and known is not None and len(samples):
        yield from sampled_again(operator, stated, (samples, known), num_probes)
    elif found.method in METHODS:
        yield Check("samples", found.probes, None, False)
    else:
        yield from again(objective, operator, document, engine)


def _refuse_impossible(document: Mapping[str, Any], operator: Operator, engine: TraceSettings) -> None:
    """Before anything is allocated or repeated: a rank below the order, in memory, and products that end."""
    it, seed, n = document["result"], document["record"]["seed"], operator.n
    products, rank = it["search_products"], it["rank"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < seeds.SEED_LIMIT:
        raise ValueError(f"seed={seed!r} is none")
    if not it["by_structure"] and not 0 < products <= n + MOST:
        raise ValueError(f"search_products={products!r}, and at most {n + MOST:,} are repeated")
    vectors = 0 if it["method"] in ("exact", "hutchinson") else 2 * it["probes"] if it["method"] == "xtrace" else rank
    if not 0 <= vectors <= 2 * n or not 0 <= rank <= n:
        raise ValueError(f"rank={rank!r} and probes={it['probes']!r} do not fit the order {n:,}")
    if vectors and vectors > rows_that_fit(operator.objective, engine.memory_bytes, None):
        raise InvalidArgument(
            f"verify: {vectors:,} vectors of {n:,} parameters do not fit the memory budget, and {it['method']!r} holds them all. Raise the "
            "budget, or verify on a machine with more memory."
        )


def _interval(document: Mapping[str, Any], samples: Tensor | None, known: Tensor | None) -> Iterator[Check]:
    """What follows from the samples without a product."""
    it = document["result"]
    told, settings = it["trace"], document["record"]["run"]["settings"]["search"]
    value, stderr = told["value"], told["stderr"]
    if samples is not None and known is not None:
        totals, m = samples.sum(1), len(samples)
        value = (known.sum() + (totals.mean() if m else 0.0)).item()
        stderr = (totals.std() / m**0.5).item() if m > 1 else 0.0 if it["rank"] and told["exact"] else math.nan
        yield Check("trace", told["value"], value, same_number(told["value"], value))
        yield Check("standard error", told["stderr"], stderr, same_number(told["stderr"], stderr))
    rounding = told["rounding"] or 0.0
    probes = 0.0 if told["exact"] else student.half_width(told["stderr"] or 0.0, it["probes"])
    yield Check("rounding", told["rounding"], None, None)
    half = probes + rounding
    ends = [told["value"] - half, told["value"] + half]
    stands = all(same_number(a, b, abs(told["value"])) for a, b in zip((told["low"], told["high"]), ends, strict=True))
    yield Check("interval", [told["low"], told["high"]], ends, stands)
    allowed = max(it["tolerance"] * abs(told["value"]), it["absolute_tolerance"] or 0.0)
    converged = half <= allowed and (told["exact"] or it["probes"] >= student.LEAST)
    yield Check("converged", told["converged"], converged, told["converged"] is converged)
    certain = told["exact"] and told["rounding"] is None
    confidence = 1.0 if certain else student.CONFIDENCE
    yield Check("confidence", told["confidence"], confidence, told["confidence"] == confidence)
    exact = it["method"] == "exact"
    if told["exact"] is not exact:
        yield Check("exact", told["exact"], exact, False)
    mean = told["value"] / it["definition"]["parameters"]
    if not same_number(told["per_parameter"], mean):
        yield Check("per parameter", told["per_parameter"], mean, False)
    if settings["method"] not in ("auto", it["method"]):
        yield Check("method", it["method"], settings["method"], False)
    for name in ("tolerance", "absolute_tolerance"):
        if it[name] != settings[name]:
            yield Check(name.replace("_", " "), it[name], settings[name], False)


def _shares(stated: Trace, it: Mapping[str, Any], operator: Operator, parts: TraceParts) -> Iterator[Check]:
    """Of each parameter tensor and of each layer: the names of the model, and what the samples say of it."""
    by_layer, by_parameter = shares(operator.objective.model, operator.space, parts)
    for name, expected in (("parameters", by_parameter), ("layers", by_layer)):
        rows, size = it[name], max((abs(share.value) for share in expected), default=0.0)
        wrong = [
            (row["name"], share.name)
            for row, share in zip(rows, expected, strict=False)
            if not _is_share(row, share, size, stated.value)
        ]
        if wrong and wrong[0][0] != wrong[0][1]:
            yield Check(f"shares of {name}", *wrong[0], holds=False)
        elif wrong:
            row, share = next((r, s) for r, s in zip(rows, expected, strict=False) if s.name == wrong[0][1])
            yield Check(f"shares of {name}", [row["value"], row["stderr"]], [share.value, share.stderr], holds=False)
        else:
            yield Check(f"shares of {name}", len(rows), len(expected), len(rows) == len(expected))


def _is_share(row: Mapping[str, Any], share: TraceShare, size: float, total: float) -> bool:
    """Whether a row says of the same thing the same numbers."""
    named = (row["name"], row["kind"], row["parameters"]) == (share.name, share.kind, share.parameters)
    part = row["value"] / total if total else math.nan
    return (
        named
        and same_number(row["value"], share.value, size)
        and same_number(row["stderr"], share.stderr, size)
        and same_number(row["share"], part)
        and same_number(row["per_parameter"], share.mean, size)
    )


def _probes(operator: Operator, stated: Trace, tensors: tuple[Tensor, Tensor], num_probes: int) -> Iterator[Check]:
    """Some samples from products; of what is left beside a subspace, if there is one."""
    (samples, known), seed, rank = tensors, stated.seed, stated.estimate.rank
    other, _ = other_arithmetic(operator)
    exact: LinearMap = operator if other.reference is None else other.reference
    A = in_precision(exact, stated.definition.dtype)
    lengths, subspace = lengths_of(operator), None
    if rank:
        subspace = _subspace(A, rank, lengths, seed, operator.gradient)
        spread = samples.std(0).max().item() if len(samples) > 1 else 0.0
        allowed = CLOSE * (known.abs().max().item() + spread)
        off = (subspace.known - known).abs().max().item()
        yield Check("exact part", known.sum().item(), subspace.known.sum().item(), off <= allowed)
    order = torch.randperm(len(samples), generator=seeds.generator(seed, PURPOSE))[:num_probes]
    for index in sorted(order.tolist()):
        x = probe(A, seed, index)
        y = exact.matvec(x.to(exact.dtype))
        now = part_sums(x.to(exact.dtype), y, lengths)
        error = max(usual_error(stated.plan, A.dtype), assumed_error(exact)) * norm(y)
        if other.perturbed:
            error = max(error, PERTURBATION * max(norm(P.matvec(x.to(P.dtype)) - y) for P in other.perturbed))
        allowed = ALONG * error
        if subspace is not None:
            now = subspace.sample(x, now, lengths)
            allowed = max(allowed, CLOSE * samples.abs().max().item())
        off = (now - samples[index]).abs().max().item()
        yield Check(f"probe {index + 1}", samples[index].sum().item(), now.sum().item(), off <= allowed)


def _subspace(A: LinearMap, rank: int, lengths: tuple[int, ...], seed: int, start: Tensor) -> KrylovSubspace:
    building = krylov(A, rank, lengths=lengths, seed=seed, start=start)
    while True:
        try:
            next(building)
        except StopIteration as done:
            return done.value
