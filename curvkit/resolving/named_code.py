"""Whether code that a checkpoint names may be imported: only inside the current project, marked, and unchanged."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from curvkit.checkpoints import Checkpoint
from curvkit.checkpoints.named_recipes import NamedRecipe
from curvkit.checkpoints.trust import Trust
from curvkit.errors import RefusedCheckpoint
from curvkit.resolving.projects import home_directory, project_root, repository_around

MARKS = ("curvkit.objective", "objective")
"""How the decorator looks in the source."""
MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class Admitted:
    """A file that may be imported."""

    file: Path
    name: str
    """Of the function."""
    source: bytes
    """What was looked at; this is what is imported, whatever lies at the path by then."""


def admitted_file(recipe: NamedRecipe, checkpoint: Checkpoint, trust: Trust, here: Path) -> Admitted:
    """Find the file that a named recipe means, and refuse it unless it is plainly the user's own and unchanged.

    It is looked for from the current directory upwards, in a repository also from the checkpoint upwards, never outside of the current
    project (the repository around the current directory, or that directory; a home directory is none). It must have the hash that the
    recipe has, and a top-level function of the name with `@curvkit.objective` above it; both are checked on the bytes of the file before
    anything is imported. What is unpacked inside of a project counts as its own.

    Args:
        recipe: Of the checkpoint.
        checkpoint: For its path.
        trust: If everything is trusted, the file needs neither hash nor mark, and may lie beside a checkpoint anywhere.
        here: The current directory.

    Returns:
        The file as it was read, and the name of the function.

    Raises:
        RefusedCheckpoint: Otherwise; nothing was imported.

    Cost: the file is read and parsed once.
    """
    place, _, name = recipe.objective.rpartition(":")
    relative = PurePosixPath(place if place.endswith(".py") else f"{place.replace('.', '/')}.py")
    if (
        not name.isidentifier()
        or relative.is_absolute()
        or ".." in relative.parts
        or "\\" in place
        or not relative.stem
    ):
        raise RefusedCheckpoint(
            f"{checkpoint.path}: its recipe names {recipe.objective!r}, which is no FILE.py:FUNCTION inside a project. {_nothing(name)}"
        )
    root = project_root(here)
    if root in (home_directory(), Path(root.anchor)) and not trust.everything:
        raise RefusedCheckpoint(
            f"{checkpoint.path}: its recipe names {recipe.objective}, and the current directory, {root}, is no project: downloads lie "
            f"below it, too. Change to the directory of the project. {_nothing(name)}"
        )
    file = next((found for found in _candidates(relative, checkpoint, trust, here, root) if found.is_file()), None)
    if file is None:
        raise RefusedCheckpoint(
            f"{checkpoint.path}: its recipe names {recipe.objective}, and the current project ({root}) has no file {relative}. Code that a "
            f"checkpoint names is imported only inside the current project. {_nothing(name)}"
        )
    said = f"{checkpoint.path}: its recipe names {recipe.objective}, and {file}"
    content = _content(file, name, said)
    if not trust.everything:
        _check(file, content, recipe, said, root)
    return Admitted(file, name, content)


def _candidates(
    relative: PurePosixPath, checkpoint: Checkpoint, trust: Trust, here: Path, root: Path
) -> Iterator[Path]:
    starts = [here.resolve()]
    if trust.everything or repository_around(here) is not None:
        starts.append(checkpoint.path.resolve().parent)
    for start in starts:
        for directory in (start, *start.parents):
            if directory.is_relative_to(root) or (trust.everything and directory == start):
                yield directory / relative


def _content(file: Path, name: str, said: str) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise RefusedCheckpoint(f"{said} cannot be read ({error.strerror or error}). {_nothing(name)}") from error
    if len(content) > MOST_BYTES:
        raise RefusedCheckpoint(f"{said} is larger than any source file. {_nothing(name)}")
    return content


def _check(file: Path, content: bytes, recipe: NamedRecipe, said: str, root: Path) -> None:
    name = recipe.objective.rpartition(":")[2]
    if not file.resolve().is_relative_to(root):
        raise RefusedCheckpoint(f"{said} is a link out of the current project ({root}). {_nothing(name)}")
    if hashlib.sha256(content).hexdigest() != recipe.source_sha256.lower():
        raise RefusedCheckpoint(
            f"{said} is not the file that it was when the checkpoint was written (another SHA-256). If it still makes this model: "
            f"--objective {_shown(file)}:{name}. Nothing was imported."
        )
    try:
        body = ast.parse(content).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RefusedCheckpoint(f"{said} is no Python that can be read. {_nothing(name)}") from error
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not functions or not any(ast.unparse(mark) in MARKS for mark in functions[-1].decorator_list):
        raise RefusedCheckpoint(
            f"{said} has no function {name} at its top level with @curvkit.objective above it. Write the mark there, save the checkpoint "
            f"again, or name the function yourself: --objective {_shown(file)}:{name}. Nothing was imported."
        )


def _nothing(name: str) -> str:
    return f"Nothing was imported. Name the function yourself: --objective FILE.py:{name if name.isidentifier() else 'FUNCTION'}."


def _shown(file: Path) -> str:
    here = Path.cwd().resolve()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)
