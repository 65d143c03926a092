"""What can go wrong, one class per kind of remedy.

Every message has four parts: what was being done, what was found, what is allowed, and what to do next.
The command line maps each class to one exit code; `__init__` of no class takes more than the message.
"""

from __future__ import annotations

import re

EXHAUSTED = re.compile("out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED|bad_alloc", re.IGNORECASE)
"""How torch says that memory ran out, on any device."""


class CurvkitError(Exception):
    """Root of every error that curvkit raises on purpose."""


class InvalidArgument(CurvkitError, ValueError):
    """An argument has a value that is not allowed; the message names the argument, the value and the allowed ones."""


class UnknownObjective(CurvkitError):
    """Model, loss or data are not known, or do not fit each other or the weights."""


class UnsupportedModel(CurvkitError):
    """The method cannot treat this model or loss correctly, so it refuses; the message names the module."""


class RefusedCheckpoint(CurvkitError):
    """A file is damaged, unsafe or of a kind that is not read; nothing of it was executed."""


class NotConverged(CurvkitError):
    """A result was demanded that the computation did not reach within its budget."""


class MissingExtra(CurvkitError, ImportError):
    """An optional package is needed; the message has the install command."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device: torch has an exception of its own for CUDA, and only a text for the CPU.

    Args:
        error: What was raised.

    Returns:
        False for an error of curvkit, which has done what could be done.

    Example:
        >>> ran_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."))
        True
        >>> ran_out_of_memory(RuntimeError("shapes do not fit"))
        False
    """
    if isinstance(error, CurvkitError):
        return False
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and EXHAUSTED.search(str(error)) is not None)
