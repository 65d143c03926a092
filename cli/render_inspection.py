"""What inspecting a checkpoint shows: its parts, what can be done with it, and what cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .failures import harmless
from .progress import counted, styled
from .render import listed, print_labelled, tab_separated

if TYPE_CHECKING:
    from curvkit.checkpoints.inspection import Inspection
    from curvkit.checkpoints.optimizer_summary import OptimizerSummary

COLUMNS = ("group", "tensors", "numbers", "size", "dtype")


def table(found: Inspection, color: str) -> None:
    """Print a line for each part with tensors, and what there is to say; where it does not fit, a block per part."""
    console = styled(color)
    title = Text.assemble((_path(found), "bold"), f"  {harmless(found.kind)} · {size(found.bytes)}", overflow="fold")
    console.print(title)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        left = name in ("group", "dtype")
        grid.add_column(name, justify="left" if left else "right", header_style="dim", no_wrap=True)
    lines = [_cells(found, index) for index in range(len(found.groups))]
    for cells in lines:
        grid.add_row(*map(Text, cells))
    if lines and console.measure(grid).maximum + 1 <= console.width:
        console.print(Padding(grid, (0, 0, 0, 1)))
    else:
        for name, tensors, numbers, stored, dtypes in lines:
            console.print(Text(f" {name}", overflow="fold"))
            counts = f"{tensors} tensor{'' if tensors == '1' else 's'}, {numbers} number{'' if numbers == '1' else 's'}"
            text = Text(f"{counts}, {stored}, {dtypes}", overflow="fold")
            console.print(Padding(text, (0, 0, 0, 3)))
    for name, text in remarks(found):
        style = "bold red" if name == "refused" else ""
        print_labelled(console, name, Text(text, style=style))


def plain(found: Inspection) -> str:
    """Tab-separated lines: a header, one line per part, then one line per remark."""
    lines = [["group", "tensors", "numbers", "bytes", "dtype"]]
    for group in found.groups:
        numbers = (str(group.tensors), str(group.numbers), str(group.bytes), " ".join(group.dtypes))
        lines.append([harmless(group.name), *numbers])
    head = [("path", _path(found)), ("kind", harmless(found.kind)), ("bytes", str(found.bytes))]
    return tab_separated([*lines, *map(list, (*head, *remarks(found)))])


def document(found: Inspection) -> str:
    """The JSON document; ASCII, so that no name in a file reaches a terminal as it is, and null for NaN and infinity, as in results."""
    return json.dumps({"schema": "curvkit.inspect/1", "result": _finite(found.to_dict())}, indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """As `curvkit.results.plain`, which imports torch."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remarks(found: Inspection) -> list[tuple[str, str]]:
    """What stands below the parts."""
    made: list[tuple[str, str]] = []
    if found.refusal is not None and found.next is not None:
        made.append(("unclear", found.refusal))
    elif found.refusal is not None:
        made.append(("refused", f"it is not read: {found.refusal}"))
        if not all(name in found.refusal for name in found.refused_globals):
            made.append(("refers to", listed(found.refused_globals, 20)))
    else:
        made.append(("safe", "tensors and plain data alone: reading it runs nothing"))
    if found.step is not None:
        made.append(("step", f"{found.step:,}"))
    if found.optimizer is not None:
        made.append(("optimizer", _optimizer(found.optimizer)))
    if found.weight_keys:
        taken, *others = found.weight_keys
        rest = f"; also there: {listed(others)} (--key)" if others else ""
        made.append(("weights", f"under {taken!r}{rest}"))
    if "ema" in found.variants:
        made.append(("averaged", "averaged weights are there too, and are taken with --ema"))
    if found.removed_prefixes:
        made.append(("prefixes", f"taken from the names: {', '.join(found.removed_prefixes)}"))
    if found.tied:
        made.append(("tied", "; ".join(" = ".join(names) for names in found.tied[:4])))
    if found.recipe is not None:
        made.append(("recipe", found.recipe))
    made.append(("checksum", found.checksum))
    made += [("note", note) for note in found.notes]
    if found.next is not None:
        made.append(("next", found.next))
    return [(name, harmless(text)) for name, text in made]


def size(number: int) -> str:
    """Bytes for people, in powers of ten as file managers show them."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:,.0f} {unit}"
    return counted(number, "byte")


def _cells(found: Inspection, index: int) -> tuple[str, ...]:
    group = found.groups[index]
    numbers = (f"{group.tensors:,}", f"{group.numbers:,}", size(group.bytes))
    return harmless(group.name), *numbers, ", ".join(group.dtypes)


def _optimizer(state: OptimizerSummary) -> str:
    parts = [harmless(state.name) if state.name else "unknown class"]
    named: tuple[tuple[str, Sequence[float]], ...] = (
        ("lr", state.lr),
        ("betas", state.betas or ()),
        ("momentum", () if state.momentum is None else (state.momentum,)),
        ("weight decay", state.weight_decay),
    )
    parts += [f"{name} {listed([f'{value:.4g}' for value in values])}" for name, values in named if values]
    if state.nesterov:
        parts.append("nesterov")
    if state.groups > 1:
        parts.append(counted(state.groups, "group"))
    if state.step is not None:
        parts.append(f"after {counted(state.step, 'step')}")
    return " · ".join(parts)


def _path(found: Inspection) -> str:
    return harmless(str(found.path))
