"""A diagonal on stdout: of which matrix, in which layers, how far it is known, and what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .diagonal_result import MATRICES, Diagonal
from .diagonal_rows import FAR, Row
from .failures import harmless
from .progress import counted, duration, styled
from .render import digits, print_remarks, tab_separated
from .render_inspection import size

if TYPE_CHECKING:
    from curvkit.results.diagonal_estimate import DiagonalEstimate

NOISY, MOST_NOISE, GOAL = 0.5, 0.8, 0.1
"""Errors relative to entries above which there is a warning; the share of noise in the squares of the entries up to which it is known well
enough to say how many samples would do; the errors that they would do for."""
COLUMNS = ("parameters", "sum", "± s.e.", "share", "mean", "largest", "below 0")
FEWER = ("sum", "± s.e.", "share", "mean", "largest")
"""What is left of them where all do not fit; the plain lines have them all."""
FEW = 30
"""Samples below which it is said how far standard errors are known themselves."""


def table(found: Diagonal, title: str, by: str, color: str) -> None:
    """Print a line per layer, or a block where that does not fit, and all that must stand beside the numbers."""
    console = styled(color)
    console.print(Text(harmless(title), style="bold", overflow="fold"))
    shown = [*_shown(found, by), found.rows.total]
    grids = (_grid(shown, by, kinds, few) for kinds, few in ((True, False), (False, False), (False, True)))
    grid = next((grid for grid in grids if console.measure(grid).maximum + 1 <= console.width), None)
    if grid is not None:
        console.print(Padding(grid, (0, 0, 0, 1)))
    else:
        for row in shown:
            _block(console, row)
    print_remarks(console, remarks(found))


def plain(found: Diagonal, title: str, by: str) -> str:
    """Tab-separated lines: a header, one line per row, the total, then one line per remark."""
    lines = [["name", "kind", "parameters", "sum", "stderr", "share", "mean", "largest", "negative"]]
    for row in (*_shown(found, by), found.rows.total):
        numbers = (row.sum, row.stderr, row.share, row.mean, row.largest, row.negative)
        lines.append([harmless(row.name), row.kind, str(row.parameters), *map(_number, numbers)])
    return tab_separated([*lines, *map(list, (("checkpoint", harmless(title)), *remarks(found)))])


def remarks(found: Diagonal) -> list[tuple[str, str]]:
    """What stands below the numbers."""
    it = found.estimate
    what = MATRICES.get(it.matrix, ("", ""))[1]
    made = [
        ("what", f"{found.quantity}{': ' if what else ''}{what}"),
        ("estimator", it.estimator),
        ("errors", _errors(found)),
        ("entries", _entries(found)),
        *_noise(found),
        ("definition", found.text),
        *([("unit", f"{found.unit}; entries are in that per parameter squared")] if found.unit else []),
        *([("at", f"loss {found.loss:.6g}")] if found.loss is not None else []),
        *_derivatives(found),
        ("cost", _cost(it)),
        *([("seed", str(it.seed))] if it.seed is not None else []),
        *(("note", note) for note in found.notes),
    ]
    return [(name, harmless(text)) for name, text in made]


def _shown(found: Diagonal, by: str) -> tuple[Row, ...]:
    return found.rows.layers if by == "layer" else found.rows.parameters


def _grid(shown: Sequence[Row], by: str, kinds: bool, few: bool) -> Table:
    """All columns, or those that fit a usual terminal; `mean` and the sum say how many parameters there are."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = [by if by == "layer" else "parameter", *COLUMNS]
    for name in [name for name in names if not few or name in (names[0], *FEWER)]:
        grid.add_column(name, justify="left" if name == names[0] else "right", header_style="dim", no_wrap=True)
    for row in shown:
        name = f"{row.name} ({row.kind})" if kinds and row.kind else row.name
        cells = zip(COLUMNS, (f"{row.parameters:,}", *_cells(row)), strict=True)
        style = "bold" if row is shown[-1] else ""
        texts = [
            Text(cell, style=style if column == "sum" else "") for column, cell in cells if not few or column in FEWER
        ]
        grid.add_row(Text(harmless(name)), *texts)
    return grid


def _block(console: Console, row: Row) -> None:
    value, error, share, mean, largest, negative = _cells(row)
    kind = f" ({row.kind})" if row.kind else ""
    console.print(Text(f" {harmless(row.name)}{kind}  {counted(row.parameters, 'parameter')}", overflow="fold"))
    beside = error if error == "exact" else f"± {error}"
    text = f"sum {value} {beside}, {share} of the trace; mean {mean}, largest {largest}, {negative} below 0"
    console.print(Padding(Text(text, overflow="fold"), (0, 0, 0, 3)))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        _value(row.sum, row.stderr),
        "exact" if row.stderr == 0.0 else "?" if math.isnan(row.stderr) else f"{row.stderr:.2g}",
        _percent(row.share),
        f"{row.mean:.1e}",
        f"{row.largest:.1e}",
        _percent(row.negative),
    )


def _value(value: float, stderr: float) -> str:
    """A value to the digits that its standard error has; to four where that is none or unknown."""
    if not (math.isfinite(value) and math.isfinite(stderr) and stderr > 0.0):
        return digits(value, 0.0)
    decimals = 1 - math.floor(math.log10(stderr))
    if not -4 <= decimals <= 6:
        return f"{value:.1e}"
    shown = f"{round(value, decimals):.{max(decimals, 0)}f}"
    return shown.removeprefix("-") if float(shown) == 0.0 else shown


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("-0.0%", "0.0%") if math.isfinite(share) else "-"


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else "-"


def _errors(found: Diagonal) -> str:
    it = found.estimate
    if it.matrix == "second_moment":
        return "unknown: the optimizer keeps a running mean and nothing of its spread"
    if it.stderr is None:
        return "none: nothing was sampled"
    if it.samples < 2:
        return "unknown: one sample says nothing of its own error. Two and more do; --set says how many"
    few = f", each known to some {1 / math.sqrt(2 * (it.samples - 1)):.0%} itself" if it.samples < FEW else ""
    return f"one standard error each, from {it.samples:,} samples{few}; that other data would give another diagonal is not in them"


def _entries(found: Diagonal) -> str:
    it = found.rows.entries
    text = f"root mean square {it.root_mean_square:.3g}"
    if found.estimate.stderr is None:
        return text
    if math.isnan(it.stderr):
        return f"{text}, with errors that are unknown"
    relative = f" ({it.stderr / it.root_mean_square:.0%})" if it.root_mean_square else ""
    text += f", of their standard errors {it.stderr:.2g}{relative}"
    return (
        text
        if not found.rows.total.negative
        else f"{text}; {it.told_from_zero:.0%} lie more than {FAR:g} errors from zero"
    )


def _noise(found: Diagonal) -> list[tuple[str, str]]:
    """What is mostly noise, and how many samples would mend it."""
    it, total, made = found.rows.entries, found.rows.total, list[tuple[str, str]]()
    if math.isfinite(it.stderr) and it.stderr > NOISY * it.root_mean_square > 0.0:
        noise = (it.stderr / it.root_mean_square) ** 2
        text = "the entries one by one are mostly noise: read sums of them, or take more samples; four times as many halve the errors"
        if noise < MOST_NOISE:
            needed = found.estimate.samples * noise / (1 - noise) / GOAL**2
            text += f", and about {float(f'{needed:.1g}'):,.0f} bring them to {GOAL:.0%} of the entries"
        made.append(("noise", text))
    if abs(total.sum) < FAR * total.stderr:
        made.append(("share", f"of layers not known: the trace lies within {FAR:g} of its errors from zero"))
    return made


def _derivatives(found: Diagonal) -> list[tuple[str, str]]:
    if found.preflight is None:
        return [("derivatives", "not checked: --no-preflight")] if found.checked else []
    return [("derivatives", str(found.preflight))] if found.preflight.verdict == "right" else []


def _cost(it: DiagonalEstimate) -> str:
    products = f", {counted(it.cost.products, 'product')}" if it.cost.products else ""
    memory = (
        "" if it.cost.peak_bytes is None else f" · about {size(it.cost.peak_bytes)} beside model and data, foreseen"
    )
    work = f"{it.cost.gradients:.3g} gradients by counting{products}"
    return f"{work} · {duration(it.cost.seconds)}{memory}"
