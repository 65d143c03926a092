"""The one check that every model's sizes go through."""

from __future__ import annotations

from curvkit.errors import InvalidArgument


def check_count(owner: str, name: str, value: object, meaning: str, example: int) -> None:
    """Refuse `value` unless it is an integer >= 1.

    Recipes come from files, so "16", 16.0 and True are refused rather than converted.

    Args:
        owner: The class or function that was called.
        name: The argument's name.
        value: What was passed.
        meaning: What the argument is, as the rest of a sentence that begins with "It is".
        example: A value that is allowed.

    Raises:
        InvalidArgument: If `value` is not an integer >= 1.

    Example:
        >>> check_count("MLP", "sizes[0]", 4, "the number of inputs", 4)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(
            f"{owner}: {name}={value!r} must be an integer >= 1. It is {meaning}; pass for example {example}."
        )
