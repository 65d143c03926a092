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

from . import cross_checking, render_stability
from .progress import counted, duration, styled

if TYPE_CHECKING:
    from curvkit.measures import Sharpness
    from curvkit.operators import Plan
    from curvkit.operators.preflight import Preflight

WHICH = {
    "largest": "largest (algebraic) eigenvalue{s}",
    "smallest": "smallest (algebraic) eigenvalue{s}",
    "both": "eigenvalue{s} at both ends of the spectrum",
    "magnitude": "eigenvalue{s} of largest magnitude",
}


STACKED = 40
"""Below so many columns the remarks stand under their names, not beside them."""


def chosen_format(asked: str) -> str:
    """Resolve "auto": a table on a terminal, plain lines elsewhere."""
    if asked != "auto":
        return asked
    return "table" if sys.stdout.isatty() else "plain"


def sharpness_table(result: Sharpness, title: str, color: str) -> None:
    """Print the table with everything that must stand beside the numbers; where it does not fit, a block per eigenvalue."""
    console = styled(color)
    console.print(Text(title, style="bold", overflow="fold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("#", "eigenvalue", "interval", "residual", "relative", ""):
        justify = "left" if name in ("interval", "") else "right"
        table.add_column(name, justify=justify, header_style="dim", no_wrap=True)
    narrow: list[Text] = []
    for index, value, low, high, residual, state in rows(result):
        shown, ends = digits(value, high - low), f"[{digits(low, high - low)}, {digits(high, high - low)}]"
        relative = f"{residual / abs(value):.1e}" if value else "-"
        style = "green" if state == "converged" else "yellow"
        table.add_row(
            str(index), Text(shown, style="bold"), Text(ends), f"{residual:.1e}", relative, Text(state, style=style)
        )
        narrow.append(
            Text.assemble(
                (shown, "bold"), "  ", (state, style), f"\n{ends}\nresidual {residual:.1e}, relative {relative}"
            )
        )
    if console.measure(table).maximum + 1 <= console.width:
        console.print(Padding(table, (0, 0, 0, 1)))
    else:
        for index, block in enumerate(narrow, start=1):
            console.print(_beside(f" {index}", 3, block))
    print_remarks(console, remarks(result))


def print_remarks(console: Console, remarks: Sequence[tuple[str, str]]) -> None:
    """Print names and texts; beside each other where there is room."""
    for name, text in remarks:
        print_labelled(console, name, Text(text))


def print_labelled(console: Console, name: str, text: Text, width: int = 12) -> None:
    """Print a text beside its name of so many columns, or under it where there is little room."""
    if console.width < STACKED or width > console.width / 2:
        console.print(Text(f" {name}", style="dim"))
        text.overflow = "fold"
        console.print(Padding(text, (0, 0, 0, 3)))
    else:
        console.print(_beside(f" {name}", width, text))


def tab_separated(lines: Sequence[Sequence[str]]) -> str:
    """One line each, whatever is in the cells."""
    return "\n".join("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in line) for line in lines)


def sharpness_plain(result: Sharpness, title: str) -> str:
    """Tab-separated lines: a header, one line per eigenvalue, then one line per remark."""
    lines = [["#", "eigenvalue", "low", "high", "residual", "state"]]
    lines += [
        [str(i), *(repr(number) for number in (value, low, high, residual)), state]
        for i, value, low, high, residual, state in rows(result)
    ]
    lines += [[name, text] for name, text in (("checkpoint", title), *remarks(result))]
    return tab_separated(lines)


def _beside(label: str, width: int, text: Text) -> Table:
    """A label of so many columns, and a text that keeps its indent where it wraps."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=width, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(label, text)
    return grid


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
    count = len(pairs.values)
    what = WHICH[pairs.which].format(s="s" if count > 1 else "")
    made = [
        ("what", f"the {f'{count} ' if count > 1 else ''}{what} of the Hessian at this checkpoint"),
        ("definition", str(result.definition)),
        ("at", f"loss {result.loss:.6g} · gradient norm {result.gradient_norm:.3g}"),
        *derivatives(result.preflight, result.plan),
        *_residuals(result),
        ("missed", _missed(result)),
        *_data(result),
        *_scale(result),
        *render_stability.remarks(result.stability),
        ("cost", _cost(result)),
        ("engine", f"{result.plan} · seed {result.seed}"),
        *cross_checking.remarks(result.cross_check),
    ]
    if result.stage != "complete":
        made.insert(0, ("PARTIAL", _partial(result)))
    if pairs.multiplicities_below == 1 and len(pairs.values) > 1:
        made.append(
            ("note", "one start vector shows one copy of a repeated eigenvalue; multiplicities need --block-size")
        )
    beside = [note for found in (result.adaptive, result.stability) if found is not None for note in found.notes]
    made += [("note", note) for note in dict.fromkeys([*result.notes, *beside])]
    if result.unused:
        made.append(("note", f"the loss does not depend on {listed(result.unused)}: zero curvature there"))
    return made


def digits(value: float, width: float) -> str:
    """A number with the digits that an interval of this width leaves, one more, and four at least."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    significant = 4 if width <= 0 else math.ceil(math.log10(abs(value) / width)) + 1 if abs(value) > width else 1
    return f"{value:#.{min(max(significant, 4), 16)}g}".removesuffix(".")


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def derivatives(found: Preflight | None, plan: Plan) -> list[tuple[str, str]]:
    """What the check of second derivatives says, unless a note says it; differences of gradients have none to check."""
    from curvkit.operators.difference import DifferenceGraph

    if plan.rule == DifferenceGraph.rule:
        return [("derivatives", "differences of gradients in float64, at two steps that must agree")]
    if found is None:
        return [("derivatives", "not checked: --no-preflight")]
    return [("derivatives", str(found))] if found.verdict == "right" else []


def _residuals(result: Sharpness) -> list[tuple[str, str]]:
    pairs = result.eigenpairs
    if not pairs.recomputed:
        return []
    text = f"recomputed by products in {pairs.residual_dtype}"
    if pairs.rounding_measured:
        text += f"; those of the search, in {result.arithmetic}, err by about {pairs.product_error:.1g} of ||H||"
    return [("residuals", text)]


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
    chance = f"with probability {pairs.confidence:.0%} over the random start, and rounding as usual,"
    return f"{chance} no eigenvalue lies {' or '.join(claims)}"


def _data(result: Sharpness) -> list[tuple[str, str]]:
    made = []
    if result.spread is not None:
        spread = result.spread
        row = f" (row {result.leading + 1})" if len(result.eigenpairs.values) > 1 else ""
        made.append(
            (
                "data",
                f"along the eigenvector v{row}, v'Hv of each of {len(spread.quotients)} parts of the data lies in "
                f"[{spread.lowest:.4g}, {spread.highest:.4g}]; standard error of their mean {spread.stderr:.2g}",
            )
        )
    if result.halves is not None:
        halves = result.halves
        if bool(result.eigenpairs.converged[0]):
            text = f"{halves.lower:.4g} on the half held out, {halves.in_sample:.4g} in sample; for data that the weights have not seen "
            text += "the population's value lies between them on average, for training data it can lie above both"
        else:
            text = f"{halves.lower:.4g} on the half held out; the value in sample has not converged and is no upper end"
        made.append(("two halves", text))
    if not made and result.stage in ("searching", "spread", "halves"):
        made.append(("data", "not measured yet"))
    elif not made:
        made.append(
            (
                "data",
                "doubt from the sample not measured: it takes --data-doubt, and two batches or a loss whose terms are known",
            )
        )
    return made


def _scale(result: Sharpness) -> list[tuple[str, str]]:
    """Tensors whose length is arbitrary, and the measure that does not depend on it."""
    made: list[tuple[str, str]] = []
    if result.scale is not None and (result.scale.invariant or result.scale.notes):
        made.append(("scale", "; ".join([str(result.scale), *result.scale.notes])))
    if result.adaptive is not None:
        low, high = result.adaptive.eigenpairs.intervals[0].tolist()
        state = "" if result.adaptive.eigenpairs.all_converged else ", not converged"
        text = f"lambda_max(diag|w| H diag|w|) = {result.adaptive.value:.4g} in [{low:.4g}, {high:.4g}]{state}: per relative change of the "
        made.append(("adaptive", text + "weights, which rescaling them does not change"))
    return made


def _cost(result: Sharpness) -> str:
    pairs = result.eigenpairs
    beside = {"adaptive sharpness": result.adaptive, "the limit": result.stability}
    parts = {name: found.products for name, found in beside.items() if found is not None and found.products}
    parts = {"the doubt from data": result.products - pairs.products - sum(parts.values()), **parts}
    more = "".join(f" + {products} for {name}" for name, products in parts.items() if products > 0)
    return f"{counted(pairs.products, 'product')}{more} · {duration(result.seconds)}"


def _partial(result: Sharpness) -> str:
    if result.stage in ("adaptive", "stability"):
        return "interrupted after the eigenvalues and their doubt were known: what stands beside them is incomplete"
    if result.eigenpairs.recomputed:
        return "interrupted after the eigenvalues were certified: the doubt from data is incomplete"
    return "interrupted while searching: residuals are estimates, and the values can still move"


def json_document(command: str, result: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The one document that --json prints."""
    return {"schema": f"curvkit.{command}/1", "result": result, "record": record}
