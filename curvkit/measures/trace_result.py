"""What a measurement of a trace says: the value, its interval, whose share it is, and what it is the trace of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from curvkit.measures.cross_check_result import CrossCheck
from curvkit.operators import Plan
from curvkit.operators.preflight import Preflight
from curvkit.parameters import Entry, ParameterSpace
from curvkit.results import Definition, TraceEstimate, plain
from curvkit.results.trace_estimate import TraceParts

Stage = Literal["sampling", "complete"]


@dataclass(frozen=True)
class TraceShare:
    """The sum of the diagonal over some parameters; all shares add up to the trace."""

    name: str
    kind: str
    """Class of the layer, or shape of the parameter tensor."""
    parameters: int
    value: float
    stderr: float
    """From the same probes; errors of different shares are correlated. 0 if exact, NaN if unknown."""

    @property
    def mean(self) -> float:
        """Value per parameter: the mean of the diagonal."""
        return self.value / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, eq=False)
class Trace:
    """The trace of the Hessian of an objective; a partial result while `stage` is not "complete".

    The interval is the doubt from the probes: where the trace for all of this data lies. That other data would give another trace
    is not in it.
    """

    estimate: TraceEstimate
    definition: Definition
    unit: str | None
    """What one unit of the loss is, where that is known; the trace is in that unit / parameter^2."""
    loss: float
    """L at the point."""
    gradient_norm: float
    """||grad L||."""
    layers: tuple[TraceShare, ...]
    """One per module that has parameters of its own; empty where the method gives no shares."""
    parameters: tuple[TraceShare, ...]
    """One per parameter tensor, in the order of the space."""
    stage: Stage
    plan: Plan
    seed: int
    seconds: float
    products: int
    unused: tuple[str, ...] = ()
    preflight: Preflight | None = None
    """Whether second derivatives are right; None if that was not asked."""
    notes: tuple[str, ...] = ()
    cross_check: CrossCheck | None = None
    """The same by another library; None if that was not asked."""
    gradients: float | None = None
    """Work in gradients (forward and backward pass) of the same data, by counting; None where it was not counted."""

    def __repr__(self) -> str:
        """The value with its interval, and what it belongs to."""
        it = self.estimate
        shown = f"{it.value:.6g} in [{it.low:.6g}, {it.high:.6g}]"
        return f"Trace({shown}, {it.method}, {'' if it.converged else 'not '}converged; {self.definition})"

    @property
    def value(self) -> float:
        """The trace."""
        return self.estimate.value

    @property
    def by_structure(self) -> bool:
        """Whether it came from the structure of a piecewise linear network, at the cost of gradients instead of products."""
        return self.estimate.method == "exact" and self.estimate.products == 0

    @property
    def mean(self) -> float:
        """Trace per parameter: the mean of the eigenvalues, and of the diagonal."""
        return self.estimate.value / self.definition.parameters

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values: what `--json` prints under "result".

        Returns:
            Mappings, lists, finite numbers and strings; None for what is unknown, without bound or not applicable.
        """
        found = self.estimate
        return plain(
            {
                "quantity": "trace of the Hessian",
                "definition": {**plain(self.definition), "text": str(self.definition)},
                "unit": self.unit,
                "trace": {
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "confidence": found.confidence,
                    "stderr": found.stderr,
                    "converged": found.converged,
                    "exact": found.exact,
                    "rounding": found.rounding,
                    "per_parameter": self.mean,
                },
                "method": found.method,
                "reason": found.reason,
                "probes": found.probes,
                "rank": found.rank,
                "tolerance": found.tolerance,
                "absolute_tolerance": found.absolute_tolerance,
                "layers": [self._row(share) for share in self.layers],
                "parameters": [self._row(share) for share in self.parameters],
                "loss": self.loss,
                "gradient_norm": self.gradient_norm,
                "products": None if self.by_structure else self.products,
                "search_products": None if self.by_structure else found.products,
                "gradients": self.gradients,
                "by_structure": self.by_structure,
                "seconds": self.seconds,
                "preflight": None if self.preflight is None else self.preflight.to_dict(),
                "cross_check": None if self.cross_check is None else self.cross_check.to_dict(),
                "stage": self.stage,
                "unused_parameters": self.unused,
                "notes": self.notes,
            }
        )

    def _row(self, share: TraceShare) -> dict[str, Any]:
        return {**plain(share), "share": share.value / self.value if self.value else None, "per_parameter": share.mean}


def shares(
    model: nn.Module, space: ParameterSpace, parts: TraceParts | None
) -> tuple[tuple[TraceShare, ...], tuple[TraceShare, ...]]:
    """Name the parts of an estimate.

    Args:
        model: Whose modules give the layers.
        space: Whose entries are the parts, in order.
        parts: Of the estimate; None: not known.

    Returns:
        Shares of layers and of parameter tensors; nothing for None. A tied tensor counts for the layer of its first name.
    """
    if parts is None:
        return (), ()
    homes = [entry.name.rpartition(".")[0] for entry in space.entries]
    runs: list[list[Entry]] = []
    for index, entry in enumerate(space.entries):
        if index and homes[index] == homes[index - 1]:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    names = [run[0].name.rpartition(".")[0] for run in runs]
    kinds = [type(model.get_submodule(name)).__name__ for name in names]
    by_layer = _shares([name or "(model)" for name in names], kinds, parts.merged([len(run) for run in runs]))
    shapes = ["x".join(map(str, entry.shape)) or "scalar" for entry in space.entries]
    return by_layer, _shares(list(space.names), shapes, parts)


def _shares(names: list[str], kinds: list[str], parts: TraceParts) -> tuple[TraceShare, ...]:
    columns = zip(names, kinds, parts.lengths, parts.values.tolist(), parts.stderr.tolist(), strict=True)
    return tuple(TraceShare(*column) for column in columns)
