"""Estimators of other packages, found by the entry points of the group `curvkit.estimators`; listed without importing any of them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint
from typing import Any, NoReturn

from curvkit.checkpoints.printable import printable
from curvkit.errors import CurvkitError

GROUP = "curvkit.estimators"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
"""Words of small letters and digits with a hyphen between them, as the names of our own."""


@dataclass(frozen=True)
class Plugin:
    """An entry point as the distribution's metadata has it.

    Args:
        name: Of the estimator.
        origin: Distribution and version.
        failure: Why it cannot be used, as far as that shows without importing it; None: nothing is known against it.
        point: Where the class lies; None where the metadata cannot be read.
    """

    name: str
    origin: str
    failure: str | None = None
    point: EntryPoint | None = None


def plugins(own: Collection[str]) -> tuple[Plugin, ...]:
    """List the entry points of all installed distributions.

    Args:
        own: Names that are taken by curvkit.

    Returns:
        One for each, by name; refused are those that bear a name of ours, one that two distributions claim, or one that cannot be typed.

    Cost: one small file is read for each installed distribution; nothing is imported.
    """
    found = sorted(_installed(), key=lambda plugin: (plugin.name, plugin.origin))
    claims: dict[str, list[str]] = {}
    for plugin in found:
        claims.setdefault(plugin.name, []).append(plugin.origin)
    return tuple(
        dataclasses.replace(plugin, failure=plugin.failure or _against(plugin, own, claims[plugin.name]))
        for plugin in found
    )


def loaded(plugin: Plugin) -> type[Any]:
    """Import the class of an entry point.

    Args:
        plugin: Nothing is known against it.

    Returns:
        A frozen dataclass with a method `estimate`.

    Raises:
        CurvkitError: If it cannot be imported, or is something else.
    """
    if plugin.failure is not None or plugin.point is None:
        _refuse(plugin, plugin.failure or "it has no entry point", "Ask its authors, or uninstall it")
    try:
        found = plugin.point.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module does when it is imported
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise CurvkitError(
            f"the estimator {plugin.name!r} of {plugin.origin} cannot be imported ({reason}). Reinstall or upgrade that package, or use "
            "one of curvkit's own."
        ) from error
    what = printable(plugin.point.value)
    if not isinstance(found, type):
        _refuse(plugin, f"{what} is no class", "It must be a frozen dataclass")
    if not dataclasses.is_dataclass(found) or not found.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
        _refuse(plugin, f"{what} is no frozen dataclass", "Its authors write @dataclass(frozen=True) above the class")
    if not _has_estimate(found):
        _refuse(plugin, f"{what} has no method estimate(objective, *, seed=None)", "Its authors add one")
    return found


def _installed() -> Iterator[Plugin]:
    """Entry points of the distributions on the path, the first of each name; a damaged one does not hide the others."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            origin, key = _origin(distribution)
        except Exception:  # its texts cannot be read, so that nothing is known of it
            continue
        if key in seen:
            continue
        seen.add(key)
        try:
            points = distribution.entry_points.select(group=GROUP)
        except Exception as error:  # how the text is damaged decides what the parser raises
            yield Plugin(key, origin, f"its entry points cannot be read ({type(error).__name__})")
            continue
        for point in points:
            yield Plugin(printable(point.name), origin, None, point)


def _origin(distribution: Distribution) -> tuple[str, str]:
    """Name and version to show, and the name that distributions are told apart by."""
    name = printable(str(distribution.metadata["Name"] or "an unnamed package"))
    return f"{name} {printable(str(distribution.version))}", re.sub(r"[-_.]+", "-", name).lower()


def _against(plugin: Plugin, own: Collection[str], claims: list[str]) -> str | None:
    if plugin.name in own:
        return "it bears the name of one of curvkit's own"
    if len(claims) > 1:
        return f"the name is claimed by {' and '.join(claims)}"
    if not NAME.fullmatch(plugin.name):
        return "its name is not of small letters, digits and single hyphens"
    return None


def _has_estimate(found: type[Any]) -> bool:
    try:
        parameters = inspect.signature(found.estimate).parameters
    except (AttributeError, TypeError, ValueError):
        return False
    return "seed" in parameters and len(parameters) >= 3  # self, the objective, the seed


def _refuse(plugin: Plugin, reason: str, remedy: str) -> NoReturn:
    raise CurvkitError(f"the estimator {plugin.name!r} of {plugin.origin} is refused: {reason}. {remedy}.")
