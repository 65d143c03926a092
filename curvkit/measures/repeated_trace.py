"""A stated trace, measured once more with the same seed: for methods whose samples do not stand for themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from curvkit.errors import InvalidArgument
from curvkit.linalg import trace as linalg_trace
from curvkit.linalg.maps import FunctionMap, LinearMap
from curvkit.measures.restored import precision_of
from curvkit.measures.traces import Operator, TraceSettings, lengths_of, trace_steps
from curvkit.measures.verification import CLOSE
from curvkit.measures.verified_parts import Check
from curvkit.objectives import Objective
from curvkit.results import TraceEstimate


def again(
    objective: Objective, operator: Operator, document: Mapping[str, Any], engine: TraceSettings
) -> Iterator[Check]:
    """Run the same method with the same seed, up to the same product; what it differs by is rounding.

    Args:
        objective: The function, resolved anew.
        operator: Of its Hessian.
        document: As it was written.
        engine: How products are computed now.

    Yields:
        A check of the trace, and one of its shares if the method gives them.

    Raises:
        CurvkitError: If products cannot be computed.
        ValueError: If the settings in the document cannot be.

    Cost: the products that were made then.
    """
    it, record = document["result"], document["record"]
    told, seed = it["trace"], record["seed"]
    search, now = _search_of(record, operator.n), None
    if it["by_structure"]:
        for result in trace_steps(objective, replace(engine, search=search, preflight=False), seed=seed):
            if not result.by_structure:
                break  # it is not piecewise linear
            now = result.estimate
    else:
        now = _repeated(it, search, operator, seed)
    value = math.nan if now is None else now.value
    allowed = CLOSE * abs(value) + 2 * (told["rounding"] or 0.0)
    holds = now is not None and now.method == it["method"] and abs(value - told["value"]) <= allowed
    yield Check(f"{it['method']} again", told["value"], value, holds)
    if now is not None and now.parts is not None:
        sums, stated = now.parts.values.tolist(), [row["value"] for row in it["parameters"]]
        allowed = CLOSE * max(map(abs, sums), default=0.0) + 2 * (told["rounding"] or 0.0)
        same = len(sums) == len(stated) and all(abs(a - b) <= allowed for a, b in zip(sums, stated, strict=True))
        yield Check("shares again", len(stated), len(sums), same)


def _search_of(record: Mapping[str, Any], n: int) -> linalg_trace.Settings:
    """What was asked for then, without limits of time and with one probe at a time."""
    names = {field.name for field in fields(linalg_trace.Settings)}
    stated = {k: v for k, v in record["run"]["settings"]["search"].items() if k in names}
    stated |= {"max_seconds": None, "max_rows": record["plan"]["basis_rows"], "block_size": 1}
    try:
        search = linalg_trace.Settings(**stated)
        linalg_trace.refuse_unfit(search, n)
    except InvalidArgument as error:  # of the document, not of who verifies it
        raise ValueError(str(error)) from error
    return search


def _repeated(
    it: Mapping[str, Any], search: linalg_trace.Settings, operator: Operator, seed: int
) -> TraceEstimate | None:
    """The estimate after as many products, or the last one."""
    A, lengths = in_precision(operator, it["definition"]["dtype"]), lengths_of(operator)
    now: TraceEstimate | None = None
    for now in linalg_trace.search(A, search, lengths=lengths, seed=seed, start=operator.gradient.to(A.dtype)):
        enough = now.products >= it["search_products"]
        if now.products > it["search_products"] or (enough and now.method == it["method"]):
            break
    return now


def in_precision(A: LinearMap, dtype: str) -> LinearMap:
    """The same map for vectors of the precision of then: normal numbers of another one are other numbers.

    Args:
        A: In any precision.
        dtype: Name of the precision of then.

    Returns:
        A itself where it is in that.

    Raises:
        ValueError: If the name is that of no precision in which is measured.
    """
    stated = precision_of(dtype)
    if stated == A.dtype:
        return A
    return FunctionMap(A.n, lambda v: A.matvec(v.to(A.dtype)).to(stated), dtype=stated, device=A.device)
