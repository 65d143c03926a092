"""What is said of a comparison: the lines of its table, cell by cell, and the remarks below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .progress import counted, duration
from .render import derivatives, digits, listed

if TYPE_CHECKING:
    from curvkit.measures import Comparison, Difference, Gap, Measured
    from curvkit.results import Eigenpairs

WORDS = {
    "flatter": "flatter",
    "sharper": "sharper",
    "same": "the same",
    "alike": "no difference",
    "rescaled": "rescaled",
    "loss differs": "other loss",
    "undecided": "undecided",
}
"""Verdicts in a cell; the sentences stand below."""


@dataclass(frozen=True)
class Line:
    """One line of the table: what it is, and a cell for each checkpoint."""

    label: str
    cells: tuple[str, ...]
    beneath: bool = False
    """A difference, beneath the number that it is of."""


def lines(result: Comparison) -> list[Line]:
    """Lay out what is known, the reference in the first column."""
    points, differences = result.points, result.differences

    def less(label: str, gaps: Sequence[Gap | None], *, interval: bool = False) -> list[Line]:
        cells = tuple("" if gap is None else _difference(gap, interval=interval) for gap in gaps)
        return [Line(label, ("", *cells), beneath=True)] if any(cells) else []

    made = [
        Line("loss", tuple(f"{it.loss:.6g}" for it in points)),
        *less("- A ± s.e.", [it.loss for it in differences]),
    ]
    eigenvalues = _eigenvalues(points)
    made += eigenvalues[:1]
    made += less("- A ± interval", [it.lambda_max for it in differences], interval=True)
    made += less("v'Hv - A ± s.e.", [it.data for it in differences])
    made += eigenvalues[1:]
    if any(it.trace is not None for it in points):
        made.append(Line("trace ± s.e.", tuple(_trace(it) for it in points)))
        made += less("- A ± s.e.", [it.trace for it in differences])
    if any(it.adaptive is not None for it in points):
        made.append(Line("adaptive sharpness", tuple(_value(it.adaptive, 0) for it in points)))
        made += less("- A ± interval", [it.adaptive for it in differences], interval=True)
    if any(it.gradient_norm is not None for it in points):
        made.append(
            Line("gradient norm", tuple("" if it.gradient_norm is None else f"{it.gradient_norm:.3g}" for it in points))
        )
    made.append(Line("parameter norm", tuple(f"{it.norm:.4g}" for it in points)))
    made.append(Line("distance to A", ("", *(f"{it.distance:.4g}" for it in differences))))
    if any(it.overlap is not None for it in differences):
        made.append(Line("overlap with A", ("", *(_overlap(it) for it in differences))))
    made.append(Line("verdict", ("reference", *(WORDS[it.kind] for it in result.verdicts))))
    return made


def remarks(result: Comparison, letters: Sequence[str]) -> list[tuple[str, str]]:
    """What stands below the numbers."""
    from curvkit.measures.verdicts import RULE

    reference = result.reference
    made: list[tuple[str, str]] = []
    if not result.complete:
        made.append(("PARTIAL", "interrupted: what is not there was not measured, and no verdict follows from it"))
    made += [
        ("rule", RULE),
        (
            "lambda_max",
            "the largest eigenvalue of the Hessian; the interval of a difference is that of both residuals",
        ),
        (
            "adaptive",
            "adaptive sharpness: lambda_max of diag|w| H diag|w|, which no rescaling of weights changes that leaves the function",
        ),
        *_trace_remark(result),
        *_data_remark(result),
    ]
    overlap = next((it.overlap for it in result.differences if it.overlap is not None), None)
    if overlap is not None:
        k = len(overlap.angles)
        what = (
            "of the first eigenvectors: their squared cosine"
            if k == 1
            else f"of the spaces of {k} eigenvectors: ||V'V_A||^2 / {k}"
        )
        made.append(("overlap", f"{what}; by chance {overlap.chance:.2g}"))
    if reference.definition is not None:
        made.append(("definition", str(reference.definition)))
        made += [] if reference.plan is None else derivatives(reference.preflight, reference.plan)
    made.append(("cost", f"{counted(result.products, 'product')} · {duration(result.seconds)}"))
    if reference.plan is not None:
        made.append(("engine", f"{reference.plan} · seed {result.seed}"))
    return [*made, *_notes(result, letters)]


def _notes(result: Comparison, letters: Sequence[str]) -> list[tuple[str, str]]:
    """Of each checkpoint; once, if all have it."""
    own = [list(point.notes) for point in result.points]
    for index, point in enumerate(result.points):
        if point.unused:
            own[index].append(f"the loss does not depend on {listed(point.unused)}: zero curvature there")
    common = [note for note in own[0] if all(note in others for others in own)]
    made = [("note", note) for note in common]
    for letter, notes in zip(letters, own, strict=True):
        made += [("note", f"{letter}: {note}") for note in notes if note not in common]
    return made


def _trace_remark(result: Comparison) -> list[tuple[str, str]]:
    gap = next((it.trace for it in result.differences if it.trace is not None), None)
    if gap is None or gap.stderr is None or gap.unpaired is None:
        return []
    if not gap.pairs:
        return [("trace", "every diagonal entry was computed; what is left is rounding")]
    gain = f"; of independent probes it would be {gap.unpaired:.2g} instead of {gap.stderr:.2g}" if gap.unpaired else ""
    return [
        ("trace", f"by {gap.pairs} probes that all share, so that the difference has a standard error of its own{gain}")
    ]


def _data_remark(result: Comparison) -> list[tuple[str, str]]:
    gap = next((it.loss for it in result.differences), None)
    if gap is None or gap.stderr is None:
        return [("data", "one part: how far losses and curvature depend on the sample is not known")]
    text = f"differences of loss and of v'Hv are paired over {gap.pairs} parts of the data; v is the first eigenvector of each checkpoint"
    return [("data", f"{text}. All is of this sample, whose lambda_max is biased upwards")]


def _eigenvalues(points: Sequence[Measured]) -> list[Line]:
    most = max((len(it.eigenpairs.values) for it in points if it.eigenpairs is not None), default=0)
    names = ["lambda_max", *(f"lambda_{i + 1}" for i in range(1, most))]
    return [Line(name, tuple(_value(it.eigenpairs, i) for it in points)) for i, name in enumerate(names[:most])]


def _value(pairs: Eigenpairs | None, index: int) -> str:
    """An eigenvalue with the digits that its interval leaves; a question mark where the residual is above the tolerance."""
    if pairs is None or index >= len(pairs.values):
        return ""
    low, high = pairs.intervals[index].tolist()
    sure = pairs.recomputed and bool(pairs.converged[index])
    return digits(pairs.values[index].item(), high - low) + ("" if sure else " ?")


def _trace(point: Measured) -> str:
    found = point.trace
    if found is None:
        return ""
    if found.exact:
        return digits(found.value, 2 * found.rounding)
    return f"{digits(found.value, found.stderr)} ± {found.stderr:.2g}"


def _difference(gap: Gap, *, interval: bool) -> str:
    """With its standard error, or half the length of its interval; zero is zero."""
    error = gap.half_width if interval else gap.stderr
    if gap.value == 0.0 and not gap.stderr:
        return "0"
    known = error is not None and math.isfinite(error)
    shown = digits(gap.value, 2 * error if known and error else 0.0)
    sign = "+" if gap.value > 0.0 else ""
    return f"{sign}{shown} ± {error:.2g}" if known and error else f"{sign}{shown}"


def _overlap(it: Difference) -> str:
    return "" if it.overlap is None else f"{it.overlap.value:.3g}"
