"""Commands whose options have defaults in the user's configuration, and whose help lists options under headings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from curvkit.errors import CurvkitError, InvalidArgument

from .environment import variable
from .failures import as_typed
from .groups import Option, option
from .idle import refuse_idle

if TYPE_CHECKING:
    from curvkit.resolving.config import Config

FOUND = "curvkit.config"
"""Where a context keeps the configuration that was found for it."""
ELSEWHERE = {
    "checkpoint": "the checkpoint is typed",
    "objective": "it stands at the top of the file: objective = ...",
    "set": "it has a table of its own: [set]",
    "config": "the configuration is this file",
    "no_config": "it is typed",
}
"""Parameters that [defaults] does not set, and why."""


class ConfiguredCommand(click.Command):
    """A command that looks for the configuration of its checkpoint before it reads its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read what was typed, with the defaults of the configuration."""
        typed, _, _ = self.make_parser(ctx).parse_args(list(args))
        asking = self.get_help_option(ctx)
        if not ctx.resilient_parsing and not (asking and typed.get(asking.name or "")):
            ctx.meta[FOUND] = found = self._config(ctx, typed)
            if found is not None:
                ctx.default_map = _defaults(ctx, found)
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            traced = _traced(ctx, error)
            if traced is error:
                raise
            raise traced from error
        if not ctx.resilient_parsing:
            refuse_idle(ctx)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what is refused is said in its own words, and where an option was set that was not typed."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            origins = _origins(ctx, error.message)
            if not origins:
                raise
            raise click.UsageError(error.message + origins, ctx) from error
        except CurvkitError as error:
            text = as_typed(error).replace("curvkit sharpness ", f"curvkit {ctx.info_name} ")
            text += _origins(ctx, text)
            if text != str(error):
                error.args = (text,)
                if isinstance(error, ImportError):
                    error.msg = text
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List options under the headings of their groups, the others last."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if line is not None:
                heading = parameter.heading if isinstance(parameter, Option) else ""
                headings.setdefault(heading or "Other", []).append(line)
        headings["Other"] = headings.pop("Other", [])
        for heading, lines in headings.items():
            with formatter.section(heading):
                formatter.write_dl(lines)

    def _config(self, ctx: click.Context, typed: Mapping[str, Any]) -> Config | None:
        """The configuration, found by the checkpoint, --config, --no-config and --trust of what was typed."""
        from curvkit.resolving.config import find_config

        values = {
            parameter.name: parameter.consume_value(ctx, typed)[0]
            for parameter in self.params
            if parameter.name in ("checkpoint", "config", "no_config", "trust")
        }
        checkpoint, explicit = values["checkpoint"], values["config"]
        if values["no_config"] is True:
            if isinstance(explicit, str):
                raise click.UsageError("--no-config and --config contradict each other: leave out one of them.")
            return None
        if not isinstance(checkpoint, str) or not os.path.exists(checkpoint):
            return None  # click says so
        named = Path(explicit) if isinstance(explicit, str) else None
        return find_config(Path(checkpoint), named, Path.cwd(), trusted=values["trust"] is True)


def found(ctx: click.Context, parameter: click.Parameter, value: Any) -> Config | None:
    """What the command gets for --config: the configuration that holds, named or found."""
    return ctx.meta.get(FOUND)


CONFIG = option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    callback=found,
    help="Configuration.  [default: nearest curvkit.toml or [tool.curvkit] in pyproject.toml]",
)
NO_CONFIG = option("--no-config", is_flag=True, help="Use no configuration.")


def _traced(ctx: click.Context, error: click.BadParameter) -> click.BadParameter:
    """The same error of a value that was not typed, with the place that has it."""
    found, option = ctx.meta.get(FOUND), error.param
    source = ctx.get_parameter_source(option.name or "") if option is not None else None
    if option is not None and source is ParameterSource.ENVIRONMENT:
        return click.BadParameter(error.message, ctx, option, f"the variable {variable(option, ctx)}")
    if found is not None and source is ParameterSource.DEFAULT_MAP:
        return click.BadParameter(f"{error.message} It is set in {found.path}.", ctx, option)
    return error


def _origins(ctx: click.Context, text: str) -> str:
    """Sentences for the options in a text that were not typed: where they are set."""
    found, made = ctx.meta.get(FOUND), ""
    for given in ctx.command.params:
        flags = [
            name for name in given.opts if name.startswith("--") and re.search(rf"(?<![\w-]){name}(?![\w-])", text)
        ]
        if not flags:
            continue
        flag, source = flags[0], ctx.get_parameter_source(given.name or "")
        if source is ParameterSource.ENVIRONMENT:
            made += f" {flag} is set by the variable {variable(given, ctx)}."
        elif source is ParameterSource.DEFAULT_MAP and found is not None:
            made += f" {flag} is set in {found.path}."
    return made


def _defaults(ctx: click.Context, config: Config) -> dict[str, Any]:
    """Values by parameter of this command; every name in the file is checked, also those for other commands."""
    group = ctx.parent.command if ctx.parent else None
    commands = {
        name: _options(command)
        for name, command in (group.commands if isinstance(group, click.Group) else {}).items()
        if isinstance(command, ConfiguredCommand)
    }
    anywhere = {key: option for options in commands.values() for key, option in options.items()}
    for key, value in config.defaults.items():
        if isinstance(value, Mapping):
            if key not in commands:
                raise _unknown(config, f"[defaults.{key}]", key, commands)
            for name in value:
                if name not in commands[key]:
                    raise _unknown(config, f"[defaults.{key}] {name}", name, commands[key])
        elif key not in anywhere:
            raise _unknown(config, f"[defaults] {key}", key, anywhere)
    own = _options(ctx.command)
    values = config.for_command(ctx.command.name or "")
    return {own[key].name or "": _value(config, own[key], value) for key, value in values.items() if key in own}


def _options(command: click.Command) -> dict[str, click.Option]:
    """What [defaults] may set for a command, by every name that the option has."""
    options = [p for p in command.params if isinstance(p, click.Option) and p.name not in ELSEWHERE]
    return {
        name.lstrip("-").replace("-", "_"): option
        for option in options
        if option.allow_from_autoenv and not (option.is_flag and option.name == "format")
        for name in option.opts
    }


def _unknown(config: Config, where: str, name: str, known: Mapping[str, Any]) -> InvalidArgument:
    if name in ELSEWHERE:
        return InvalidArgument(f"{config.path}: {where}: {name} has no default: {ELSEWHERE[name]}.")
    close = difflib.get_close_matches(name, list(known), 1)
    hint = f", nearest: {close[0]!r}" if close else ""
    there = "commands" if where.startswith("[defaults.") and where.endswith("]") else "options"
    return InvalidArgument(
        f"{config.path}: {where}: not known{hint}. `curvkit {'' if there == 'commands' else 'COMMAND '}--help` lists the {there}."
    )


def _value(config: Config, option: click.Option, value: Any) -> Any:
    """A value as it would be typed, which click then checks; paths are relative to the file."""
    if isinstance(value, list):
        if not option.multiple:
            raise InvalidArgument(f"{config.path}: {option.opts[0]} takes one value, not a list.")
        return [str(item) for item in value]
    if isinstance(value, bool):
        return value if option.is_flag else str(value).lower()
    if isinstance(option.type, click.Path) and isinstance(value, str):
        return os.path.relpath(config.directory / value)
    return [str(value)] if option.multiple else str(value)
