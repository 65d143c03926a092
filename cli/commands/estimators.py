"""curvkit estimators: what `curvkit diagonal --estimator` takes."""

from __future__ import annotations

import json
from typing import Any

import click

from .. import render, render_estimators
from ..documentation import Documentation, documentation
from ..output import COLOR, FORMAT, JSON, PLAIN


@click.command()
@click.argument("name", required=False)
@FORMAT
@JSON
@PLAIN
@COLOR
def estimators(name: str | None, format: str, color: str) -> int:
    """Estimators of a diagonal, or all that is to be known of NAME.

    Which matrix each belongs to, what it is, its options with their defaults, and where it comes from: curvkit, or an installed package
    that offers estimators (entry points of the group `curvkit.estimators`). Those of other packages are imported when they are named.
    """
    from curvkit.estimators import registry

    shape = render.chosen_format(format)
    if name is None:
        found = registry.described()
        if shape == "json":
            click.echo(_document([render_estimators.entry(it) for it in found]))
        elif shape == "plain":
            click.echo(render_estimators.plain(found))
        else:
            render_estimators.table(found, color)
        return 0
    it = registry.describe(name)
    said = Documentation() if it.matrix is None and it.failure else documentation(registry.estimator_class(name))
    if shape == "json":
        click.echo(_document(render_estimators.entry(it, said)))
    elif shape == "plain":
        click.echo(render_estimators.detail_plain(it, said))
    else:
        render_estimators.detail(it, said, color)
    return 0


def _document(result: Any) -> str:
    """ASCII, so that no text of a package reaches a terminal as it is."""
    return json.dumps({"schema": "curvkit.estimators/1", "result": result}, indent=2, allow_nan=False)
