"""The entry point: the group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import click

from curvkit.errors import (
    CurvkitError,
    InvalidArgument,
    MissingExtra,
    NotConverged,
    RefusedCheckpoint,
    UnknownObjective,
)

from .commands.demo import demo
from .commands.sharpness import sharpness

DONE, FAILED, USAGE, UNKNOWN_OBJECTIVE, REFUSED, NOT_CONVERGED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES: dict[type[BaseException], int] = {
    InvalidArgument: USAGE,
    UnknownObjective: UNKNOWN_OBJECTIVE,
    RefusedCheckpoint: REFUSED,
    NotConverged: NOT_CONVERGED,
    MissingExtra: FAILED,
    CurvkitError: FAILED,
}
"""The first class that fits decides."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CURVKIT"})
@click.version_option(package_name="curvkit", message="curvkit %(version)s")
def curvkit() -> None:
    """Curvature of trained PyTorch models, with error bars.

    \b
    curvkit demo demo-run                   train a small model and save checkpoints
    curvkit sharpness demo-run/final.pt     how sharp is it?

    Exit codes: 0 done, 1 failed while running, 2 typed wrong, 3 model, loss or data unknown or not fitting, 4 file refused or
    damaged, 5 not converged (with --strict), 130 interrupted.
    """


curvkit.add_command(sharpness)
curvkit.add_command(demo)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; no traceback of curvkit's own ever shows for a user's mistake."""
    try:
        result = curvkit.main(args=arguments, prog_name="curvkit", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        return _interrupted()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except CurvkitError as error:
        _say(f"Error: {error}")
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except Exception as error:
        return _foreign(error)
    return result if isinstance(result, int) else DONE


def _foreign(error: Exception) -> int:
    """An exception that is not curvkit's: the user's code raised it, or there is a fault in curvkit."""
    from curvkit.resolving import FactoryFailed  # imports torch, which is loaded by now

    cause = error.__cause__ if isinstance(error, FactoryFailed) and error.__cause__ is not None else error
    if isinstance(cause, CurvkitError):  # raised by curvkit inside the user's factory
        _say(f"Error: {cause}")
        return UNKNOWN_OBJECTIVE
    own = _users_frames(cause)
    if own:
        _say("Traceback of your code (most recent call last):")
        _say("".join(traceback.format_list(own)).rstrip("\n"))
    text = "".join(traceback.format_exception_only(cause)).rstrip("\n")
    _say(f"Error: {text}")
    if isinstance(error, FactoryFailed):
        _say(f"It was raised while {error} made the objective.")
        return UNKNOWN_OBJECTIVE
    if own:
        _say("It was raised by the model, the loss or the data.")
    else:
        _say("".join(traceback.format_tb(cause.__traceback__)).rstrip("\n"))
        _say("This is not an error that curvkit expects; please report it with the lines above.")
    return FAILED


def _users_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames from the first one in a file that belongs neither to curvkit nor to an installed package."""
    import importlib._bootstrap
    import sysconfig

    import curvkit as package

    homes = [
        Path(package.__file__).parent,
        Path(__file__).parent,
        *map(Path, (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))),
    ]
    frames = traceback.extract_tb(error.__traceback__)

    def foreign(frame: traceback.FrameSummary) -> bool:
        if frame.filename.startswith("<"):
            return False
        return not any(Path(frame.filename).resolve().is_relative_to(home.resolve()) for home in homes)

    first = next((i for i, frame in enumerate(frames) if foreign(frame)), None)
    if first is None:
        return []
    return [frame for frame in frames[first:] if not frame.filename.startswith("<frozen")]


def _interrupted() -> int:
    _say("Interrupted.")
    return INTERRUPTED


def _say(text: str) -> None:
    click.echo(text, err=True)
