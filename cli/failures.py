"""What is said of an exception that is not curvkit's: whose it is, where it was raised, and no frame of ours above the user's."""

from __future__ import annotations

import functools
import importlib.util
import re
import sysconfig
import traceback
from pathlib import Path

import click

import curvkit
from curvkit.errors import CurvkitError, ran_out_of_memory

PACKAGE = Path(curvkit.__file__).resolve().parent
OWN = (PACKAGE, Path(__file__).resolve().parent)
EVALUATION = PACKAGE / "objectives" / "function.py"
"""Where model and loss are called: what is raised below is theirs, or the data's."""
EVALUATING = ("terms", "terms_of", "outputs")
"""In these methods."""
FACTORIES = PACKAGE / "resolving" / "factories.py"
"""Where the user's function is imported and called."""
SPEAKERS = re.compile(r"(lanczos|sharpness|trace|cross-check|GGN|\w*Hessian|CharacterDemo|demo): |(?=seed=)")
"""How messages begin that speak of arguments for which the command has flags."""
FLAGS = {
    "num": "--num",
    "which": "--which",
    "block_size": "--block-size",
    "tolerance": "--tolerance",
    "max_products": "--max-products",
    "max_seconds": "--max-time",
    "memory_bytes": "--memory",
    "budget_bytes": "--memory",
    "residency": "--residency",
    "seed": "--seed",
    "rounding": "--rounding",
    "arithmetic": "--arithmetic",
    "rule": "--rule",
    "method": "--method",
    "rank": "--rank",
    "absolute_tolerance": "--absolute-tolerance",
    "steps": "--steps",
    "saves": "--saves",
}
"""Argument in Python -> flag of the command."""
ASSIGNMENT = re.compile(r"\b(\w+)=('[^']*')?")
PHRASES = {
    "the memory budget": "the memory budget (--memory)",
    "Raise the budget, or ask for fewer eigenvalues": "Raise --memory, or ask for fewer eigenvalues by --num",
    "Raise the budget, or leave": "Raise --memory, or leave",
    "Ask for fewer eigenvalues": "Ask for fewer eigenvalues by --num",
    "the order of the matrix": "the number of parameters",
    "compute in float64": "compute with --dtype float64",
    ", or None for one drawn from the system": "; without the flag one is drawn",
    "out by patterns": "out by --params",
    "Call model.eval() to cross-check": "Use --mode eval, the default",
    "Convert first: objective.converted(dtype=torch.float32)": "Use --dtype float32",
    "leave out the cross-check": "leave out --cross-check",
}
"""Advice for Python -> advice for the command."""


def say(text: str) -> None:
    """Write a line to stderr."""
    click.echo(text, err=True)


def harmless(text: str) -> str:
    """A text that may come from a file, without what a terminal would obey: escape sequences, control characters, lone surrogates."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def show(error: Exception) -> None:
    """Say what was raised, by whom, and where."""
    making = type(error).__name__ == "FactoryFailed"  # by name, because its home imports torch
    cause = error.__cause__ if making and error.__cause__ is not None else error
    frames = _users_frames(cause)
    if making and isinstance(cause, CurvkitError):  # curvkit refused what the user's function passed to it
        place = f" Raised in {Path(frames[0].filename).name}, line {frames[0].lineno}." if frames else ""
        say(f"Error: {cause}{place}")
        return
    if isinstance(cause, OSError) and not frames and cause.strerror:
        say(f"Error: {cause.filename or 'output'}: {cause.strerror.lower()}.")
        return
    if ran_out_of_memory(cause):
        say(f"Error: out of memory ({str(cause).strip().partition(chr(10))[0][:200] or type(cause).__name__}).")
        say("Try --residency streamed, a smaller --memory, fewer --batches, or smaller batches.")
        return
    if frames:
        say("Traceback (most recent call last):")
        say("".join(traceback.format_list(frames)).rstrip("\n"))
    *where, last = traceback.format_exception_only(cause)  # a SyntaxError has lines before its last one
    for line in where:
        say(line.rstrip("\n"))
    say(f"Error: {last.rstrip()}")
    if isinstance(cause, SystemExit):
        say("Your code ends the program. Put what only a training run should do under: if __name__ == '__main__':")
    if making:
        say(f"It was raised while {error}.")
    elif frames or while_evaluating(cause):
        say("It was raised by the model, the loss or the data.")
    else:
        say("".join(traceback.format_tb(cause.__traceback__)).rstrip("\n"))
        say("This is not an error that curvkit expects; please report it with the lines above.")


def as_typed(error: BaseException) -> str:
    """The text of an error in the words of the command: flags instead of Python's arguments, without the name of who refused."""
    text = str(error)
    speaker = SPEAKERS.match(text)
    if speaker is None:
        return text
    text = ASSIGNMENT.sub(_flagged, text[speaker.end() :])
    for phrase, said in PHRASES.items():
        text = text.replace(phrase, said)
    return text


def _flagged(found: re.Match[str]) -> str:
    """`tolerance=2.0` as `--tolerance 2.0`, `method='exact'` as `--method exact`."""
    return f"{FLAGS[found[1]]} {(found[2] or '').strip(chr(39))}" if found[1] in FLAGS else found[0]


def while_evaluating(error: BaseException) -> bool:
    """Whether model or loss were being called."""
    return any(_is_evaluation(frame) for frame in traceback.extract_tb(error.__traceback__))


def _is_evaluation(frame: traceback.FrameSummary) -> bool:
    return frame.name in EVALUATING and Path(frame.filename).resolve() == EVALUATION


def _users_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames from the first one of the user's; none of curvkit's at either end."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    first = next((i for i, frame in enumerate(frames) if not _inside(frame, OWN + _installed())), None)
    if first is None:  # all of it is installed: what was called from the evaluation, or from the factory
        evaluation = next((i for i, frame in enumerate(frames) if _is_evaluation(frame)), None)
        made_here = bool(frames) and Path(frames[0].filename).resolve() == FACTORIES
        first = evaluation if evaluation is not None else (0 if made_here else len(frames))
        frames = frames[:first] + [frame for frame in frames[first:] if not _inside(frame, OWN)]
    kept = frames[first:]
    while kept and _inside(kept[-1], OWN):
        kept.pop()  # where curvkit refused it
    return kept


@functools.cache
def _installed() -> tuple[Path, ...]:
    """Where packages lie: the places of this Python, and those from which click and torch come, which may lie elsewhere."""
    homes = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    for name in ("click", "torch"):
        try:
            found = importlib.util.find_spec(name)
        except ValueError:  # a module that was put in its place
            continue
        if found is not None and found.origin is not None and Path(found.origin).name == "__init__.py":
            package = Path(found.origin).resolve().parent
            users = Path.cwd().is_relative_to(package.parent)  # a copy in the folder that the user works in
            homes.append(package if users else package.parent)
    return tuple(homes)


def _inside(frame: traceback.FrameSummary, homes: tuple[Path, ...]) -> bool:
    if frame.filename.startswith("<"):
        return True
    return any(Path(frame.filename).resolve().is_relative_to(home) for home in homes)
