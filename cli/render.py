"""Results on stdout: a table for people, tab-separated lines for pipes, JSON for programs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .progress import duration

if TYPE_CHECKING:
    from curvkit.measures import Sharpness

WHICH = {
    "largest": "largest (algebraic) eigenvalue",
    "smallest": "smallest (algebraic) eigenvalue",
    "both": "eigenvalues at both ends",
    "magnitude": "eigenvalue of largest magnitude",
}


def chosen_format(asked: str) -> str:
    """Resolve "auto": a table on a terminal, plain lines elsewhere."""
    if asked != "auto":
        return asked
    return "table" if sys.stdout.isatty() else "plain"


def sharpness_table(result: Sharpness, title: str, color: str) -> None:
    """Print the table with everything that must stand beside the numbers."""
    console = Console(
        no_color=color == "never" or None, force_terminal=True if color == "always" else None, highlight=False
    )
    console.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("#", "eigenvalue", "interval", "residual", "relative", ""):
        table.add_column(
            name, justify="right" if name in ("#", "eigenvalue", "residual", "relative") else "left", header_style="dim"
        )
    for index, value, low, high, residual, state in rows(result):
        table.add_row(
            str(index),
            Text(digits(value, high - low), style="bold"),
            f"[{digits(low, high - low)}, {digits(high, high - low)}]".replace("[", "\\[", 1),
            f"{residual:.1e}",
            f"{residual / abs(value):.1e}" if value else "-",
            Text(state, style="green" if state == "converged" else "yellow"),
        )
    console.print(Padding(table, (0, 0, 0, 1)))
    for name, text in remarks(result):
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=11, style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(f" {name}", Text(text))
        console.print(grid)


def sharpness_plain(result: Sharpness, title: str) -> str:
    """Tab-separated lines: a header, one line per eigenvalue, then one line per remark."""
    lines = [["#", "eigenvalue", "low", "high", "residual", "state"]]
    lines += [
        [str(i), *(repr(number) for number in (value, low, high, residual)), state]
        for i, value, low, high, residual, state in rows(result)
    ]
    lines += [[name, text] for name, text in (("checkpoint", title), *remarks(result))]
    return "\n".join("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in line) for line in lines)


def rows(result: Sharpness) -> list[tuple[int, float, float, float, float, str]]:
    """One row per eigenvalue: number, value, ends of its interval, residual, state."""
    pairs = result.eigenpairs
    found = zip(
        pairs.values.tolist(), pairs.intervals.tolist(), pairs.residuals.tolist(), pairs.converged.tolist(), strict=True
    )
    made = []
    for index, (value, (low, high), residual, converged) in enumerate(found, start=1):
        state = ("converged" if converged else "not converged") if pairs.recomputed else "residual estimated"
        made.append((index, value, low, high, residual, state))
    return made


def remarks(result: Sharpness) -> list[tuple[str, str]]:
    """What stands below the numbers."""
    pairs = result.eigenpairs
    made = [
        ("what", f"{WHICH[pairs.which]} of the Hessian at this checkpoint"),
        ("definition", str(result.definition)),
        ("at", f"loss {result.loss:.6g} · gradient norm {result.gradient_norm:.3g}"),
        ("missed", _missed(result)),
        ("data", _data(result)),
        ("cost", _cost(result)),
        ("engine", f"{result.plan} · seed {result.seed}"),
    ]
    if result.stage != "complete":
        made.insert(0, ("PARTIAL", _partial(result)))
    if pairs.multiplicities_below == 1 and len(pairs.values) > 1:
        made.append(
            ("note", "one start vector shows one copy of a repeated eigenvalue; multiplicities need --block-size")
        )
    made += [("note", note) for note in result.notes]
    if result.unused:
        made.append(("note", f"the loss does not depend on {listed(result.unused)}: zero curvature there"))
    return made


def digits(value: float, width: float) -> str:
    """A number with the digits that an interval of this width leaves, one more, and four at least."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    significant = 4 if width <= 0 else math.ceil(math.log10(abs(value) / width)) + 2 if abs(value) > width else 2
    return f"{value:.{min(max(significant, 4), 12)}g}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _missed(result: Sharpness) -> str:
    pairs = result.eigenpairs
    if pairs.confidence == 1.0:
        return "nothing: the whole space was spanned"
    claims = []
    if pairs.upper_bound is not None and pairs.which != "smallest":
        gap = pairs.upper_bound - pairs.values[0].item() if pairs.which in ("largest", "both") else None
        claims.append(f"above {pairs.upper_bound:.5g}" + (f" (a gap of {gap:.2g})" if gap is not None else ""))
    if pairs.lower_bound is not None and pairs.which != "largest":
        claims.append(f"below {pairs.lower_bound:.5g}")
    if not claims:
        return "no claim: the residual shows that there is an eigenvalue, not that none lies beyond it"
    return f"with probability {pairs.confidence:.0%} over the random start no eigenvalue lies {' or '.join(claims)}"


def _data(result: Sharpness) -> str:
    parts = []
    if result.spread is not None:
        spread = result.spread
        parts.append(
            f"along the first eigenvector v, v'Hv of each of {len(spread.quotients)} parts of the data lies in "
            f"[{spread.lowest:.4g}, {spread.highest:.4g}], standard error {spread.stderr:.2g}"
        )
    if result.halves is not None:
        halves = result.halves
        parts.append(
            f"two halves: {halves.lower:.4g} held out (below the population's value on average), "
            f"{halves.in_sample:.4g} in sample (above it on average)"
        )
    if parts:
        return "; ".join(parts)
    if result.stage != "complete":
        return "not measured yet"
    return "doubt from the sample not measured: it needs two batches, or a loss whose terms are known, and --data-doubt"


def _cost(result: Sharpness) -> str:
    pairs = result.eigenpairs
    extra = result.products - pairs.products
    doubt = f" + {extra} for the doubt from data" if extra > 0 else ""
    return f"{pairs.products} products{doubt} · {duration(result.seconds)}"


def _partial(result: Sharpness) -> str:
    if result.eigenpairs.recomputed:
        return "interrupted after the eigenvalues were certified; the doubt from data is missing"
    return "interrupted while searching: residuals are estimates, and the values can still grow"


def json_document(command: str, result: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The one document that --json prints."""
    return {"schema": f"curvkit.{command}/1", "result": result, "record": record}
