"""Options that reach a command together, as one frozen object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Option(click.Option):
    """An option that knows under which heading the help lists it."""

    def __init__(self, *arguments: Any, heading: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.heading = heading


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Declare an option that `grouped` puts under a heading."""
    return click.option(*names, cls=Option, **settings)


def grouped(kind: type[Any], heading: str, *options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Add options to a command and hand their values over as one object, named like its class in lower case."""
    names = [field.name for field in fields(kind)]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def bundled(**values: Any) -> Any:
            own = {name: values.pop(name) for name in names}
            return command(**values, **{kind.__name__.lower(): kind(**own)})

        decorated: Any = bundled
        for add in reversed(options):
            decorated = add(decorated)
            added = decorated.__click_params__[-1]
            if isinstance(added, Option):
                added.heading = added.heading or heading
        return decorated

    return decorate
