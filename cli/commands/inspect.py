"""curvkit inspect: what lies at a path, without opening it further than its headers."""

from __future__ import annotations

from pathlib import Path

import click

from .. import render, render_inspection
from ..output import COLOR, FORMAT, JSON, PLAIN
from ..paths import Existing
from ..target import EMA, KEY


@click.command()
@click.argument("path", type=Existing())
@KEY
@EMA
@FORMAT
@JSON
@PLAIN
@COLOR
def inspect(path: Path, key: str | None, ema: bool, format: str, color: str) -> int:
    """What lies at PATH, from its headers alone.

    Kind, parts with tensors, optimizer, what it refers to; answered at once, whatever the size. Nothing in the file is run and nothing
    that it names is imported, also of kinds that are refused when they are measured; then it says why, and what to do instead.
    """
    from curvkit.checkpoints.inspection import inspect as look

    found = look(path, key=key, ema=ema)
    shape = render.chosen_format(format)
    if shape == "json":
        click.echo(render_inspection.document(found))
    elif shape == "plain":
        click.echo(render_inspection.plain(found))
    else:
        render_inspection.table(found, color)
    return 0
