"""Options that were typed and would have no effect: refused, or noted where nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from .failures import say

if TYPE_CHECKING:
    from curvkit.resolving.config import Config

OF_TEXTS = {"seq_len": "--seq-len", "tokens": "--tokens", "split": "--split"}
"""Options that say how a text is cut."""


def refuse_idle(ctx: click.Context) -> None:
    """Look through what was typed, once all of it is known; what a configuration or the environment sets is no matter of one command."""
    idle = [flag for name, flag in OF_TEXTS.items() if _typed(ctx, name) and ctx.params.get(name) is not None]
    if idle and not _text_is_measured(ctx):
        one = len(idle) == 1
        function = _function(ctx)
        why = f"the objective {function} brings its own data" if function else "no text is named"
        raise click.UsageError(
            f"{' and '.join(idle)} {'says' if one else 'say'} how a text is cut, but {why}. "
            f"{'Leave' if function else 'Pass --data PATH or --demo-data, or leave'} {'it' if one else 'them'} out."
        )
    if (
        _typed(ctx, "fresh")
        and ctx.params.get("fresh")
        and ctx.params.get("out") is None
        and not ctx.params.get("quiet")
    ):
        say("note: --fresh has no effect without -o DIR")


def _text_is_measured(ctx: click.Context) -> bool:
    """As `measuring` decides: a text that is typed wins over any function but a typed one, which then is refused beside it."""
    given = [name for name in ("data", "demo_data") if ctx.params.get(name)]
    return any(_typed(ctx, name) for name in given) or bool(given and _function(ctx) is None)


def _function(ctx: click.Context) -> str | None:
    """The function that brings the data, typed or configured."""
    config: Config | None = ctx.params.get("config")
    return ctx.params.get("objective") or (config.objective if config is not None else None)


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
