"""Options that count something."""

from __future__ import annotations

from typing import Any

from curvkit.errors import InvalidArgument


def check_count(estimator: str, option: str, value: Any, *, default: int) -> None:
    """Refuse what is no positive number of something.

    Args:
        estimator: For the message.
        option: Its name.
        value: What was given.
        default: Of the option, for the message.

    Raises:
        InvalidArgument: If it is no integer, or less than 1.

    Example:
        >>> check_count("Fisher", "num_samples", 2, default=1)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{estimator}: {option}={value!r} must be an integer >= 1. The default is {default}.")
