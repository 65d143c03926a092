"""A named recipe: which function of the user's own file makes the objective, and what that file was."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkit.errors import InvalidArgument
from curvkit.objectives import is_objective

FORMAT = 1
KEYS = ("objective", "kwargs", "source_sha256")


@dataclass(frozen=True)
class NamedRecipe:
    """The name of a function marked with `@curvkit.objective`, and the hash of its file.

    Nothing is imported by reading it; see `curvkit.resolving` for when it is.

    Args:
        objective: "train.py:objective", relative to the project, or "package.module:objective".
        kwargs: Arguments of the function.
        source_sha256: Of the file, 64 hexadecimal digits.
    """

    objective: str
    kwargs: Mapping[str, Any]
    source_sha256: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> NamedRecipe:
        """Name a function.

        Args:
            function: Marked with `@curvkit.objective`, at the top level of a file; or a `functools.partial` of it with keyword arguments.

        Returns:
            The recipe; the file's path is relative to the current directory if it lies below.

        Raises:
            InvalidArgument: If the function could not be found again by its name.
        """
        kwargs: Mapping[str, Any] = {}
        if isinstance(function, functools.partial):
            if function.args:
                raise InvalidArgument(
                    f"curvkit.save: recipe is a partial with positional arguments {function.args!r}. Give them by keyword."
                )
            function, kwargs = function.func, function.keywords
        name = getattr(function, "__qualname__", type(function).__name__)
        if not is_objective(function):
            raise InvalidArgument(
                f"curvkit.save: recipe={name} is not marked. Write @curvkit.objective above the function that returns the Objective."
            )
        file = inspect.getsourcefile(inspect.unwrap(function))
        if not name.isidentifier() or file is None or not Path(file).is_file():
            raise InvalidArgument(
                f"curvkit.save: recipe={name} is no function at the top level of a file, so that it could not be found again. "
                "Define it in the training script, outside of other functions."
            )
        path = Path(file).resolve()
        below = path.is_relative_to(Path.cwd().resolve())
        place = path.relative_to(Path.cwd().resolve()).as_posix() if below else path.name
        return cls(f"{place}:{name}", dict(kwargs), hashlib.sha256(path.read_bytes()).hexdigest())

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> NamedRecipe:
        """Read the plain form.

        Args:
            plain: As of `to_dict`.

        Returns:
            The recipe.

        Raises:
            InvalidArgument: If it is of another form.
        """
        if plain.get("format", FORMAT) != FORMAT:
            raise InvalidArgument(
                f"Recipe: format {plain['format']!r} is not known to this version, which reads {FORMAT}. Update curvkit."
            )
        unknown = sorted(str(key) for key in plain if key not in (*KEYS, "format"))
        kwargs = plain.get("kwargs", {})
        fits = isinstance(plain.get("objective"), str) and isinstance(plain.get("source_sha256"), str)
        if unknown or not fits or not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise InvalidArgument(
                "Recipe: a named recipe has the texts objective and source_sha256, and the dict kwargs"
                + (f", but not {unknown[0]!r}." if unknown else ".")
                + " Write it with curvkit.save(path, model=model, recipe=objective)."
            )
        return cls(plain["objective"], dict(kwargs), plain["source_sha256"])

    def to_dict(self) -> dict[str, Any]:
        """The plain form, which weights_only can load.

        Returns:
            A dict of primitives.
        """
        return {
            "format": FORMAT,
            "objective": self.objective,
            "kwargs": dict(self.kwargs),
            "source_sha256": self.source_sha256,
        }
