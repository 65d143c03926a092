"""Do the parts of a stated result fit together? What follows from other numbers of it is held against them, without a product."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvkit.linalg.certificate import CONFIDENCE
from curvkit.measures.limit_verdict import IDLE, verdict
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.trace_result import Trace
from curvkit.operators.batchwise import BatchwiseOperator

DIGITS = 1e-9
"""Numbers that follow from each other may differ by this share: the last digits of sums in float64."""
FOLLOWING = (
    "value",
    "interval",
    "limit",
    "ratio",
    "ratio_interval",
    "largest_stable_lr",
    "largest_stable_lr_interval",
    "folded_interval",
)
"""Of a stability, from lambda_max of the folded matrix, its interval, the learning rate and the limit."""


@dataclass(frozen=True)
class Check:
    """One thing that was stated."""

    what: str
    stated: Any
    recomputed: Any
    holds: bool | None
    """None: it is not recomputed."""
    bound: bool = False
    """Whether what was recomputed can contradict it, but not show it; then `holds` says that it is not contradicted."""


def same_number(a: float | None, b: float | None, size: float = 0.0) -> bool:
    """Whether two numbers are the same but for the last digits of float64 sums.

    Args:
        a: As it was stated; None stands for what JSON has no number for.
        b: As it follows.
        size: Of what the numbers are sums of, where they may cancel.

    Returns:
        True if so.

    Example:
        >>> same_number(1.0, 1.0 + 1e-12), same_number(1.0, 1.001), same_number(None, float("nan"))
        (True, False, True)
    """
    if a is None or b is None or not math.isfinite(b):
        return a is None and (b is None or not math.isfinite(b))
    return abs(a - b) <= DIGITS * max(abs(a), abs(b), size)


def sharpness_parts(document: Mapping[str, Any], stated: Sharpness, operator: BatchwiseOperator) -> Iterator[Check]:
    """Hold what stands beside the eigenvalues of a sharpness against itself.

    Args:
        document: As it was written.
        stated: The same, read.
        operator: Of the objective that is there now.

    Yields:
        A check of what the numbers are called; then one per part that is not recomputed, and one for each number of it that does not
        fit the others.

    Raises:
        KeyError: If something is missing in the document.
    """
    it, asked = document["result"], document["record"]["run"]["settings"]["search"]
    quantity = f"{asked['which']} eigenvalues of the Hessian"
    yield Check("quantity", it["quantity"], quantity, it["quantity"] == quantity)
    spanned, unbounded = operator.n + 1, it["upper_bound"] is None and it["lower_bound"] is None
    block = it["multiplicities_below"]
    if block not in (asked["block_size"], spanned):
        yield Check("multiplicities", block, asked["block_size"], False)
    confidence = None if unbounded else 1.0 if block == spanned else CONFIDENCE
    holds = it["bounds_confidence"] == confidence or (unbounded and it["bounds_confidence"] in (1.0, CONFIDENCE))
    yield Check("bounds confidence", it["bounds_confidence"], confidence, holds)
    yield from common_parts(it, stated)
    if it["halves"] is not None and stated.halves is not None:
        yield from _not_recomputed("halves", it["halves"]["lower"], _halves(it["halves"], stated.halves.lower))
    scale, adaptive, stability = (
        it.get(name) for name in ("scale_invariance", "adaptive_sharpness", "stability")
    )  # younger than the schema
    if scale is not None and stated.scale is not None:
        wrong = _scale(scale, stated.scale.to_dict()["text"], operator)
        yield from _not_recomputed("scale invariance", scale["text"], wrong)
    if adaptive is not None and stated.adaptive is not None:
        wrong = _adaptive(adaptive, stated.adaptive.to_dict())
        yield from _not_recomputed("adaptive sharpness", adaptive["value"], wrong)
    if stability is not None and stated.stability is not None:
        wrong = _stability(stability, stated.stability.to_dict())
        shown = stability["reason"] if stability["ratio"] is None else stability["ratio"]
        yield from _not_recomputed("stability", shown, wrong)


def common_parts(it: Mapping[str, Any], stated: Sharpness | Trace) -> Iterator[Check]:
    """Hold the definition's text and the stage against what they must be, and name the checks that are not made again.

    Args:
        it: The result, as it was written.
        stated: The same, read.

    Yields:
        One check per part.

    Raises:
        KeyError: If something is missing in the document.
    """
    text = str(stated.definition)
    if it["definition"]["text"] != text:
        yield Check("definition", it["definition"]["text"], text, False)
    if it["stage"] != "complete":
        yield Check("stage", it["stage"], "complete", False)
    if it["preflight"] is not None:
        yield Check("preflight", it["preflight"]["verdict"], None, None)
    if it["cross_check"] is not None:
        yield Check("cross-check", it["cross_check"]["package"], None, None)


def _not_recomputed(part: str, shown: Any, wrong: Iterator[tuple[str, Any, Any]]) -> Iterator[Check]:
    """A line for a part, and one for each number of it that does not fit the others."""
    yield Check(part, shown, None, None)
    for name, stated, expected in wrong:
        yield Check(f"{part}: {name}", stated, expected, False)


def _halves(it: Mapping[str, Any], lower: float) -> Iterator[tuple[str, Any, Any]]:
    if not same_number(it["lower"], lower):
        yield "lower", it["lower"], lower


def _scale(it: Mapping[str, Any], text: str, operator: BatchwiseOperator) -> Iterator[tuple[str, Any, Any]]:
    """Names and counts are those of the model."""
    entries = operator.space.entries
    for name in ("invariant", "without_effect", "zero"):
        known = [entry.name for entry in entries if entry.name in it[name]]
        if it[name] != known:
            yield name.replace("_", " "), it[name], known
    counted = {
        "tensors": len(entries),
        "parameters": sum(entry.numel for entry in entries if entry.name in it["invariant"]),
        "text": text,
    }
    yield from ((name, it[name], expected) for name, expected in counted.items() if it[name] != expected)


def _adaptive(it: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Its interval has the value in the middle and is not narrower than the residual."""
    if it["quantity"] != again["quantity"]:
        yield "quantity", it["quantity"], again["quantity"]
    low, high = it["interval"]
    if not _same(it["interval"], again["interval"]) or high - low < 2 * it["residual"] * (1 - DIGITS):
        yield "interval", it["interval"], [it["value"] - it["residual"], it["value"] + it["residual"]]
    if it["upper_bound"] is not None and it["upper_bound"] < it["value"]:
        yield "upper bound", it["upper_bound"], it["value"]
    if it["bounds_confidence"] not in (None, CONFIDENCE, 1.0):
        yield "bounds confidence", it["bounds_confidence"], CONFIDENCE
    if it["definition"]["text"] != again["definition"]["text"]:
        yield "definition", it["definition"]["text"], again["definition"]["text"]


def _stability(it: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """All follows from lambda_max of the folded matrix, its interval, the learning rate and the limit times it."""
    for name in FOLLOWING:
        if not _same(it[name], again[name]):
            yield name.replace("_", " "), it[name], again[name]
    bound, folded = it["folded_upper_bound"], it["folded"]
    if bound is not None and (folded is None or bound < folded):
        yield "upper bound", bound, folded
    expected = _judged(again, it)
    if it["verdict"] != expected or (it["verdict"] is None) is not (it["reason"] is not None):
        yield "verdict", it["verdict"], expected
    if it["folded"] is None:
        return
    if it["lr"] not in [row["lr"] for row in it["rates"] if row["label"] == it["lr_label"]]:
        yield "lr", it["lr"], [row["lr"] for row in it["rates"]]
    for row in it["rates"]:
        factor = row["lr"] / it["lr"]
        fits = same_number(row["ratio"], factor * again["ratio"])
        fits = fits and _same(row["interval"], [factor * end for end in again["ratio_interval"]])
        if not fits and not (row["ratio"] is None and row["interval"] is None):
            yield f"ratio of {row['label']}", row["ratio"], factor * again["ratio"]


def _judged(again: Mapping[str, Any], it: Mapping[str, Any]) -> str | None:
    """The verdict that the interval of the ratio allows."""
    if again["ratio_interval"] is None or it["lr_label"] not in ("current", "given"):
        return None
    if it["idle_mass"] is not None and it["idle_mass"] > IDLE:
        return None
    low, high = again["ratio_interval"]
    return verdict((low, high), converged=it["converged"])[0]


def _same(a: Any, b: Any) -> bool:
    """The same number, or the same interval."""
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        size = max((abs(end) for end in b if end is not None), default=0.0)
        return len(a) == len(b) and all(same_number(x, y, size) for x, y in zip(a, b, strict=True))
    return not isinstance(a, Sequence) and not isinstance(b, Sequence) and same_number(a, b)
