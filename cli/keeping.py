"""The options -o, --resume and --fresh: what is there already, the state while a measurement runs, and what is left of it at the end."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .failures import harmless, say
from .output import Lasting
from .progress import counted, duration

if TYPE_CHECKING:
    from torch import Tensor

    from curvkit.errors import CurvkitError
    from curvkit.measures import Sharpness, Trace
    from curvkit.results import Journal, StateFolder

Result = TypeVar("Result")
Measured = TypeVar("Measured", bound="Sharpness | Trace")


@dataclass(frozen=True)
class Place:
    """The files of a measurement in the folder of -o."""

    folder: Path
    name: str

    @property
    def document(self) -> Path:
        """The result."""
        return self.folder / f"{self.name}.json"

    @property
    def state(self) -> Path:
        """What is kept while it is computed."""
        return self.folder / f"{self.name}.state"


def place(output: Lasting, name: str) -> Place | None:
    """Where -o writes, made and checked before the work."""
    refuse_conflicts(output)
    if output.out is None:
        return None
    there = Place(output.out, name)
    decided = output.fresh or output.resume
    if (there.state / "manifest.json").exists() and not decided:
        raise click.UsageError(
            f"{there.state} is the state of a run that was cut short. Pass --resume to go on with it, --fresh to begin anew, or choose "
            "another folder."
        )
    if there.document.exists() and not decided:
        raise click.UsageError(
            f"{there.document} is already there and is not overwritten. Choose another folder, or pass --fresh. With --resume it is shown "
            "again."
        )
    make_folder(output.out)
    return there


def refuse_conflicts(output: Lasting) -> None:
    """Refuse flags that say two things, or speak of a folder that is not named."""
    if output.resume and output.fresh:
        raise click.UsageError("--resume goes on with the run that is there, and --fresh removes it: pass one of them.")
    if output.resume and output.out is None:
        raise click.UsageError("--resume goes on with a run in the folder of -o: pass -o DIR too.")


def make_folder(folder: Path) -> None:
    """Make the folder of -o."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(
            f"--out {folder}: the folder cannot be made ({(error.strerror or str(error)).lower()}). Choose another one."
        ) from error


def finished(
    there: Place | None, run: Mapping[str, Any], output: Lasting, seed: int | None, read: Callable[[Any], Result]
) -> tuple[Result, dict[str, Any]] | None:
    """The complete result of the same run, with its document, if --resume finds one."""
    if there is None or not output.resume or not there.document.exists():
        return None
    from curvkit.errors import InvalidArgument, RefusedCheckpoint
    from curvkit.results import differences, environment
    from curvkit.results.manifest import rounding

    advice = "choose another folder, or pass --fresh, which replaces it"
    try:
        document = json.loads(there.document.read_text(encoding="utf-8"))
        before, drawn = document["record"]["run"], document["record"]["seed"]
        apart = rounding(document["record"]["environment"], environment())
        complete = not document["result"]["interrupted"]
        result = read(document) if complete else None
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
        raise RefusedCheckpoint(
            f"{there.document} is not a result that --resume could go on from ({type(error).__name__}: {error}); it must be one that "
            f"curvkit {there.name} -o has written. To measure anew {advice}."
        ) from error
    different = [*differences(before, run, rounding=apart)]
    if seed not in (None, drawn):
        different.append(f"seed was {drawn} and is {seed}")
    if different:
        raise InvalidArgument(
            f"{there.document} is the result of another run: {harmless('; '.join(different))}. --resume is for the same run: {advice}."
        )
    if result is None:
        return None
    if not output.quiet:
        say(f"resumed: {there.document} is complete and is shown again")
    _remove_state(there, run)
    return result, document


def _remove_state(there: Place, run: Mapping[str, Any]) -> None:
    """Remove a state that a run left behind when it ended between its result and this."""
    from curvkit.results import StateFolder

    if (there.state / "manifest.json").exists():
        with StateFolder(there.state, run=run) as journal:
            journal.discard()


@contextlib.contextmanager
def journal(there: Place | None, run: Mapping[str, Any], output: Lasting) -> Generator[Journal]:
    """The state of a run: none without -o; an earlier one with --resume; without it, or with --fresh, an empty one."""
    from curvkit import results
    from curvkit.results.journal import NOTHING_KEPT

    if there is None:
        yield NOTHING_KEPT
        return
    earlier = (there.state / "manifest.json").exists()
    try:
        opened = results.StateFolder(
            there.state,
            run=run,
            surroundings=results.environment(),
            tell=lambda sentence: say(f"warning: {sentence}"),
            fresh=output.fresh,
        )
    except OSError as error:
        raise click.UsageError(
            f"--out {there.folder}: nothing can be written there ({(error.strerror or str(error)).lower()}). Choose another folder."
        ) from error
    with opened:
        if output.resume and not output.quiet:
            _tell(opened, earlier)
        yield opened


def _tell(opened: StateFolder, earlier: bool) -> None:
    if not earlier:
        say(f"resumed: no state in {opened.path}, so this begins at the beginning")
        return
    say(f"resumed: {counted(opened.known, 'result')} of earlier runs, which took {duration(opened.seconds)}, are used")
    for difference in opened.differences:
        say(f"note: {harmless(difference)}: what is computed from here on may round in another way")


def save(kept: Journal) -> None:
    """Write what waits to be saved."""
    from curvkit.results import StateFolder

    if isinstance(kept, StateFolder):
        kept.save()


def discard(kept: Journal) -> None:
    """Remove the state of a run that is complete."""
    from curvkit.results import StateFolder

    if isinstance(kept, StateFolder):
        kept.discard()


def noted(result: Measured | None, kept: Journal) -> Measured | None:
    """The result with the word that a part of it was computed elsewhere, if so."""
    from curvkit.results import StateFolder

    if result is None or not isinstance(kept, StateFolder) or not kept.differences:
        return result
    said = f"resumed, but {'; '.join(kept.differences)}: the bits may differ from those of an unbroken run"
    return replace(result, notes=(*result.notes, said))


def write_tensors(path: Path, tensors: dict[str, Tensor], said: dict[str, Any]) -> dict[str, str]:
    """Write a safetensors file as a whole or not at all: its name and hash for the record."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from curvkit.results.files import replaced, sha256

    beside = {"curvkit": json.dumps(said)}  # one entry: the order of several is not fixed, nor then the hash
    try:
        replaced(path, lambda part: save_file(tensors, part, beside))
    except SafetensorError as error:  # how it says that the disk is full
        raise OSError(str(error)) from error
    return {"name": path.name, "sha256": sha256(path)}


def not_written(there: Place, error: OSError, kept: Journal) -> CurvkitError:
    """What is said where the result is shown and cannot be written."""
    from curvkit.errors import CurvkitError
    from curvkit.results import StateFolder

    again = isinstance(kept, StateFolder) and kept.saved > 0
    advice = (
        "make room, and type the same with --resume"
        if again
        else "keep what was shown, or measure again with another folder"
    )
    return CurvkitError(
        f"{there.document} cannot be written ({(error.strerror or str(error)).lower()}), as a folder of -o must be: {advice}."
    )


def how_to_go_on(arguments: tuple[str, ...], opened: Journal) -> str:
    """What is typed to go on with a run that Ctrl-C cut short."""
    from curvkit.results import StateFolder

    if not isinstance(opened, StateFolder):
        return ""
    if not opened.saved:
        return " Nothing was saved: it would begin anew."
    kept = [argument for argument in arguments if argument != "--fresh"]
    typed = shlex.join(["curvkit", *kept, *([] if "--resume" in kept else ["--resume"])])
    return f" What was computed is kept. To go on: {typed}"
