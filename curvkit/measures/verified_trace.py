"""Is a stated trace true? Its mean, error and interval again from its samples, and some of the samples from products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.linalg import student
from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.basis import norm
from curvkit.linalg.certificate import PERTURBATION, assumed_error
from curvkit.linalg.deflation import KrylovSubspace, krylov
from curvkit.linalg.hutchinson import part_sums, probe
from curvkit.linalg.maps import FunctionMap, LinearMap
from curvkit.measures.products import other_arithmetic
from curvkit.measures.restored import trace_of
from curvkit.measures.trace_result import Trace
from curvkit.measures.traces import Operator, TraceSettings, lengths_of, trace_steps
from curvkit.measures.verification import CLOSE, Check, compared_definitions, compared_point, usual_error
from curvkit.objectives import Objective
from curvkit.results import TraceEstimate

ALONG = 10.0
"""The part of a rounding error along a probe is about its length, seldom more; this many times is allowed."""
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
    "hutchinson"; for "deflated" the subspace is made again as well. The other methods, whose samples do not stand for themselves, are run
    again with the same seed.

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
        KeyError: If something is missing in the document.

    Cost: `num_probes` products, and the subspace's; for the other methods what it cost then.
    """
    it, stated = document["result"], trace_of(document)
    found, operator = stated.estimate, engine.operator(objective)
    yield from compared_definitions(stated.definition, operator)
    yield from compared_point(it, operator)
    samples = None if tensors is None else tensors["samples"]
    known = None if tensors is None else tensors["known"]
    if samples is not None and known is not None:
        p = len(operator.space.entries)
        fits = samples.shape == (found.probes, p) and known.shape == (p,)
        yield Check("samples", [found.probes, p], list(samples.shape), fits)
        if not fits:
            return
        yield from _shares(it, samples, known)
    yield from _interval(document, samples, known)
    if found.method in ("hutchinson", "deflated") and samples is not None and known is not None and len(samples):
        yield from _probes(operator, stated, (samples, known), num_probes)
    else:
        yield _again(objective, operator, document, engine)


def _interval(document: Mapping[str, Any], samples: Tensor | None, known: Tensor | None) -> Iterator[Check]:
    """What follows from the samples without a product."""
    it = document["result"]
    told, settings = it["trace"], document["record"]["run"]["settings"]["search"]
    value, stderr = told["value"], told["stderr"]
    if samples is not None and known is not None:
        totals, m = samples.sum(1), len(samples)
        value = (known.sum() + (totals.mean() if m else 0.0)).item()
        stderr = (totals.std() / m**0.5).item() if m > 1 else 0.0 if it["rank"] and told["exact"] else math.nan
        yield Check("trace", told["value"], value, _equal(told["value"], value))
        yield Check("standard error", told["stderr"], stderr, _equal(told["stderr"], stderr))
    rounding = told["rounding"] or 0.0
    probes = 0.0 if told["exact"] else student.half_width(told["stderr"] or 0.0, it["probes"])
    half = probes + rounding
    ends = [told["value"] - half, told["value"] + half]
    stands = all(_equal(a, b, abs(told["value"])) for a, b in zip((told["low"], told["high"]), ends, strict=True))
    yield Check("interval", [told["low"], told["high"]], ends, stands)
    allowed = max(it["tolerance"] * abs(told["value"]), it["absolute_tolerance"] or 0.0)
    converged = half <= allowed and (told["exact"] or it["probes"] >= student.LEAST)
    yield Check("converged", told["converged"], converged, told["converged"] is converged)
    for name in ("tolerance", "absolute_tolerance"):
        if it[name] != settings[name]:
            yield Check(name.replace("_", " "), it[name], settings[name], False)


def _shares(it: Mapping[str, Any], samples: Tensor, known: Tensor) -> Iterator[Check]:
    values = known + (samples.mean(0) if len(samples) else 0.0)
    stated = [row["value"] for row in it["parameters"]]
    same = len(stated) == len(values) and all(map(_equal, stated, values.tolist()))
    yield Check("shares of parameters", len(stated), len(values), same)
    total = [math.fsum(row["value"] for row in it[name]) for name in ("layers", "parameters")]
    yield Check("shares of layers", total[0], total[1], _equal(total[0], total[1], sum(map(abs, stated))))


def _probes(operator: Operator, stated: Trace, tensors: tuple[Tensor, Tensor], num_probes: int) -> Iterator[Check]:
    """Some samples from products; of what is left beside a subspace, if there is one."""
    (samples, known), seed, rank = tensors, stated.seed, stated.estimate.rank
    other, _ = other_arithmetic(operator)
    exact: LinearMap = operator if other.reference is None else other.reference
    A = _in_precision(exact, stated.definition.dtype)
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


def _in_precision(A: LinearMap, dtype: str) -> LinearMap:
    """The same map for vectors of the precision of then: normal numbers of another one are other numbers."""
    stated: torch.dtype = getattr(torch, dtype)
    if stated == A.dtype:
        return A
    return FunctionMap(A.n, lambda v: A.matvec(v.to(A.dtype)).to(stated), dtype=stated, device=A.device)


def _subspace(A: LinearMap, rank: int, lengths: tuple[int, ...], seed: int, start: Tensor) -> KrylovSubspace:
    building = krylov(A, rank, lengths=lengths, seed=seed, start=start)
    while True:
        try:
            next(building)
        except StopIteration as done:
            return done.value


def _again(objective: Objective, operator: Operator, document: Mapping[str, Any], engine: TraceSettings) -> Check:
    """The same method with the same seed, up to the same product; what it differs by is rounding."""
    it, record = document["result"], document["record"]
    told, before, seed = it["trace"], record["run"]["settings"], record["seed"]
    names = {field.name for field in fields(linalg_trace.Settings)}
    search = linalg_trace.Settings(**{k: v for k, v in before["search"].items() if k in names})
    search = replace(search, max_seconds=None, max_rows=record["plan"]["basis_rows"])
    now: TraceEstimate | None = None
    if it["by_structure"]:
        *_, result = trace_steps(objective, replace(engine, search=search, preflight=False), seed=seed)
        now = result.estimate
    else:
        A, lengths = _in_precision(operator, it["definition"]["dtype"]), lengths_of(operator)
        for now in linalg_trace.search(A, search, lengths=lengths, seed=seed, start=operator.gradient.to(A.dtype)):
            if now.method == it["method"] and now.products >= it["search_products"]:
                break
    value = math.nan if now is None else now.value
    allowed = CLOSE * abs(value) + 2 * (told["rounding"] or 0.0)
    holds = now is not None and now.method == it["method"] and abs(value - told["value"]) <= allowed
    return Check(f"{it['method']} again", told["value"], value, holds)


def _equal(a: float | None, b: float, size: float = 0.0) -> bool:
    """The same number but for the last digits of float64 sums; null stands for NaN and infinity."""
    if a is None:
        return not math.isfinite(b)
    return math.isfinite(b) and abs(a - b) <= 1e-9 * max(abs(a), abs(b), size)
