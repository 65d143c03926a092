"""Texts out of a stranger's file, for people: short, on one line, and without what a terminal would obey."""

from __future__ import annotations

LONGEST_NUMBER = 1 << 64


def printable(text: str, most: int = 200) -> str:
    r"""A name or a text for a message.

    Args:
        text: As the file has it.
        most: Characters that are kept.

    Returns:
        The same with a question mark for every character that does not print.

    Cost: none.

    Example:
        >>> printable("train\x1b[2J.Config")
        'train?[2J.Config'
    """
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def printable_key(key: object, most: int = 100) -> str:
    r"""A key of a dict for a message.

    Args:
        key: Text, a number, or anything else, of which the type is said.
        most: Characters that are kept.

    Returns:
        A text that prints.

    Cost: none, however large the number is.

    Example:
        >>> printable_key("ema\n"), printable_key(3), printable_key((1, 2))
        ('ema?', '3', 'tuple')
    """
    if isinstance(key, int) and abs(key) >= LONGEST_NUMBER:
        return "a number of many digits"
    return printable(str(key) if isinstance(key, str | int | float) else type(key).__name__, most)
