"""Find and call the function that makes an objective: `train.py:objective` or `package.module:objective`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from curvkit.errors import UnknownObjective
from curvkit.objectives import Objective, is_objective


class FactoryFailed(Exception):
    """The user's own code raised; `__cause__` is its exception, whose traceback is what helps."""


def load_factory(reference: str) -> Callable[..., Any]:
    """Import the function that a reference names.

    Args:
        reference: "path/to/file.py:function", or "package.module:function" importable from the current directory.

    Returns:
        The function.

    Raises:
        UnknownObjective: If the form is wrong, or file, module or function is not there.
        FactoryFailed: If importing it raised.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UnknownObjective(
            f"--objective {reference!r}: expected FILE.py:FUNCTION or MODULE:FUNCTION, for example train.py:objective."
        )
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        marked = [key for key, value in vars(module).items() if is_objective(value)]
        hint = f"; marked with @curvkit.objective: {', '.join(marked)}" if marked else ""
        raise UnknownObjective(
            f"--objective {reference!r}: {place} has no function {name!r}{hint}. "
            "Write one that returns curvkit.Objective(model, loss, data)."
        )
    return found


def call_factory(factory: Callable[..., Any], settings: Mapping[str, str]) -> Objective:
    """Call an objective factory with the values of `--set`, converted by its annotations.

    Args:
        factory: The function.
        settings: Keyword -> text.

    Returns:
        What it made.

    Raises:
        UnknownObjective: If a keyword is unknown, a value does not convert, or the result is no `Objective`.
        FactoryFailed: If the function raised.
    """
    keywords = _converted(factory, settings)
    try:
        made = factory(**keywords)
    except Exception as error:
        raise FactoryFailed(getattr(factory, "__name__", "factory")) from error
    if not isinstance(made, Objective):
        raise UnknownObjective(
            f"--objective: {getattr(factory, '__name__', factory)} returned a {type(made).__name__}. "
            "It must return curvkit.Objective(model, loss, data)."
        )
    return made


def _converted(factory: Callable[..., Any], settings: Mapping[str, str]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    try:
        hints = typing.get_type_hints(factory)
    except (NameError, TypeError, AttributeError):
        hints = {}
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in parameters and not takes_all:
            raise UnknownObjective(
                f"--set {key}={text}: the factory takes {', '.join(parameters) or 'no arguments'}. Correct the name."
            )
        default = parameters[key].default if key in parameters else inspect.Parameter.empty
        kind = hints.get(key) or (type(default) if default not in (inspect.Parameter.empty, None) else str)
        values[key] = _value(key, text, kind)
    missing = [
        key
        for key, p in parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and key not in values
    ]
    if missing:
        raise UnknownObjective(f"--objective: the factory needs {', '.join(missing)}. Add --set {missing[0]}=VALUE.")
    return values


def _value(key: str, text: str, kind: Any) -> Any:
    kinds = [k for k in (typing.get_args(kind) or (kind,)) if k is not type(None)]
    for candidate in kinds:
        if candidate is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        if candidate in (int, float, str):
            with contextlib.suppress(ValueError):
                return candidate(text)
    shown = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise UnknownObjective(
        f"--set {key}={text}: not a value of type {shown}. Types are those of the factory's annotations: bool, int, float, str."
    )


def _import_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise UnknownObjective(
            f"--objective {str(path)!r}: there is no such file. Paths are taken from the current directory, {_here()}."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UnknownObjective(f"--objective {str(path)!r}: Python cannot import it. Pass a .py file.")
    module = importlib.util.module_from_spec(spec)
    with _importable(path.resolve().parent):
        before = sys.modules.get(path.stem)
        sys.modules[path.stem] = module  # dataclasses and pickle look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            if before is None:
                sys.modules.pop(path.stem, None)
            else:
                sys.modules[path.stem] = before
            raise FactoryFailed(str(path)) from error
    return module


def _import_module(name: str) -> types.ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise UnknownObjective(
                    f"--objective: no module {name!r} from {_here()}. Name the file instead, for example path/to/train.py:objective."
                ) from error
            raise FactoryFailed(name) from error
        except Exception as error:
            raise FactoryFailed(name) from error


@contextlib.contextmanager
def _importable(directory: Path) -> Generator[None]:
    """Let a script import its neighbours, as `python script.py` would, for the time of this import."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(directory))


def _here() -> str:
    return os.path.basename(os.getcwd()) or "/"
