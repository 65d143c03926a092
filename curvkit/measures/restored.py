"""Results that were written as a JSON document, read again: to be shown once more, or to be verified."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from curvkit.measures.adaptive_result import AdaptiveSharpness
from curvkit.measures.cross_check_result import CrossCheck
from curvkit.measures.data_doubt import Halves, Spread
from curvkit.measures.invariances import ScaleInvariance
from curvkit.measures.sharpness_result import Sharpness
from curvkit.measures.stability_result import RateRatio, Stability
from curvkit.measures.trace_result import Trace, TraceShare
from curvkit.measures.updates import Update
from curvkit.operators import Plan
from curvkit.operators.preflight import Preflight
from curvkit.results import Definition, Eigenpairs, TraceEstimate

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
"""In which a model may be when it is measured, and in which products are made."""


def precision_of(name: Any) -> torch.dtype:
    """Read the name of a precision again.

    Args:
        name: "float32" or "float64", with or without "torch." before it.

    Returns:
        The precision.

    Raises:
        ValueError: If it is another one, or none.

    Example:
        >>> precision_of("torch.float64")
        torch.float64
    """
    known = PRECISIONS.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if known is None:
        raise ValueError(f"{name!r} is none of the precisions {', '.join(PRECISIONS)}")
    return known


def sharpness_of(document: Mapping[str, Any]) -> Sharpness:
    """Read the document of `curvkit sharpness -o` again.

    Args:
        document: As it was written; parts that are younger than the schema may be missing.

    Returns:
        The result, without its vectors.

    Raises:
        KeyError: If something is missing.
        TypeError: If something is of another kind.
        ValueError: If something is no number where there must be one.
    """
    it, record = document["result"], document["record"]
    rows = it["eigenvalues"]
    values, residuals = (
        torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in ("value", "residual")
    )
    pairs = Eigenpairs(
        values=values,
        residuals=residuals,
        converged=torch.tensor([bool(row["converged"]) for row in rows]),
        vectors=None,
        recomputed=it["residuals_recomputed"],
        which=it["quantity"].partition(" ")[0],
        tolerance=it["tolerance"],
        scale=float(it["scale"]),
        asymmetry=0.0,
        rounding=float(it["rounding"]),
        products=it["search_products"],
        upper_bound=it["upper_bound"],
        lower_bound=it["lower_bound"],
        confidence=it["bounds_confidence"],
        multiplicities_below=it["multiplicities_below"],
        residual_dtype=it["residuals_dtype"],
        product_error=_number(it["product_error"], math.nan),
        rounding_measured=it["rounding_measured"],
        asked=record["run"]["settings"]["search"]["num"],
    )
    spread, halves = it["batch_spread"], it["halves"]
    return Sharpness(
        eigenpairs=pairs,
        spread=None
        if spread is None
        else Spread(tuple(spread["quotients"]), tuple(spread["weights"]), _number(spread["stderr"], math.nan)),
        halves=None if halves is None else Halves(tuple(halves["held_out"]), halves["in_sample"]),
        arithmetic=it["search_dtype"],
        scale=_scale(it.get("scale_invariance")),
        adaptive=_adaptive(it.get("adaptive_sharpness")),
        stability=_stability(it.get("stability")),
        **_common(it, record),
    )


def trace_of(document: Mapping[str, Any]) -> Trace:
    """Read the document of `curvkit trace -o` again.

    Args:
        document: As it was written.

    Returns:
        The result, without its samples.

    Raises:
        KeyError: If something is missing.
        TypeError: If something is of another kind.
        ValueError: If something is no number where there must be one.
    """
    it, record = document["result"], document["record"]
    found = it["trace"]
    rounding, unknown = found["rounding"], math.nan
    estimate = TraceEstimate(
        value=_number(found["value"], unknown),
        stderr=_number(found["stderr"], unknown),
        low=_number(found["low"], -math.inf),
        high=_number(found["high"], math.inf),
        confidence=found["confidence"],
        probes=it["probes"],
        products=it["search_products"] or 0,
        method=it["method"],
        reason=it["reason"],
        converged=found["converged"],
        tolerance=it["tolerance"],
        absolute_tolerance=it["absolute_tolerance"],
        exact=found["exact"],
        rank=it["rank"],
        rounding=None if rounding is None else float(rounding),
    )
    return Trace(
        estimate=estimate,
        unit=it["unit"],
        gradients=it.get("gradients"),
        layers=tuple(map(_share, it["layers"])),
        parameters=tuple(map(_share, it["parameters"])),
        **_common(it, record),
    )


def _scale(it: Mapping[str, Any] | None) -> ScaleInvariance | None:
    if it is None:
        return None
    names = {name: tuple(it[name]) for name in ("invariant", "without_effect", "zero", "notes")}
    return ScaleInvariance(**names, tensors=it["tensors"], parameters=it["parameters"])


def _adaptive(it: Mapping[str, Any] | None) -> AdaptiveSharpness | None:
    if it is None:
        return None
    told = {name: it[name] for name in ("stage", "seed", "seconds", "products")}
    return AdaptiveSharpness(
        eigenpairs=_largest(it["value"], it["interval"], converged=it["converged"]),
        definition=Definition(**{name: value for name, value in it["definition"].items() if name != "text"}),
        loss=float(it["loss"]),
        gradient_norm=float(it["gradient_norm"]),
        notes=tuple(it["notes"]),
        **told,
    )


def _stability(it: Mapping[str, Any] | None) -> Stability | None:
    if it is None:
        return None
    told = {
        name: it[name]
        for name in ("optimizer", "reason", "stage", "idle_mass", "verdict", "seed", "seconds", "products")
    }
    rates = tuple(
        RateRatio(r["label"], r["lr"], r["source"], r["ratio"], None if r["interval"] is None else tuple(r["interval"]))
        for r in it["rates"]
    )
    if it["folded"] is None:
        return Stability(**told, rates=rates, notes=tuple(it["notes"]))
    matrix = it["quantity"].removeprefix("lambda_max(").removesuffix(")")
    update = Update(it["optimizer"], it["lr"], math.nan, gain=2.0 / it["limit_times_lr"], matrix=matrix)
    return Stability(
        **told,
        update=update,
        eigenpairs=_largest(it["folded"], it["folded_interval"], converged=it["converged"]),
        rates=rates,
        reference=it["lr_label"],
        notes=tuple(it["notes"]),
    )


def _largest(value: float, interval: Any, *, converged: bool) -> Eigenpairs:
    """One eigenvalue with its interval; what else there was is not in the document."""
    half = torch.tensor([(interval[1] - interval[0]) / 2], dtype=torch.float64)
    return Eigenpairs(
        values=torch.tensor([float(value)], dtype=torch.float64),
        residuals=half,
        converged=torch.tensor([converged]),
        vectors=None,
        recomputed=True,
        which="largest",
        tolerance=math.nan,
        scale=abs(value),
        asymmetry=0.0,
        rounding=0.0,
        products=0,
    )


def _common(it: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    definition, checks, check = it["definition"], it["preflight"], it["cross_check"]
    return {
        "definition": Definition(**{name: value for name, value in definition.items() if name != "text"}),
        "loss": float(it["loss"]),
        "gradient_norm": float(it["gradient_norm"]),
        "stage": it["stage"],
        "plan": Plan(**record["plan"]),
        "seed": record["seed"],
        "seconds": it["seconds"],
        "products": it["products"] or 0,
        "unused": tuple(it["unused_parameters"]),
        "notes": tuple(it["notes"]),
        "preflight": None if checks is None else _preflight(checks),
        "cross_check": None if check is None else _cross_check(check),
    }


def _share(row: Mapping[str, Any]) -> TraceShare:
    value, stderr = (_number(row[name], math.nan) for name in ("value", "stderr"))
    return TraceShare(row["name"], row["kind"], row["parameters"], value, stderr)


def _number(value: Any, unknown: float) -> float:
    """Null stands for what JSON has no number for."""
    return unknown if value is None else float(value)


def _preflight(it: Mapping[str, Any]) -> Preflight:
    repeatability, asymmetry, mismatch = (
        _number(it[name], math.nan) for name in ("repeatability", "asymmetry", "mismatch")
    )
    return Preflight(it["verdict"], repeatability, asymmetry, {0.0: mismatch}, it["dtype"])


def _cross_check(it: Mapping[str, Any]) -> CrossCheck:
    """Lists were tuples."""
    known: dict[str, Any] = {field.name: it[field.name] for field in fields(CrossCheck)}
    known["intervals"] = tuple((low, high) for low, high in it["intervals"])
    for name in ("ours", "theirs", "expected", "reasons"):
        known[name] = tuple(known[name])
    return CrossCheck(**known)
