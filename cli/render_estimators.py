"""The estimators that there are, on stdout; and all that is to be known of one of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.text import Text

from .diagonal_result import MATRICES
from .documentation import Documentation
from .failures import harmless
from .progress import styled
from .render import print_labelled, print_remarks, tab_separated

if TYPE_CHECKING:
    from curvkit.estimators.registry import Description

LABEL = 20
"""Columns of the names."""
UNKNOWN = "not imported yet: `curvkit estimators {}` shows it"


def table(found: tuple[Description, ...], color: str) -> None:
    """Print a block for each: its matrix and what it is, its options, and what is against it."""
    console = styled(color)
    for it in found:
        text = Text(harmless(_summary(it)))
        matrix = [f"matrix {it.matrix}"] if it.matrix else []
        origin = [] if it.origin == "curvkit" else [f"from {it.origin}"]
        beside = harmless(" · ".join([*matrix, *_short(it), *origin]))
        text.append(f"{chr(10) if text.plain and beside else ''}{beside}", style="dim")
        if it.failure is not None:
            text.append(f"\ncannot be used: {harmless(it.failure)}", style="yellow")
        print_labelled(console, harmless(it.name), text, LABEL)
    console.print(
        Text(
            "\n`curvkit estimators NAME` says more; `curvkit diagonal CHECKPOINT --estimator NAME` uses it.",
            style="dim",
        )
    )


def plain(found: tuple[Description, ...]) -> str:
    """Tab-separated lines: a header, one line per estimator."""
    lines = [["name", "matrix", "summary", "options", "origin", "failure"]]
    lines += [
        [it.name, it.matrix or "-", _summary(it), " ".join(_short(it)) or "-", it.origin, it.failure or "-"]
        for it in found
    ]
    return tab_separated([list(map(harmless, line)) for line in lines])


def entry(it: Description, said: Documentation | None = None) -> dict[str, Any]:
    """For JSON."""
    meanings = {} if said is None else said.arguments
    options = [
        {"name": option.name, "allowed": option.allowed, "default": option.default}
        | ({"meaning": meanings.get(option.name)} if said is not None else {})
        for option in it.options
    ]
    more = {} if said is None else {"text": said.body, **{name.lower(): text for name, text in said.sections.items()}}
    named = {"name": it.name, "matrix": it.matrix, "summary": it.summary or None}
    return {**named, **more, "options": options, "origin": it.origin, "failure": it.failure}


def detail(it: Description, said: Documentation, color: str) -> None:
    """Print all that is to be known of one."""
    console = styled(color)
    console.print(Text(harmless(it.name), style="bold"))
    console.print(Padding(Text(harmless(it.summary), overflow="fold"), (0, 0, 0, 1)))
    if said.body:
        console.print(Padding(Text(f"\n{harmless(_flowing(said.body))}\n", overflow="fold"), (0, 0, 0, 1)))
    print_remarks(console, remarks(it, said))


def detail_plain(it: Description, said: Documentation) -> str:
    """Tab-separated lines of one."""
    head = [("name", harmless(it.name)), ("summary", harmless(it.summary))]
    body = [("text", harmless(" ".join(said.body.split())))] if said.body else []
    return tab_separated([*head, *body, *remarks(it, said)])


def remarks(it: Description, said: Documentation) -> list[tuple[str, str]]:
    """What stands below the text."""
    known = MATRICES.get(it.matrix or "")
    unsaid = "the class does not say it" if it.failure is None else "not known"
    made = [("matrix", f"{it.matrix}: {known[1]}" if known else it.matrix or unsaid)]
    for option in it.options:
        made.append(("option", f"{option}{_colon(said.arguments.get(option.name, ''))}"))
    made += [(name.lower(), text) for name, text in said.sections.items()]
    made.append(("from", it.origin))
    if it.failure is not None:
        made.append(("failure", it.failure))
    else:
        made.append(("example", _example(it)))
    return [(name, harmless(text)) for name, text in made]


def _summary(it: Description) -> str:
    return it.summary or (UNKNOWN.format(it.name) if it.matrix is None and it.failure is None else "")


def _short(it: Description) -> list[str]:
    return [f"{option.name}{'' if option.default is None else f'={option.default}'}" for option in it.options]


def _colon(text: str) -> str:
    return f": {text}" if text else ""


def _example(it: Description) -> str:
    """A command with each option that has no default, or else the first that is a number."""
    needed = [option for option in it.options if option.default is None]
    numbers = [option for option in it.options if (option.default or "").isdigit()]
    shown = [(o.name, "hutchinson" if "estimator" in o.allowed else "VALUE") for o in needed]
    shown = shown or [(o.name, str(max(int(o.default or 0), 4))) for o in numbers[:1]]
    return " ".join(
        ["curvkit diagonal CHECKPOINT --estimator", it.name, *(f"--set {name}={value}" for name, value in shown)]
    )


def _flowing(body: str) -> str:
    """Paragraphs without the line breaks of the source; what is indented stays as it is."""
    parts = re.split(r"\n[ \t]*\n", body)
    return "\n\n".join(part if part.startswith(" ") else re.sub(r"\n(?! )", " ", part) for part in parts)
