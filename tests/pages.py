"""Runs one Markdown page from top to bottom: `python` blocks in one namespace, `console` blocks in bash.

    python tests/pages.py README.md

A `console` block holds commands (`$ ...`; a line that ends in a backslash goes on after `> `), each followed
by exactly what it prints, on stdout or stderr. `...` stands for anything within a line; a line that is only
`...` stands for any number of lines. A command that fails must be followed by `$ echo $?`, so that the page
shows the exit code. A `python` block that only includes a file of examples/ is left to the test of the
examples. Blocks of other languages are not run. A block is skipped only by `<!-- not run: reason -->` on the
line before.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = ("python", "console")
MISSPELT = {
    "py": "python",
    "python3": "python",
    "pycon": "console",
    "shell": "console",
    "shell-session": "console",
    "sh": "bash",
}
FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)$")
SKIP = re.compile(r"^[ \t]*<!--\s*not run:\s*\S.*-->\s*$")
INCLUDE = re.compile(r'^\s*--8<--\s+"(?P<path>[^"]+)"\s*$')
SECONDS_PER_COMMAND = 180


class PageError(Exception):
    """The page is not what it promises: a block fails, prints something else, or cannot be read."""


@dataclass(frozen=True)
class Block:
    language: str
    line: int  # of its first line of content, counted from 1
    lines: tuple[str, ...]
    skipped: bool


@dataclass(frozen=True)
class Command:
    line: int
    text: str
    expected: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    """Every fenced block of a page, its indentation removed."""
    found: list[Block] = []
    lines = text.splitlines()
    number, skip = 0, False
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            if skip:
                raise PageError(f"line {number}: 'not run' stands before no block")
            skip = bool(SKIP.match(lines[number]))
            if "<!-- not run" in lines[number] and not skip:
                raise PageError(f"line {number + 1}: write <!-- not run: reason -->")
            number += 1
            continue
        language = re.split(r"[\s{}.,]+", opening["info"].strip("{}. "))[0]
        if language in MISSPELT:
            raise PageError(
                f"line {number + 1}: write {MISSPELT[language]} for {language}, so that it is clear what runs"
            )
        if skip and language not in RUN:
            raise PageError(f"line {number + 1}: a {language or 'plain'} block never runs; remove 'not run'")
        start = number = number + 1
        while number < len(lines) and lines[number].strip() != opening["fence"]:
            number += 1
        if number == len(lines):
            raise PageError(f"line {start}: the block is not closed")
        content = tuple(line.removeprefix(opening["indent"]) for line in lines[start:number])
        found.append(Block(language, start + 1, content, skip))
        number, skip = number + 1, False
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a console block, each with the lines that it has to print."""
    found: list[Command] = []
    for offset, line in enumerate(block.lines):
        number, last = block.line + offset, found[-1] if found else None
        if line.startswith("$ "):
            found.append(Command(number, line[2:], ()))
        elif last is None:
            raise PageError(f"line {number}: a console block starts with '$ '")
        elif not last.expected and last.text.endswith("\\") and line.startswith("> "):
            found[-1] = Command(last.line, f"{last.text}\n{line[2:]}", ())
        else:
            found[-1] = Command(last.line, last.text, (*last.expected, line.rstrip()))
    return found


def matches(expected: tuple[str, ...], actual: tuple[str, ...]) -> bool:
    """Whether the printed lines are the expected ones, up to `...` and trailing blanks."""
    reachable = {0}  # how many of the actual lines the expected lines so far can account for
    for line in stripped(expected):
        if line.strip() == "...":
            reachable = set(range(min(reachable), len(stripped(actual)) + 1))
        else:
            pattern = re.compile(".*".join(re.escape(part) for part in line.split("...")))
            lines = stripped(actual)
            reachable = {i + 1 for i in reachable if i < len(lines) and pattern.fullmatch(lines[i])}
        if not reachable:
            return False
    return len(stripped(actual)) in reachable


def stripped(lines: tuple[str, ...]) -> list[str]:
    return "\n".join(line.rstrip() for line in lines).rstrip("\n").split("\n")


def environment() -> dict[str, str]:
    """For the commands: this Python's programs first, no settings of curvkit, 100 columns, no colour."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("CURVKIT_") and k not in ("FORCE_COLOR", "PYTHONPATH")
    }
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return kept | {
        "PATH": programs,
        "COLUMNS": "100",
        "PYTHONUNBUFFERED": "1",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "2",
    }


def run_console(block: Block) -> None:
    """Run the commands of a block and compare what they print."""
    asked = commands(block)
    status = 0
    for i, command in enumerate(asked):
        run = subprocess.run(
            ["bash", "-c", f"(exit {status})\n{command.text}"],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=SECONDS_PER_COMMAND,
            check=False,
        )
        status, printed = run.returncode, tuple(run.stdout.splitlines())
        if not matches(command.expected, printed):
            difference = difflib.ndiff(stripped(command.expected), stripped(printed))
            shown = "\n".join(line for line in difference if not line.startswith("?"))
            raise PageError(f"line {command.line}: $ {command.text}\n(- on the page, + printed)\n{shown}")
        shows_status = i + 1 < len(asked) and asked[i + 1].text == "echo $?"
        if status and not shows_status:
            raise PageError(f"line {command.line}: $ {command.text}\nexit code {status}; follow it with '$ echo $?'")


def run_python(block: Block, page: Path, namespace: dict[str, object]) -> None:
    """Run a python block; a traceback shows the lines of the page."""
    included = [INCLUDE.match(line) for line in block.lines]
    if len(included) == 1 and included[0] is not None:
        path = ROOT / included[0]["path"]
        if path.parent != ROOT / "examples" or not path.is_file():
            raise PageError(f"line {block.line}: {included[0]['path']} is not a file of examples/, so no test runs it")
        return
    source = "\n" * (block.line - 1) + "\n".join(block.lines) + "\n"
    try:
        exec(compile(source, str(page), "exec"), namespace)
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        raise PageError(f"the python block at line {block.line} failed\n{trace}") from error


def run(page: Path) -> None:
    """Run every block of a page, in the current directory."""
    main = types.ModuleType("__main__")
    main.__file__ = str(page)
    sys.modules["__main__"] = main  # classes that the page defines are found where pickle and inspect look for them
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.skipped or block.language not in RUN:
            continue
        if block.language == "console":
            run_console(block)
        else:
            run_python(block, page, vars(main))


if __name__ == "__main__":
    sys.path[0] = ""  # as for a script of the reader's own, not for this one
    os.environ.clear()
    os.environ.update(environment())
    try:
        run(Path(sys.argv[1]).resolve())
    except PageError as fault:
        sys.exit(f"{sys.argv[1]}: {fault}")
