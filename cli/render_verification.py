"""A verification on stdout: what was stated, what was recomputed, and the verdict."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .failures import harmless
from .progress import styled
from .render import tab_separated

if TYPE_CHECKING:
    from curvkit.measures.verified_parts import Check

VERDICTS = {True: "holds", False: "DIFFERS", None: "not recomputed"}
BOUND = "not contradicted"
"""Of what products can contradict, but not show."""
LONGEST = 24
"""Most characters of a value in the table; the other formats have all of it."""


def plain(checks: list[Check], title: str) -> str:
    """Tab-separated lines: a header, one line per check, and the title."""
    lines = [["check", "stated", "recomputed", "verdict"]]
    lines += [[check.what, _all(check.stated), _all(check.recomputed), _said(check)] for check in checks]
    return tab_separated([*lines, ["result", title]])


def table(checks: list[Check], title: str, color: str) -> None:
    """Print the table; where it does not fit, a block per check."""
    console = styled(color)
    console.print(Text(title, style="bold", overflow="fold"))
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("check", "stated", "recomputed", ""):
        grid.add_column(name, header_style="dim", no_wrap=True)
    lines = [(check.what, _short(check.stated), _short(check.recomputed), check) for check in checks]
    for what, stated, recomputed, check in lines:
        grid.add_row(Text(what), Text(stated), Text(recomputed), _verdict(check))
    if console.measure(grid).maximum + 1 <= console.width:
        console.print(grid)
        return
    for what, stated, recomputed, check in lines:
        console.print(Text.assemble(what, "  ", _verdict(check)), overflow="fold")
        console.print(Text(f"   {stated} -> {recomputed}", overflow="fold"))


def _verdict(check: Check) -> Text:
    return Text(_said(check), style={True: "green", False: "bold red", None: "dim"}[check.holds])


def _said(check: Check) -> str:
    return BOUND if check.bound and check.holds else VERDICTS[check.holds]


def _all(value: Any) -> str:
    return "-" if value is None else harmless(value) if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and all(isinstance(each, float) for each in value):
        text = f"[{', '.join(f'{each:.6g}' for each in value)}]"
    else:
        text = _all(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
