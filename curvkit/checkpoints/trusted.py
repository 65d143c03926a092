"""Files that the user trusts to run code: the only place where something that a file names is imported."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvkit.checkpoints.allowed import ALLOWED
from curvkit.checkpoints.trust import Trust
from curvkit.errors import InvalidArgument, RefusedCheckpoint

NEVER = (
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "builtins",
    "shutil",
    "socket",
    "runpy",
    "importlib",
    "pty",
    "code",
    "ctypes",
)
"""Modules from which no class can be allowed by name; torch itself refuses the first of them whatever the list says."""
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def can_be_allowed(name: str) -> bool:
    """Whether a name in a file can be the class of a user.

    Args:
        name: "package.module.Class".

    Returns:
        False for modules that only an attack would name, and for what was defined in the script that was run.

    Example:
        >>> can_be_allowed("train.Config"), can_be_allowed("os.system"), can_be_allowed("__main__.Config")
        (True, False, False)
    """
    root = name.partition(".")[0]
    return bool(NAME.fullmatch(name)) and root not in NEVER and root != "__main__"


def trusted_content(path: Path, kind: str, trust: Trust, names: tuple[str, ...]) -> Any:
    """Load a file that may run code, as far as the user allowed it.

    Args:
        path: The file.
        kind: As detected.
        trust: With everything: whatever the file does is done. Else its classes alone are imported.
        names: What the file refers to beyond plain data.

    Returns:
        Its content, with the state dict in place of every module in its outer containers.

    Raises:
        RefusedCheckpoint: If loading fails.
        InvalidArgument: If one of the classes cannot be imported.

    Cost: that of the file's own code.
    """
    try:
        with warnings.catch_warnings(), _current_directory():
            warnings.simplefilter("ignore")
            if kind == "torchscript":
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
            if kind == "exported program":
                return dict(torch.export.load(str(path)).state_dict)
            if all(name in trust.classes for name in names):
                _check_classes(trust.classes)
                with _allowed(trust.classes):
                    content = torch.load(path, map_location="cpu", weights_only=True)
            else:
                content = torch.load(path, map_location="cpu", weights_only=False)
    except InvalidArgument:
        raise
    except Exception as error:  # whatever the code in the file raises
        reason = next((line for line in str(error).splitlines() if line.strip()), "")[:300]
        raise RefusedCheckpoint(
            f"{path}: trusted, but it cannot be loaded ({type(error).__name__}: {reason}). "
            "It needs the code and the versions with which it was made. A state dict needs neither: torch.save(model.state_dict(), path)."
        ) from error
    return _without_modules(content)


@contextlib.contextmanager
def _allowed(classes: tuple[str, ...]) -> Generator[None]:
    """For a while, torch may make these classes and plain data; what others have allowed stays as it is."""
    wanted: list[Any] = [(_imported(name), name) for name in classes]
    wanted += [(_imported(name), name) for name in sorted(ALLOWED) if not name.startswith("torch")]
    there = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([entry for entry in wanted if entry not in there and entry[0] is not None]):
        yield


def _imported(name: str) -> Any:
    """The object of that name; None for one of the allowed names that this installation does not have."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in ALLOWED:
            return None
        raise InvalidArgument(
            f"--allow {name}: cannot be imported from {Path.cwd().name or '/'} ({error}). "
            "Write package.module.Class, and run where Python finds the module."
        ) from error


def _check_classes(classes: tuple[str, ...]) -> None:
    """Admit classes alone: a function would be called with whatever the file says."""
    for name in classes:
        if name.startswith("__main__."):
            raise InvalidArgument(
                f"--allow {name}: __main__ was the script that wrote the file, and its classes cannot be found by that name. "
                "Save the weights there: torch.save(model.state_dict(), path)."
            )
        if not can_be_allowed(name):
            raise InvalidArgument(
                f"--allow {name}: not the full name of a class of yours. Write package.module.Class; modules that can run commands "
                f"({', '.join(NEVER[:5])}, ...) are not let in by name."
            )
        if not isinstance(_imported(name), type):
            raise InvalidArgument(
                f"--allow {name}: it is no class, and a file that may call it could run anything. Only classes are let in by name."
            )


@contextlib.contextmanager
def _current_directory() -> Generator[None]:
    """Python finds modules in the current directory, after all others: a file json.py that lies there is not what a library imports."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(here)]


def _without_modules(content: Any) -> Any:
    if isinstance(content, nn.Module):
        return dict(content.state_dict())
    if isinstance(content, Mapping):
        return {
            key: _without_modules(value) if isinstance(value, nn.Module) else value for key, value in content.items()
        }
    return content
