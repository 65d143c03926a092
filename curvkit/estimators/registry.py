"""Estimators by name, for what is typed: our own, and those that installed packages offer."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.estimators.names.options import Option, made, options
from curvkit.estimators.names.plugins import Plugin, loaded, plugins
from curvkit.estimators.protocol import DiagonalEstimator

HOME = "curvkit.estimators"
BUILT_IN = {
    "backpack": "backpack_diagonal:BackPACK",
    "controlled": "controlled_estimate:Controlled",
    "deflated": "deflated_diagonal:Deflated",
    "empirical-fisher": "empirical_fisher:EmpiricalFisher",
    "exact": "exact_diagonal:Exact",
    "example-hutchinson": "example_hutchinson:ExampleHutchinson",
    "fisher": "fisher:Fisher",
    "hutchinson": "hutchinson:Hutchinson",
    "lanczos": "lanczos_diagonal:Lanczos",
    "optimizer-state": "optimizer_state_diagonal:OptimizerState",
    "squared-gradient": "squared_gradient:SquaredGradient",
    "xdiag": "xdiag_diagonal:XDiag",
}
"""Module and class of our own, imported when they are asked for."""
EXTRAS = {"backpack": "backpack"}
"""Our own that need an optional package -> what is imported; the extra bears the same name."""


@dataclass(frozen=True)
class Description:
    """What an estimator is.

    Args:
        name: For the command line.
        matrix: What it estimates: "hessian", "hessian or ggn"; None where the class does not say it, or was not imported.
        summary: The first line of its documentation; empty where it was not imported.
        options: In order.
        origin: Distribution and version, or "curvkit".
        failure: Why it cannot be used; None: nothing is known against it.
    """

    name: str
    matrix: str | None
    summary: str
    options: tuple[Option, ...]
    origin: str
    failure: str | None


class _Classes(Mapping[str, type[Any]]):
    """Classes by name, imported when they are asked for; listed are our own."""

    def __getitem__(self, name: str) -> type[Any]:
        return estimator_class(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(BUILT_IN))

    def __len__(self) -> int:
        return len(BUILT_IN)


def names() -> tuple[str, ...]:
    """List what `build` takes.

    Returns:
        Our own in alphabetical order, then those of other packages that nothing is known against.

    Cost: one small file is read for each installed distribution; nothing of other packages is imported.

    Example:
        >>> "hutchinson" in names()
        True
    """
    return (*sorted(BUILT_IN), *(plugin.name for plugin in plugins(BUILT_IN) if plugin.failure is None))


def estimator_class(name: str) -> type[Any]:
    """Find an estimator's class by its name.

    Args:
        name: One of `names`.

    Returns:
        A frozen dataclass of options with a method `estimate`.

    Raises:
        InvalidArgument: If there is no such estimator.
        CurvkitError: If it is of another package, and cannot be imported or is no estimator.

    Example:
        >>> estimator_class("fisher").__name__
        'Fisher'
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(f"{HOME}.{module}"), attribute)
    return loaded(_plugin(name))


def build(name: str, options: Mapping[str, str]) -> DiagonalEstimator:
    """Make an estimator from what was typed.

    Args:
        name: One of `names`.
        options: Texts by option, read by the annotations of the class; `inner=hutchinson` names a nested estimator,
            `inner.num_probes=4` is an option of that.

    Returns:
        The estimator.

    Raises:
        InvalidArgument: If there is no such estimator or option, one lacks, or a value is not allowed.
        CurvkitError: If it is of another package, and cannot be imported or is no estimator.

    Example:
        >>> build("fisher", {"num_samples": "4"})
        Fisher(num_samples=4)
    """
    return made(name, estimator_class(name), options, _Classes())


def describe(name: str) -> Description:
    """Describe one estimator; one of another package is imported.

    Args:
        name: One of `names`.

    Returns:
        What it is; `failure` says why it cannot be used.

    Raises:
        InvalidArgument: If there is no such estimator.

    Example:
        >>> describe("fisher").options[0].name
        'num_samples'
    """
    if name in BUILT_IN:
        return _described(name, estimator_class(name), "curvkit", _lacking(name))
    return _imported(_plugin(name))


def described(*, load: bool = False) -> tuple[Description, ...]:
    """Describe all estimators.

    Args:
        load: Whether those of other packages are imported, which runs their code. Otherwise they have a name and an origin, and a failure
            where one shows without that.

    Returns:
        Our own by name, then those of other packages; what cannot be used has the reason and hides no other.

    Cost: our own are imported.

    Example:
        >>> [found.matrix for found in described() if found.name == "hutchinson"]
        ['hessian']
    """
    own = [describe(name) for name in sorted(BUILT_IN)]
    others = (
        _imported(plugin) if load else Description(plugin.name, None, "", (), plugin.origin, plugin.failure)
        for plugin in plugins(BUILT_IN)
    )
    return (*own, *others)


def _plugin(name: str) -> Plugin:
    """The entry point of that name; refused is a name that nobody has."""
    others = plugins(BUILT_IN)
    for plugin in others:
        if plugin.name == name:
            return plugin
    known = (*sorted(BUILT_IN), *(plugin.name for plugin in others))
    close = difflib.get_close_matches(name.lower().replace("_", "-"), known)
    near = f"The nearest is {' or '.join(map(repr, close))}. " if close else ""
    raise InvalidArgument(f"there is no estimator {name!r}. {near}Known are {', '.join(known)}.")


def _imported(plugin: Plugin) -> Description:
    if plugin.failure is None:
        try:
            return _described(plugin.name, loaded(plugin), plugin.origin, None)
        except CurvkitError as error:
            return Description(plugin.name, None, "", (), plugin.origin, str(error))
    return Description(plugin.name, None, "", (), plugin.origin, plugin.failure)


def _described(name: str, kind: type[Any], origin: str, failure: str | None) -> Description:
    taken, written = options(kind), inspect.getdoc(kind) or ""
    generated = written.startswith(f"{kind.__name__}(")  # by dataclasses, where there is no text
    summary = "" if generated else next(iter(written.splitlines()), "")
    return Description(name, _matrix(kind), summary, taken, origin, failure)


def _matrix(kind: type[Any]) -> str | None:
    """What a class says that it estimates; where that depends on an option, all that it can be."""
    found = getattr(kind, "matrix", None)
    hints = typing.get_type_hints(kind)
    closed = [(f.name, hints[f.name]) for f in dataclasses.fields(kind) if typing.get_origin(hints[f.name]) is Literal]
    if not closed or (isinstance(found, str) and "matrix" not in dict(closed)):
        return found if isinstance(found, str) else None
    said: dict[str, None] = {}
    for name, hint in closed:
        for value in typing.get_args(hint):
            with contextlib.suppress(TypeError, ValueError):  # it may not stand alone
                said[kind(**{name: value}).matrix] = None
    return " or ".join(map(str, said)) or None


def _lacking(name: str) -> str | None:
    """The optional package that one of our own needs and that is not there."""
    if name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
        return f"it needs {EXTRAS[name]}, which is not installed. Type: pip install 'curvkit[{name}]'"
    return None
