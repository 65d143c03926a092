"""A trace on stdout: whose share it is, its interval, its method and its cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import cross_checking
from .progress import counted, duration, styled
from .render import derivatives, digits, listed, print_remarks, tab_separated

if TYPE_CHECKING:
    from curvkit.measures import Trace, TraceShare

BY_STRUCTURE = "by structure, without products: the gradient of every example for every output"


def table(result: Trace, title: str, by: str, color: str) -> None:
    """Print the table with everything that must stand beside the numbers; where it does not fit, a line per number."""
    console = styled(color)
    console.print(Text(title, style="bold", overflow="fold"))
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (by if by == "layer" else "parameter", "parameters", "trace", "± s.e.", "share", "trace/param"):
        left = name in ("layer", "parameter")
        grid.add_column(name, justify="left" if left else "right", header_style="dim", no_wrap=True)
    lines: list[tuple[str, ...]] = [_cells(result, share) for share in _rows(result, by)]
    for cells in lines:
        grid.add_row(*map(Text, cells))
    found = result.estimate
    total = Text(_shown(found.value, found.stderr), style="bold")
    grid.add_row(
        Text("total"), Text(f"{result.definition.parameters:,}"), total, _error(found.stderr), "", f"{result.mean:.2e}"
    )
    if console.measure(grid).maximum + 1 <= console.width:
        console.print(Padding(grid, (0, 0, 0, 1)))
    else:
        for (name, _, value, error, share, mean), each in zip(lines, _rows(result, by), strict=True):
            console.print(Text(f" {name}  {counted(each.parameters, 'parameter')}", overflow="fold"))
            console.print(Text(f"   {value} {_beside(error)}  {share}  {mean} per parameter", overflow="fold"))
        console.print(Text.assemble(" total  ", total, f" {_beside(_error(found.stderr))}"))
    print_remarks(console, remarks(result))


def plain(result: Trace, title: str, by: str) -> str:
    """Tab-separated lines: a header, one line per share, the total, then one line per remark."""
    lines = [["name", "kind", "parameters", "trace", "stderr", "share", "per_parameter"]]
    for share in _rows(result, by):
        part = repr(share.value / result.value) if result.value else "-"
        numbers = (str(share.parameters), repr(share.value), repr(share.stderr), part, repr(share.mean))
        lines.append([share.name, share.kind, *numbers])
    found, count = result.estimate, str(result.definition.parameters)
    lines.append(
        [
            "total",
            "",
            count,
            repr(found.value),
            repr(found.stderr),
            "1.0" if math.isfinite(found.value) else "-",
            repr(result.mean),
        ]
    )
    lines += [["low", repr(found.low)], ["high", repr(found.high)]]
    return tab_separated([*lines, *map(list, (("checkpoint", title), *remarks(result)))])


def remarks(result: Trace) -> list[tuple[str, str]]:
    """What stands below the numbers."""
    found = result.estimate
    made = [
        ("what", "the trace of the Hessian at this checkpoint: the sum of its eigenvalues, and of its diagonal"),
        ("interval", _interval(result)),
        ("definition", str(result.definition)),
        *([("unit", f"{result.unit}; the trace is in that per parameter squared")] if result.unit else []),
        ("at", f"loss {result.loss:.6g} · gradient norm {result.gradient_norm:.3g}"),
        *derivatives(result.preflight, result.plan),
        ("method", _method(result)),
        ("cost", f"{_cost(result)} · {duration(result.seconds)}"),
        ("engine", f"{result.plan} · seed {result.seed}"),
        *cross_checking.remarks(result.cross_check),
    ]
    if result.stage != "complete":
        made.insert(0, ("PARTIAL", "interrupted: the interval is that of the probes so far"))
    if not result.layers and result.stage == "complete":
        made.append(("note", f"{found.method} gives no shares of layers; --method deflated does"))
    made += [("note", note) for note in result.notes]
    if result.unused:
        made.append(("note", f"the loss does not depend on {listed(result.unused)}: zero curvature there"))
    return made


def _cost(result: Trace) -> str:
    """Products of the estimate, and those that checked others."""
    found = result.estimate
    if result.by_structure:
        return f"{BY_STRUCTURE}; a few products on four examples checked that it is right"
    checks = result.products - found.products
    checking = f" + {checks} that {'checks' if checks == 1 else 'check'} symmetry and rounding" if checks else ""
    work = "" if result.gradients is None else f" · about {result.gradients:.3g} gradients"
    return counted(found.products, "product") + checking + work


def _rows(result: Trace, by: str) -> tuple[TraceShare, ...]:
    return result.layers if by == "layer" else result.parameters


def _cells(result: Trace, share: TraceShare) -> tuple[str, ...]:
    part = f"{share.value / result.value:.1%}" if result.value and math.isfinite(result.value) else "-"
    value = _shown(share.value, share.stderr)
    return (
        f"{share.name} ({share.kind})",
        f"{share.parameters:,}",
        value,
        _error(share.stderr),
        part,
        f"{share.mean:.2e}",
    )


def _shown(value: float, stderr: float) -> str:
    return digits(value, stderr if math.isfinite(stderr) else 0.0)


def _error(stderr: float) -> str:
    return "exact" if stderr == 0.0 else "?" if math.isnan(stderr) else f"{stderr:.2g}"


def _beside(error: str) -> str:
    return f"± {error}" if error != "exact" else error


def _interval(result: Trace) -> str:
    found = result.estimate
    if found.exact and found.rounding is None:
        return "none: every diagonal entry was computed, what is left is rounding, which was not measured"
    if found.exact:
        return f"every diagonal entry was computed; rounding puts the sum off by ± {found.rounding:.2g} at most, about"
    if not math.isfinite(found.half_width):
        whole = "the method has not come to a value" if found.method == "exact" else "there are fewer than two probes"
        return f"nothing is known yet: {whole}"
    low, high = digits(found.low, found.half_width), digits(found.high, found.half_width)
    relative = f", ± {found.half_width / abs(found.value):.2g} of the value" if found.value else ""
    several = f"{counted(found.probes, 'probe')} {'is' if found.probes == 1 else 'are'} few for that"
    few = "" if found.probes >= 30 else f"; {several}, 30 are the least that count"
    known = "" if found.rounding is None else f", ± {found.rounding:.1g} for rounding included"
    return f"[{low}, {high}] holds the trace for this data with probability {found.confidence:.0%} over the probes{relative}{known}{few}"


def _method(result: Trace) -> str:
    found = result.estimate
    sampled = f", {counted(found.probes, 'probe')}" if found.probes else ""
    exact = f", {counted(found.rank, 'dimension')} exactly" if found.rank and not found.exact else ""
    return f"{found.method}{exact}{sampled} ({found.reason})"
