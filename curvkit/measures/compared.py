"""The quantities at one point of a comparison, and their differences to those at the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from curvkit.linalg.basis import dot, norm
from curvkit.measures.paired import Contributions, Gap
from curvkit.measures.probed_trace import ProbedTrace
from curvkit.operators import Plan
from curvkit.operators.preflight import Preflight
from curvkit.results import Definition, Eigenpairs, plain

Stage = Literal["loss", "eigenvalues", "data", "adaptive", "trace", "complete"]


@dataclass(frozen=True, eq=False)
class Measured:
    """The quantities at one point, as far as they are known; complete when `stage` is."""

    name: str
    theta: Tensor
    """[n], the parameters."""
    losses: Contributions
    """Of the parts of the data; `losses.value` is L."""
    stage: Stage = "loss"
    definition: Definition | None = None
    gradient_norm: float | None = None
    """||grad L||."""
    eigenpairs: Eigenpairs | None = None
    """The largest eigenvalues of H."""
    along: Contributions | None = None
    """v'H_b v of the parts of the data, v the first eigenvector; None if not measured."""
    adaptive: Eigenpairs | None = None
    """The largest eigenvalue of diag|theta| H diag|theta|, without its vector."""
    trace: ProbedTrace | None = None
    plan: Plan | None = None
    products: int = 0
    seconds: float = 0.0
    unused: tuple[str, ...] = ()
    preflight: Preflight | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Name, stage and loss."""
        return f"Measured({self.name}: {self.stage}, loss {self.loss:.6g})"

    @property
    def loss(self) -> float:
        """L."""
        return self.losses.value

    @property
    def norm(self) -> float:
        """||theta||."""
        return norm(self.theta)

    @property
    def converged(self) -> bool:
        """Whether both searches for eigenvalues met their tolerance."""
        found = (self.eigenpairs, self.adaptive)
        return all(pairs is not None and pairs.all_converged for pairs in found)

    def to_dict(self) -> dict[str, Any]:
        """As plain values.

        Returns:
            Mappings, lists, numbers and strings.
        """
        trace = self.trace
        return plain(
            {
                "name": self.name,
                "stage": self.stage,
                "loss": {"value": self.loss, "stderr": self.losses.stderr, "parts": self.losses.parts},
                "gradient_norm": self.gradient_norm,
                "parameter_norm": self.norm,
                "eigenvalues": _eigenvalues(self.eigenpairs),
                "upper_bound": None if self.eigenpairs is None else self.eigenpairs.upper_bound,
                "adaptive_sharpness": next(iter(_eigenvalues(self.adaptive)), None),
                "adaptive_upper_bound": None if self.adaptive is None else self.adaptive.upper_bound,
                "data": None
                if self.along is None
                else {"value": self.along.value, "stderr": self.along.stderr, "parts": self.along.parts},
                "trace": None
                if trace is None
                else {
                    "value": trace.value,
                    "low": trace.low,
                    "high": trace.high,
                    "stderr": trace.stderr,
                    "probes": trace.probes,
                    "exact": trace.exact,
                    "rounding": trace.rounding,
                },
                "definition": None
                if self.definition is None
                else {**plain(self.definition), "text": str(self.definition)},
                "plan": self.plan,
                "products": self.products,
                "seconds": self.seconds,
                "unused_parameters": self.unused,
                "preflight": None if self.preflight is None else self.preflight.to_dict(),
                "notes": self.notes,
            }
        )


@dataclass(frozen=True)
class Overlap:
    """How far two top eigenspaces are the same.

    overlap = ||V'V_ref||_F^2 / k,    1 for the same space, k / n on average for random ones
    """

    value: float
    chance: float
    """k / n."""
    angles: tuple[float, ...]
    """Principal angles in degrees, ascending."""


@dataclass(frozen=True, eq=False)
class Difference:
    """One point less the reference; what is not known yet is None."""

    point: Measured
    reference: Measured

    @property
    def loss(self) -> Gap:
        """Of L, paired over the parts of the data."""
        return self.point.losses.gap(self.reference.losses)

    @property
    def lambda_max(self) -> Gap | None:
        """Of the largest eigenvalue of H; the interval follows from the residuals of both."""
        return _apart(self.point.eigenpairs, self.reference.eigenpairs)

    @property
    def data(self) -> Gap | None:
        """Of v'Hv, each v the first eigenvector at its own point, paired over the parts of the data: the doubt from the sample."""
        here, there = self.point.along, self.reference.along
        return None if here is None or there is None else here.gap(there)

    @property
    def adaptive(self) -> Gap | None:
        """Of the largest eigenvalue of diag|theta| H diag|theta|."""
        return _apart(self.point.adaptive, self.reference.adaptive)

    @property
    def trace(self) -> Gap | None:
        """Of tr H, paired over the probes."""
        here, there = self.point.trace, self.reference.trace
        return None if here is None or there is None else here.gap(there)

    @cached_property
    def distance(self) -> float:
        """||theta - theta_ref||."""
        return norm(self.point.theta - self.reference.theta)

    @cached_property
    def overlap(self) -> Overlap | None:
        """Of the eigenspaces that were asked for; None if one of them is not (all) there."""
        here, there = (
            it.eigenpairs.vectors if it.eigenpairs is not None else None for it in (self.point, self.reference)
        )
        if here is None or there is None or here.shape != there.shape:
            return None
        n, k = here.shape
        cosines = torch.tensor(
            [[dot(v, w) / (norm(v) * norm(w)) for w in there.unbind(1)] for v in here.unbind(1)], dtype=torch.float64
        )  # [k, k]
        angles = torch.linalg.svdvals(cosines).clamp(max=1.0).acos().rad2deg()
        return Overlap(min(1.0, cosines.square().sum().item() / k), k / n, tuple(angles.sort().values.tolist()))

    def to_dict(self) -> dict[str, Any]:
        """As plain values.

        Returns:
            Mappings, lists and numbers.
        """
        return plain(
            {
                "name": self.point.name,
                "reference": self.reference.name,
                "loss": self.loss,
                "lambda_max": self.lambda_max,
                "lambda_max_data": self.data,
                "trace": self.trace,
                "adaptive_sharpness": self.adaptive,
                "distance": self.distance,
                "overlap": self.overlap,
            }
        )


def could_be_undone(here: Eigenpairs, there: Eigenpairs) -> bool:
    """Whether an eigenvalue that a search missed could make the smaller of two largest ones the larger.

    A residual proves that there is an eigenvalue, not that none is larger: for that there is the bound above which none lies with
    probability 0.99 over the start vector.

    Args:
        here: The largest ones at one point.
        there: Likewise at another.

    Returns:
        False if the bound of the smaller lies below the interval of the larger, or there is no bound.
    """
    smaller, larger = (here, there) if here.values[0] < there.values[0] else (there, here)
    return smaller.upper_bound is not None and smaller.upper_bound >= larger.intervals[0, 0].item()


def _apart(here: Eigenpairs | None, there: Eigenpairs | None) -> Gap | None:
    if here is None or there is None or not len(here.values) or not len(there.values):
        return None
    value = here.values[0].item() - there.values[0].item()
    if not (here.recomputed and there.recomputed):
        return Gap(value)
    (low, high), (its_low, its_high) = here.intervals[0].tolist(), there.intervals[0].tolist()
    return Gap(value, low - its_high, high - its_low)


def _eigenvalues(pairs: Eigenpairs | None) -> list[dict[str, Any]]:
    if pairs is None:
        return []
    found = zip(pairs.values, pairs.intervals, pairs.residuals, pairs.converged, strict=True)
    return [
        {
            "value": value,
            "low": interval[0],
            "high": interval[1],
            "residual": residual,
            "converged": pairs.recomputed and bool(converged),
        }
        for value, interval, residual, converged in found
    ]
