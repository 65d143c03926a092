"""Variables that set options: which there are, and which look as if they did."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator

import click

from .failures import harmless, say

PREFIX = "CURVKIT_"
TYPED_ALONE = ("_TRUST", "_ALLOW")
"""How variables end that would open a door if they had an effect, which they have not, and of which nothing is said."""


def variables(option: click.Parameter, prefix: str | None) -> Iterator[str]:
    """The variables that set an option, the first that is there counting; `prefix` is that of its command."""
    named = option.envvar
    yield from (named,) if isinstance(named, str) else named or ()
    if isinstance(option, click.Option) and option.allow_from_autoenv and prefix and option.name:
        yield f"{prefix}_{option.name.upper()}"


def variable(option: click.Parameter, ctx: click.Context) -> str:
    """The variable that did set an option."""
    return next((name for name in variables(option, ctx.auto_envvar_prefix) if os.environ.get(name)), "")


def warn_of_unknown(ctx: click.Context) -> None:
    """Say which variables have no effect, with the nearest that has one; `ctx` is that of the group."""
    group = ctx.command
    commands = group.commands if isinstance(group, click.Group) else {}
    known = {name for option in group.params for name in variables(option, ctx.auto_envvar_prefix)}
    for command, made in commands.items():
        prefix = f"{ctx.auto_envvar_prefix}_{command}".replace("-", "_").upper()
        known |= {name for option in made.params for name in variables(option, prefix)}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and not name.endswith(TYPED_ALONE):
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; the nearest is {close[0]}" if close else ""
            say(f"warning: no option is set by the variable {harmless(name)}, which has no effect{hint}")
