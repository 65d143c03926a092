"""What can be typed behind an option: sizes, times, assignments, names of classes."""

from __future__ import annotations

import re
from typing import Any

import click


class Bytes(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """A number of bytes: 4GiB, 500MB, 1e9."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read text like 4GiB."""
        units = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)", str(value).strip().lower())
        if match and match[2].removesuffix("ytes") in units:
            try:
                size = int(float(match[1]) * units[match[2]])
            except (ValueError, KeyError, OverflowError):
                size = 0
            if size > 0:
                return size
        self.fail(f"{value!r} is not a size. Write for example 4GiB or 500MB.", param, ctx)


class Seconds(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """A time: 90, 90s, 2m, 1.5h."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read text like 2m."""
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([smh]?)", str(value).strip().lower())
        if match and float(match[1]) > 0:
            return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
        self.fail(f"{value!r} is not a time. Write for example 90s, 2m or 1h.", param, ctx)


class Assignment(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """KEY=VALUE; a key may have parts, inner.num_probes."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Divide at the first equals sign."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not all(part.isidentifier() for part in key.split(".")):
            self.fail(f"{value!r} is not of the form KEY=VALUE, for example hidden=128.", param, ctx)
        return key, text


class ClassName(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  generic only in new versions
    """The full name of a class: package.module.Class."""

    name = "class"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the form; nothing is imported here."""
        parts = str(value).split(".")
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            self.fail(f"{value!r} is not the full name of a class. Write for example train.Config.", param, ctx)
        return str(value)
