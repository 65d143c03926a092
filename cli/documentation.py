"""What the documentation of a class says, part by part."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

SECTION = re.compile(r"(Args|Accuracy|Cost|Source|Example|Raises|Returns|Attributes|Note|References):\s*(.*)")
ARGUMENT = re.compile(r"    (\w+)(?: \([^)]*\))?:\s*(.*)")


@dataclass(frozen=True)
class Documentation:
    """The parts of a text in Google's sections."""

    summary: str = ""
    body: str = ""
    """Paragraphs and equations as they stand."""
    sections: dict[str, str] = field(default_factory=dict)
    """Accuracy, Cost, Source, ...: each one line."""
    arguments: dict[str, str] = field(default_factory=dict)


def documentation(kind: type) -> Documentation:
    """Divide the text of a class; what dataclasses write where there is none is none."""
    text = inspect.getdoc(kind) or ""
    if not text or text.startswith(f"{kind.__name__}("):
        return Documentation()
    summary, _, rest = text.partition("\n")
    body: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = body
    for line in rest.splitlines():
        begun = SECTION.fullmatch(line)
        if begun is not None:
            lines = sections[begun[1]] = [begun[2]]
        elif line and not line.startswith(" "):
            if lines is not body:
                lines = body
            lines.append(line)
        else:
            lines.append(line)
    joined = {
        name: " ".join(" ".join(part).split()) for name, part in sections.items() if name not in ("Args", "Example")
    }
    return Documentation(summary, "\n".join(body).strip("\n"), joined, _arguments(sections.get("Args", [])))


def _arguments(lines: list[str]) -> dict[str, str]:
    """Name -> what is said of it."""
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        begun = ARGUMENT.fullmatch(line)
        if begun is not None:
            name = begun[1]
            found[name] = begun[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found
