"""A comparison on stdout: one column per checkpoint, differences beneath the numbers they are of, verdicts below."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .comparison_lines import WORDS, Line, lines, remarks
from .failures import harmless
from .progress import styled
from .render import print_labelled, print_remarks, tab_separated

if TYPE_CHECKING:
    from curvkit.measures import Comparison, Difference, Gap, Measured

STYLES = {"flatter": "green", "sharper": "yellow"}


def table(result: Comparison, where: str, color: str) -> None:
    """Print the table; where the columns do not fit, several of them at a time beside the labels, and at worst one under another."""
    console = styled(color)
    console.print(Text(_title(result, where), style="bold", overflow="fold"))
    letters = [_letter(i) for i in range(len(result.points))]
    for letter, point in zip(letters, result.points, strict=True):
        print_labelled(console, letter, Text(harmless(point.name)), width=4)
    made, left = lines(result), list(range(len(letters)))
    while left:
        fits = [count for count in range(len(left), 0, -1) if _fits(console, _grid(made, letters, left[:count]))]
        count = fits[0] if fits else 1
        console.print()
        if fits:
            console.print(Padding(_grid(made, letters, left[:count]), (0, 0, 0, 1)))
        else:
            _stacked(console, made, letters[left[0]], left[0])
        left = left[count:]
    console.print()
    for letter, verdict in zip(letters[1:], result.verdicts, strict=True):
        text = Text.assemble((WORDS[verdict.kind], f"bold {STYLES.get(verdict.kind, '')}".strip()), f": {verdict.text}")
        print_labelled(console, letter, text)
    print_remarks(console, remarks(result, letters))


def plain(result: Comparison, where: str) -> str:
    """Tab-separated lines: one per checkpoint and quantity with its difference, then verdicts, then remarks; nothing is shortened."""
    header = [
        "checkpoint",
        "quantity",
        "value",
        "low",
        "high",
        "stderr",
        "difference",
        "diff_low",
        "diff_high",
        "diff_stderr",
    ]
    rows = [[*header, "diff_stderr_unpaired"]]
    for index, point in enumerate(result.points):
        it = result.differences[index - 1] if index else None
        rows += [[point.name, *row] for row in _numbers(point, it)]
    for it, verdict in zip(result.differences, result.verdicts, strict=True):
        rows.append([it.point.name, "verdict", verdict.kind, verdict.text])
    rows.append(["comparison", _title(result, where)])
    return tab_separated([*rows, *map(list, remarks(result, [point.name for point in result.points]))])


def markdown(result: Comparison, where: str) -> str:
    """A Markdown table with the checkpoints as columns, the verdicts, and what the numbers are of."""
    letters = [_letter(i) for i in range(len(result.points))]
    rows = [["", *letters], ["---", *("---:" for _ in letters)]]
    rows += [
        [f"{'&nbsp;&nbsp;' if line.beneath else ''}{_escaped(line.label)}", *map(_escaped, line.cells)]
        for line in lines(result)
    ]
    text = ["| " + " | ".join(row) + " |" for row in rows]
    names = [f"- {letter}: {_code(point.name)}" for letter, point in zip(letters, result.points, strict=True)]
    said = [
        f"- {letter}: **{WORDS[v.kind]}**. {_escaped(v.text)}"
        for letter, v in zip(letters[1:], result.verdicts, strict=True)
    ]
    rest = [f"- {_escaped(name)}: {_escaped(words)}" for name, words in remarks(result, letters)]
    return "\n".join([f"**{_escaped(_title(result, where))}**", "", *names, "", *text, "", *said, *rest])


def _numbers(point: Measured, it: Difference | None) -> list[list[str]]:
    """Quantity, value, interval, standard error; difference, interval, standard errors: every digit, nothing where nothing is known."""
    made = [["loss", *_cells(point.loss, None, None, point.losses.stderr), *_gap(it.loss if it else None)]]
    if point.eigenpairs is not None:
        ends = point.eigenpairs.intervals.tolist()
        for index, value in enumerate(point.eigenpairs.values.tolist()):
            gap = it.lambda_max if it and index == 0 else None
            made.append(
                [f"lambda_{index + 1}" if index else "lambda_max", *_cells(value, *ends[index], None), *_gap(gap)]
            )
    if point.along is not None:
        made.append(
            ["v'Hv", *_cells(point.along.value, None, None, point.along.stderr), *_gap(it.data if it else None)]
        )
    if point.trace is not None:
        trace = point.trace
        made.append(
            ["trace", *_cells(trace.value, trace.low, trace.high, trace.stderr), *_gap(it.trace if it else None)]
        )
    if point.adaptive is not None and len(point.adaptive.values):
        value, ends = point.adaptive.values[0].item(), point.adaptive.intervals[0].tolist()
        made.append(["adaptive sharpness", *_cells(value, *ends, None), *_gap(it.adaptive if it else None)])
    made.append(["gradient norm", *_cells(point.gradient_norm)])
    made.append(["parameter norm", *_cells(point.norm)])
    if it is not None:
        made.append(["distance", *_cells(it.distance)])
        if it.overlap is not None:
            made.append(["overlap", *_cells(it.overlap.value)])
            made.append(["overlap by chance", *_cells(it.overlap.chance)])
    return made


def _cells(*numbers: float | None) -> list[str]:
    return ["" if number is None else repr(number) for number in numbers]


def _gap(gap: Gap | None) -> list[str]:
    return [] if gap is None else _cells(gap.value, gap.low, gap.high, gap.stderr, gap.unpaired)


def _grid(made: Sequence[Line], letters: Sequence[str], columns: Sequence[int]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("", no_wrap=True)
    for index in columns:
        grid.add_column(letters[index], justify="right", header_style="bold", no_wrap=True)
    for line in made:
        if any(line.cells[index] for index in columns):
            label = Text(f"  {line.label}" if line.beneath else line.label, style="dim" if line.beneath else "")
            cells = [Text(line.cells[index], style="dim" if line.beneath else "bold") for index in columns]
            grid.add_row(label, *cells)
    return grid


def _fits(console: Console, grid: Table) -> bool:
    return console.measure(grid).maximum + 1 <= console.width


def _stacked(console: Console, made: Sequence[Line], letter: str, index: int) -> None:
    """One checkpoint, a line for each quantity."""
    console.print(Text(letter, style="bold"))
    for line in made:
        if line.cells[index]:
            indent = "   " if line.beneath else " "
            console.print(Text(f"{indent}{line.label}  {line.cells[index]}", overflow="fold"))


def _title(result: Comparison, where: str) -> str:
    return f"{len(result.points)} checkpoints compared{where}; differences are to the first"


def _letter(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text.replace("\n", " "))


def _code(name: str) -> str:
    """A name as code, whatever is in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", name)), default=0))
    pad = " " if "`" in name else ""
    return f"{fence}{pad}{harmless(name)}{pad}{fence}"
