"""curvkit doctor: what is installed, what works, and what mends the rest."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.text import Text

from .. import diagnosis, render
from ..diagnosis import Finding
from ..output import COLOR, FORMAT, JSON, PLAIN
from ..progress import counted, styled

FAILED = 1
STYLES = {"ok": "green", "absent": "dim", "note": "yellow", "broken": "bold red"}
LABEL = 22
"""Columns of the names."""


@click.command()
@FORMAT
@JSON
@PLAIN
@COLOR
def doctor(format: str, color: str) -> int:
    """Check the installation, and say what mends it.

    Versions, threads, device, optional packages, and one product against a closed form. What is broken comes with the command that
    mends it, and with exit code 1. Nothing is changed and nothing is sent anywhere.
    """
    shape = render.chosen_format(format)
    found: list[Finding] = []
    for finding in diagnosis.findings():
        found.append(finding)
        if shape == "table":
            _line(finding, color)
        elif shape == "plain":
            click.echo(render.tab_separated([[finding.name, finding.state, finding.text, finding.remedy]]))
    broken = [finding for finding in found if finding.state == "broken"]
    if shape == "json":
        result = {"healthy": not broken, "findings": [asdict(finding) for finding in found]}
        click.echo(
            json.dumps({"schema": "curvkit.doctor/1", "result": result}, indent=2)
        )  # torch may be what is broken
    elif shape == "table":
        styled(color).print(
            f"{counted(len(broken), 'thing')} broken." if broken else "Nothing is broken.", markup=False
        )
    return FAILED if broken else 0


def _line(finding: Finding, color: str) -> None:
    text = Text.assemble((finding.state, STYLES[finding.state]), "  ", finding.text)
    if finding.remedy:
        text.append(f"\n{finding.remedy}", style="bold")
    render.print_labelled(styled(color), finding.name, text, LABEL)
