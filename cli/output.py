"""How a result is shown, and where it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from .groups import Command, grouped, option


@dataclass(frozen=True)
class Output:
    """How it is shown."""

    format: str
    out: Path | None
    fresh: bool
    strict: bool
    quiet: bool
    color: str


@dataclass(frozen=True)
class Lasting(Output):
    """Of a run that may take long: it can be cut short and gone on with."""

    resume: bool


FORMAT = option(
    "--format",
    type=click.Choice(["auto", "table", "plain", "json"]),
    default="auto",
    show_default=True,
    help="auto: a table on a terminal, tab-separated lines elsewhere.",
)
JSON = option("--json", "format", flag_value="json", help="Same as --format json: one document.")
PLAIN = option("--plain", "format", flag_value="plain", help="Same as --format plain.")
COLOR = option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True)


OPTIONS = (
    FORMAT,
    JSON,
    PLAIN,
    option(
        "-o",
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="Also write the JSON document into DIR.",
    ),
    option("--fresh", is_flag=True, help="With -o: replace an earlier result."),
    option("--strict", is_flag=True, help="Exit with 5 if not converged."),
    option("-q", "--quiet", is_flag=True, help="No progress and notes on stderr."),
    COLOR,
)
RESUME = option(
    "--resume",
    is_flag=True,
    help="With -o: go on with the run that was cut short there; if it is complete, show it again; if there is none, begin.",
)


def output(command: Command) -> Command:
    """Format and files."""
    return grouped(Output, "Output", *OPTIONS)(command)


def lasting(command: Command) -> Command:
    """Format and files of a run that can be resumed."""
    return grouped(Lasting, "Output", *OPTIONS[:4], RESUME, *OPTIONS[4:])(command)
