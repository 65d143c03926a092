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

from curvkit.errors import InvalidArgument, UnknownObjective
from curvkit.objectives import Objective, is_objective


class FactoryFailed(Exception):
    """The user's own code raised; `__cause__` is its exception, whose traceback is what helps. The text says when."""


@contextlib.contextmanager
def neighbours(reference: str, base: Path | None = None) -> Generator[None]:
    """Let the user's code import what lies beside it, as `python train.py` would, while it is imported and called.

    Args:
        reference: As of `load_factory`.
        base: Likewise.
    """
    directory = str(_directory(reference, base))
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)


def forget_namesakes(reference: str, base: Path | None = None) -> None:
    """Forget modules of other directories that have the name of a module beside the user's code, so that it gets its own.

    Two scripts may each have their own `net.py`; the second one, in the same process, would otherwise be given the first one's. What
    the first one made keeps its references. What stays: compiled modules, and what is installed.

    Args:
        reference: As of `load_factory`.
        base: Likewise.
    """
    directory = _directory(reference, base)
    for name in list(sys.modules):
        path, beside = _source(sys.modules[name]), directory.joinpath(*name.split("."))
        if path is None or path.is_relative_to(directory) or _is_installed(name, path):
            continue
        if any(place.is_file() for place in _files(beside)) or (path.is_dir() and beside.is_dir()):
            del sys.modules[name]


def load_factory(
    reference: str, base: Path | None = None, *, said: str = "--objective", source: bytes | None = None
) -> Callable[..., Any]:
    """Import the function that a reference names.

    Args:
        reference: "path/to/file.py:function", or "package.module:function" importable from the base.
        base: A directory; None is the current one.
        said: Where the reference stands, for messages.
        source: The content of the file, if it was read already; the file is then not opened again, nor what was compiled of it before.

    Returns:
        The function.

    Raises:
        InvalidArgument: If the form is wrong, or file, module or function is not there.
        FactoryFailed: If importing it raised.
    """
    place, colon, name = reference.rpartition(":")
    well_formed = place.endswith(".py") or all(part.isidentifier() for part in place.split("."))
    if not colon or not well_formed or not name.isidentifier():
        raise InvalidArgument(
            f"{said} {reference!r}: expected FILE.py:FUNCTION or MODULE:FUNCTION, for example train.py:objective."
        )
    with neighbours(reference, base):
        file = Path(place) if place.endswith(".py") else None
        module = _import_file(file, base, said, source) if file is not None else _import_module(place, base, said)
    found = getattr(module, name, None)
    if not callable(found):
        marked = [key for key, value in vars(module).items() if is_objective(value)]
        hint = f"; marked with @curvkit.objective: {', '.join(marked)}" if marked else ""
        raise InvalidArgument(
            f"{said} {reference!r}: {place} has no function {name!r}{hint}. "
            "Write one that returns curvkit.Objective(model, loss, data)."
        )
    return found


def call_factory(
    factory: Callable[..., Any], settings: Mapping[str, str], given: Mapping[str, Any] | None = None
) -> Objective:
    """Call an objective factory with the values of `--set`, converted by its annotations.

    Args:
        factory: The function.
        settings: Keyword -> text.
        given: Keyword -> value of a recipe; `settings` win.

    Returns:
        What it made.

    Raises:
        InvalidArgument: If a keyword is unknown or missing, or a value does not convert.
        UnknownObjective: If the result is no `Objective`.
        FactoryFailed: If the function raised.
    """
    name = getattr(factory, "__name__", str(factory))
    keywords = _converted(factory, settings, given or {})
    try:
        made = factory(**keywords)
    except (Exception, SystemExit) as error:
        raise FactoryFailed(f"{name}() made the objective") from error
    if not isinstance(made, Objective):
        raise UnknownObjective(
            f"--objective: {name}() returned a {type(made).__name__}. It must return curvkit.Objective(model, loss, data)."
        )
    return made


def _converted(factory: Callable[..., Any], settings: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except (ValueError, TypeError):  # some builtins do not tell
        parameters = {}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    try:
        hints = typing.get_type_hints(factory)
    except Exception:  # annotations may be any expression
        hints = {}
    strange = [key for key in given if key not in named and not takes_all]
    if strange:
        raise UnknownObjective(
            f"The recipe in the checkpoint gives {strange[0]}={given[strange[0]]!r}, but the function takes "
            f"{', '.join(named) or 'nothing'}. It has changed; name it with --objective, its arguments with --set."
        )
    values = dict(given)
    for key, text in settings.items():
        if key not in named and not takes_all:
            raise InvalidArgument(
                f"--set {key}={text}: the function takes {', '.join(named) or 'no arguments'}. Correct the name."
            )
        default = named[key].default if key in named else inspect.Parameter.empty
        kind = hints.get(key) or (type(default) if default not in (inspect.Parameter.empty, None) else str)
        values[key] = _value(key, text, kind)
    missing = [key for key, p in named.items() if p.default is inspect.Parameter.empty and key not in values]
    if missing:
        raise InvalidArgument(f"--objective: the function needs {', '.join(missing)}. Add --set {missing[0]}=VALUE.")
    return values


def _value(key: str, text: str, kind: Any) -> Any:
    """Convert the text of `--set` to bool, int, float, str, one of a Literal's values, or None where that is allowed."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for candidate in kinds:
        if candidate is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        if candidate is type(None) and text.lower() == "none":
            return None
        if typing.get_origin(candidate) is typing.Literal and text in map(str, typing.get_args(candidate)):
            return next(value for value in typing.get_args(candidate) if str(value) == text)
        if candidate in (int, float, str):
            with contextlib.suppress(ValueError):
                return candidate(text)
    names = (k.__name__ if isinstance(k, type) else str(k).removeprefix("typing.") for k in kinds)
    shown = " or ".join(names).replace("NoneType", "None")
    raise InvalidArgument(
        f"--set {key}={text}: not a value of type {shown}, which the function asks for. "
        "Only bool, int, float, str, Literal and None can be given here."
    )


def _directory(reference: str, base: Path | None) -> Path:
    place, base = reference.rpartition(":")[0], base or Path.cwd()
    return (base / place).resolve().parent if place.endswith(".py") else base.resolve()


def _is_installed(name: str, path: Path) -> bool:
    """Whether a module is curvkit's own, or what an import finds under its name."""
    if name.partition(".")[0] in ("curvkit", "curvkit_cli"):
        return True
    places = (Path(entry).resolve().joinpath(*name.split(".")) for entry in sys.path if entry)
    return any(path in (place, *_files(place)) for place in places)


def _files(place: Path) -> tuple[Path, Path]:
    """Where the source of a module of this place may lie."""
    return place.with_name(f"{place.name}.py"), place / "__init__.py"


def _source(module: Any) -> Path | None:
    """The .py file of a module, or the folder of a package without one."""
    file = getattr(module, "__file__", None)
    if isinstance(file, str):
        return Path(file).resolve() if file.endswith(".py") else None  # what is compiled cannot be imported twice
    spec = getattr(module, "__spec__", None)
    places = list(getattr(spec, "submodule_search_locations", None) or ())
    return Path(places[0]).resolve() if places else None


def _import_file(named: Path, base: Path | None, said: str, source: bytes | None) -> types.ModuleType:
    path = named if base is None else base / named
    if not path.is_file():
        raise InvalidArgument(f"{said} {str(named)!r}: there is no such file. Paths are taken from {_place(base)}.")
    name = path.stem if path.stem not in sys.modules else f"curvkit_objective_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidArgument(f"{said} {str(named)!r}: Python cannot import it. Pass a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        if source is None:
            spec.loader.exec_module(module)
        else:
            exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise FactoryFailed(f"{path} was imported") from error
    return module


def _import_module(name: str, base: Path | None, said: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InvalidArgument(
                f"{said}: no module {name!r} from {_here(base)}. Name the file instead, for example path/to/train.py:objective."
            ) from error
        raise FactoryFailed(f"{name} was imported") from error
    except (Exception, SystemExit) as error:
        raise FactoryFailed(f"{name} was imported") from error


def _place(base: Path | None) -> str:
    return f"the current directory, {_here(None)}" if base is None else str(base)


def _here(base: Path | None) -> str:
    return (os.path.basename(os.getcwd()) or "/") if base is None else str(base)
