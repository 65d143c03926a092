"""The diagonal of a curvature matrix, with its doubt, its name and what it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.results.files import replaced
from curvkit.results.record import plain
from curvkit.results.trace_estimate import TraceParts

FORMAT = "curvkit.diagonal/1"
VALUE, STDERR = "value:", "stderr:"


@dataclass(frozen=True)
class Cost:
    """What an estimate took."""

    gradients: float
    """Work in gradients (forward and backward pass) of the same data, by counting passes."""
    seconds: float
    products: int = 0
    """Of these, products with a matrix."""
    peak_bytes: int | None = None
    """Memory beside model and data that was foreseen; None where it is not known."""


@dataclass(frozen=True)
class LayerDiagonal:
    """The diagonal over one parameter tensor."""

    name: str
    numel: int
    sum: float
    stderr: float
    """Of `sum`; NaN: unknown, 0: nothing was sampled."""
    mean: float
    largest: float
    """In absolute value."""
    share: float
    """Of `sum` in the trace."""
    negative_fraction: float
    """Share of the entries that are below zero."""


@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """The diagonal of a matrix, parameter-shaped; unit: loss / parameter^2."""

    values: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor] | None
    """Standard errors; None: nothing was sampled; NaN: unknown, for one sample alone."""
    matrix: str
    """What, not how: "hessian", "ggn", "fisher", "empirical_fisher", "squared_gradient", "second_moment"."""
    estimator: str
    """How, with its options."""
    cost: Cost
    samples: int = 0
    """Independent ones that `stderr` rests on."""
    seed: int | None = None
    """None: nothing was drawn."""
    sums: TraceParts | None = field(default=None, repr=False)
    """Sums over each parameter tensor with their samples; None where no error of a sum is known."""
    notes: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = field(default=None, repr=False)
    """How it was measured, as a file that was loaded says; None where nothing is said."""

    def __repr__(self) -> str:
        """Matrix, size and cost; not the numbers."""
        n = sum(value.numel() for value in self.values.values())
        return (
            f"DiagonalEstimate({self.matrix}, {n:,} entries by {self.estimator}, {self.cost.gradients:.3g} gradients)"
        )

    @property
    def trace(self) -> float:
        """Sum of all entries."""
        return math.fsum(value.double().sum().item() for value in self.values.values())

    @property
    def layers(self) -> tuple[LayerDiagonal, ...]:
        """One row per parameter tensor."""
        trace, rows = self.trace, list[LayerDiagonal]()
        errors = torch.full((len(self.values),), 0.0 if self.stderr is None else math.nan).tolist()
        if self.sums is not None:
            errors = self.sums.stderr.tolist()
        for (name, value), stderr in zip(self.values.items(), errors, strict=True):
            total, numel = value.double().sum().item(), value.numel()
            rows.append(
                LayerDiagonal(
                    name,
                    numel,
                    total,
                    stderr,
                    total / numel if numel else math.nan,
                    value.abs().max().item() if numel else math.nan,
                    total / trace if trace else math.nan,
                    (value < 0).double().mean().item() if numel else math.nan,
                )
            )
        return tuple(rows)

    def save(self, path: str | Path, *, record: Mapping[str, Any] | None = None) -> Path:
        """Write values, errors and what they are as safetensors.

        Args:
            path: An existing file is replaced.
            record: How it was made, as plain values; kept in the file. None: `self.record`.

        Returns:
            The path.

        Cost: one or two copies of the parameters on disk.

        Example:
            >>> import tempfile
            >>> found = DiagonalEstimate({"w": torch.ones(2)}, None, "hessian", "Exact", Cost(1.0, 0.1))
            >>> again = DiagonalEstimate.load(found.save(Path(tempfile.mkdtemp()) / "d.safetensors"))
            >>> again.values["w"].tolist(), again.matrix
            ([1.0, 1.0], 'hessian')
        """
        path = Path(path)
        tensors = {VALUE + name: value.detach().cpu().contiguous() for name, value in self.values.items()}
        tensors |= {STDERR + name: value.detach().cpu().contiguous() for name, value in (self.stderr or {}).items()}
        if self.sums is not None:
            tensors |= {"sums:known": self.sums.known, "sums:samples": self.sums.samples}
        said = {
            "matrix": self.matrix,
            "estimator": self.estimator,
            "cost": plain(self.cost),
            "samples": self.samples,
            "seed": self.seed,
            "notes": list(self.notes),
            "names": list(self.values),
            "record": plain(record if record is not None else self.record or {}),
        }
        beside = {"format": FORMAT, "estimate": json.dumps(said)}
        replaced(path, lambda part: save_file(tensors, part, metadata=beside))
        return path

    @classmethod
    def load(cls, path: str | Path) -> DiagonalEstimate:
        """Read what `save` wrote.

        Args:
            path: Of the file.

        Returns:
            The estimate, on the CPU.

        Raises:
            InvalidArgument: If it is another file, or damaged.

        Cost: one pass over the file.
        """
        try:
            said, found = _content(path)
            names: list[str] = said["names"]
            values = {name: found[VALUE + name] for name in names}
            stderr = {name: found[STDERR + name] for name in names if STDERR + name in found}
            lengths = tuple(value.numel() for value in values.values())
            sums = TraceParts(lengths, found["sums:known"], found["sums:samples"]) if "sums:known" in found else None
            cost, notes = Cost(**said["cost"]), tuple(said["notes"])
            told = said["matrix"], said["estimator"], cost, said["samples"], said["seed"]
            record: dict[str, Any] | None = said["record"] or None
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InvalidArgument(f"{path}: cannot be read as a diagonal ({error}). Write it anew.") from error
        return cls(values, stderr or None, *told, sums, notes, record)


def _content(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says, and its tensors."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it is no {FORMAT} file, as `DiagonalEstimate.save` writes")
        return json.loads(metadata["estimate"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class DiagonalSamples:
    """Mean and standard error of diagonals that come one by one, in the memory of two; one alone takes that of one.

        mean_m = mean_(m-1) + (d_m - mean_(m-1)) / m,    S_m = S_(m-1) + (d_m - mean_(m-1)) (d_m - mean_m)

    Args:
        names: Of the parameters, in order.

    Source: Welford (1962).

    Example:
        >>> drawn = DiagonalSamples(["w"])
        >>> for value in (1.0, 2.0, 3.0):
        ...     drawn.add({"w": torch.tensor([value])})
        >>> drawn.mean["w"].item(), round(drawn.stderr["w"].item(), 4)
        (2.0, 0.5774)
    """

    def __init__(self, names: tuple[str, ...] | list[str]) -> None:
        self._names, self.size = tuple(names), 0
        self.mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._sums: list[Tensor] = []

    def add(self, sample: Mapping[str, Tensor]) -> None:
        """Take one more.

        Args:
            sample: Parameter-shaped; the tensors are not kept.
        """
        self.size += 1
        self._sums.append(torch.stack([sample[name].sum(dtype=torch.float64).cpu() for name in self._names]))
        for name in self._names:
            d = sample[name]
            if self.size == 1:
                self.mean[name] = d.clone()
                continue
            step = d - self.mean[name]
            self.mean[name] += step / self.size
            square = step.mul_(d - self.mean[name])
            self._squares[name] = self._squares[name].add_(square) if self.size > 2 else square

    def scale(self, factor: float) -> None:
        """Multiply all samples so far.

        Args:
            factor: By this.
        """
        self.mean = {name: value * factor for name, value in self.mean.items()}
        self._squares = {name: value * factor**2 for name, value in self._squares.items()}
        self._sums = [sums * factor for sums in self._sums]

    @property
    def stderr(self) -> dict[str, Tensor]:
        """Of the mean; NaN for one sample."""
        m = self.size
        if m < 2:
            return {name: torch.full_like(value, math.nan) for name, value in self.mean.items()}
        return {name: (square / (m * (m - 1))).sqrt() for name, square in self._squares.items()}

    @property
    def sums(self) -> TraceParts:
        """Over each parameter, sample by sample."""
        lengths = tuple(self.mean[name].numel() for name in self._names)
        return TraceParts(lengths, torch.zeros(len(lengths), dtype=torch.float64), torch.stack(self._sums))
