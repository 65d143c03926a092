"""A diagonal layer by layer, or tensor by tensor, and as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from curvkit.results.diagonal_estimate import DiagonalEstimate

FAR = 2.0
"""Standard errors from zero at which an entry counts as told from it."""


@dataclass(frozen=True)
class Row:
    """Some of the parameters."""

    name: str
    kind: str
    """Class of the layer, or shape of the tensor."""
    parameters: int
    sum: float
    stderr: float
    """Of `sum`; 0: nothing was sampled, NaN: unknown."""
    share: float
    """Of `sum` in the trace; NaN where that is zero, or not two standard errors from it."""
    mean: float
    largest: float
    """In absolute value."""
    negative: float
    """Share of the entries that are below zero."""


@dataclass(frozen=True)
class Entries:
    """How large the entries are, and how far they are known."""

    root_mean_square: float
    stderr: float
    """Root mean square of their standard errors; 0: nothing was sampled, NaN: unknown."""
    told_from_zero: float
    """Share of the entries that are more than two standard errors from zero; NaN: unknown."""


@dataclass(frozen=True)
class Rows:
    """All of it."""

    layers: tuple[Row, ...]
    parameters: tuple[Row, ...]
    total: Row
    entries: Entries

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: value for key, value in asdict(self).items() if key != "total"}


def rows(found: DiagonalEstimate, model: nn.Module) -> Rows:
    """Add up the entries of each layer and tensor; `model` says what kind of layer it is."""
    names = list(found.values)
    homes = [name.rpartition(".")[0] for name in names]
    runs: list[list[str]] = []
    for index, name in enumerate(names):
        if index and homes[index] == homes[index - 1]:
            runs[-1].append(name)
        else:
            runs.append([name])
    inner = [run[0].rpartition(".")[0] for run in runs]
    kinds = [type(model.get_submodule(name)).__name__ for name in inner]
    shapes = ["x".join(map(str, value.shape)) or "scalar" for value in found.values.values()]
    return Rows(
        layers=_rows(found, [name or "(model)" for name in inner], kinds, runs),
        parameters=_rows(found, names, shapes, [[name] for name in names]),
        total=_rows(found, ["total"], [""], [names])[0],
        entries=_entries(found.values, found.stderr),
    )


def _rows(
    found: DiagonalEstimate, names: Sequence[str], kinds: Sequence[str], runs: Sequence[Sequence[str]]
) -> tuple[Row, ...]:
    trace, error = found.trace, 0.0 if found.sums is None else _joined(found, [len(found.values)])[0]
    known = trace != 0.0 and not abs(trace) < FAR * error  # an error that is unknown says nothing
    exact = found.stderr is None and found.matrix != "second_moment"  # which training drew, without keeping its spread
    errors = [0.0 if exact else math.nan] * len(runs)
    if found.sums is not None:
        errors = _joined(found, [len(run) for run in runs])
    made: list[Row] = []
    for name, kind, run, stderr in zip(names, kinds, runs, errors, strict=True):
        values = [found.values[key] for key in run]
        count, total = sum(v.numel() for v in values), math.fsum(v.double().sum().item() for v in values)
        largest = max((v.abs().max().item() for v in values if v.numel()), default=math.nan)
        below = sum(int((v < 0).sum()) for v in values)
        of = count or math.nan
        share = total / trace if known else math.nan
        made.append(Row(name, kind, count, total, stderr, share, total / of, largest, below / of))
    return tuple(made)


def _joined(found: DiagonalEstimate, counts: Sequence[int]) -> list[float]:
    """Standard errors of the sums over neighbouring parameters, so many at a time."""
    return [] if found.sums is None else found.sums.merged(counts).stderr.tolist()


def _entries(values: Mapping[str, Tensor], stderr: Mapping[str, Tensor] | None) -> Entries:
    n = sum(v.numel() for v in values.values()) or math.nan
    size = math.sqrt(math.fsum(v.double().square().sum().item() for v in values.values()) / n)
    if stderr is None:
        return Entries(size, 0.0, 1.0)
    error = math.sqrt(math.fsum(v.double().square().sum().item() for v in stderr.values()) / n)
    far = sum(int((value.abs() > FAR * stderr[name]).sum()) for name, value in values.items())
    return Entries(size, error, math.nan if math.isnan(error) else far / n)
