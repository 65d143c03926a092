"""The entry point: the group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from curvkit.errors import (
    CurvkitError,
    InvalidArgument,
    MissingExtra,
    NotConverged,
    RefusedCheckpoint,
    UnknownObjective,
)

from . import failures
from .commands.compare import compare
from .commands.completion import completion
from .commands.demo import demo
from .commands.diagonal import diagonal
from .commands.doctor import doctor
from .commands.estimators import estimators
from .commands.init import init
from .commands.inspect import inspect
from .commands.sharpness import sharpness
from .commands.trace import trace
from .commands.verify import verify
from .environment import warn_of_unknown
from .failures import say
from .interrupts import INTERRUPTED, Interrupted, conclude, watched

DONE, FAILED, USAGE, UNKNOWN_OBJECTIVE, REFUSED, NOT_CONVERGED = 0, 1, 2, 3, 4, 5
EXIT_CODES: dict[type[BaseException], int] = {
    InvalidArgument: USAGE,
    UnknownObjective: UNKNOWN_OBJECTIVE,
    RefusedCheckpoint: REFUSED,
    NotConverged: NOT_CONVERGED,
    MissingExtra: FAILED,
    CurvkitError: FAILED,
}
"""The first class that fits decides."""


SPIN_COUNT = "5000"
"""How long torch's threads wait actively for each other. By default that is so long that two busy neighbours on two cores made the demo
checkpoint's sharpness take 104 s instead of 3; so it is 3 s alone, and about 10 beside them."""


class Commands(click.Group):
    """Commands whose Ctrl-C ends in one line of ours; click would print an empty one before it."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was typed."""
        warn_of_unknown(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CURVKIT"})
@click.version_option(package_name="curvkit", message="curvkit %(version)s")
def curvkit() -> None:
    """Curvature of trained PyTorch models, with error bars.

    \b
    curvkit demo demo-run                   train a small model and save checkpoints
    curvkit inspect demo-run/final.pt       what is in the file?
    curvkit sharpness demo-run/final.pt     how sharp is it?
    curvkit trace demo-run/final.pt         how much curvature in all, and in which layer?
    curvkit diagonal demo-run/final.pt      how much in every single parameter?
    curvkit compare demo-run/*.pt           which checkpoint is flatter, at equal loss?
    curvkit init my.pt                      write the function that a checkpoint of your own needs

    Exit codes: 0 done, 1 failed while running, 2 typed wrong, 3 model, loss or data unknown or not fitting, 4 file refused or
    damaged, 5 not converged (with --strict), 130 interrupted.
    """


curvkit.add_command(inspect)
curvkit.add_command(sharpness)
curvkit.add_command(trace)
curvkit.add_command(diagonal)
curvkit.add_command(estimators)
curvkit.add_command(verify)
curvkit.add_command(compare)
curvkit.add_command(init)
curvkit.add_command(demo)
curvkit.add_command(doctor)
curvkit.add_command(completion)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported
    with watched():
        code = run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; no traceback of curvkit's own ever shows for a user's mistake."""
    try:
        result = curvkit.main(args=arguments, prog_name="curvkit", standalone_mode=False, obj=tuple(arguments))
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt, Interrupted):
        conclude("Interrupted.")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except CurvkitError as error:
        say(f"Error: {failures.harmless(failures.as_typed(error))}")
        if isinstance(error, InvalidArgument) and failures.while_evaluating(error):
            return UNKNOWN_OBJECTIVE  # raised by the model or the loss on this data, not by what was typed
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except Exception as error:
        failed_to_make = type(error).__name__ == "FactoryFailed"
        failures.show(error)
        return UNKNOWN_OBJECTIVE if failed_to_make else FAILED
    return result if isinstance(result, int) else DONE
