"""What a pickle refers to, as data: names, and the objects that would have been made by calling them."""

from __future__ import annotations

from typing import Any

LARGEST_KEY = 1 << 60
"""Integers beyond are no keys of a dict: enough of them with one hash would take hours to insert."""


class NotPlain(Exception):
    """The bytes are no pickle that torch writes; the text says what is wrong with them."""


class Global:
    """A name, "module.attribute", that a pickle refers to.

    Args:
        module: As written.
        name: As written.
    """

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def full(self) -> str:
        """Both parts."""
        return f"{self.module}.{self.name}"


class Made:
    """An object that the pickle would have made by calling something; nothing was called.

    Args:
        maker: What would have been called.
        arguments: With what.
    """

    __slots__ = ("arguments", "maker", "state")

    def __init__(self, maker: Any, arguments: Any) -> None:
        self.maker, self.arguments, self.state = maker, arguments, None

    def __repr__(self) -> str:
        """What would have been called; a path as the text that it is made of."""
        parts = self.arguments if isinstance(self.arguments, tuple) else ()
        if self.full.startswith("pathlib.") and parts and all(isinstance(part, str) for part in parts):
            return repr("/".join(parts).replace("//", "/"))
        return f"{self.full or 'an object'}(...)"

    @property
    def full(self) -> str:
        """Name of the class or function; empty if it is not known by one."""
        return self.maker.full if isinstance(self.maker, Global) else ""


def checked_key(key: Any) -> Any:
    """Admit a key of a dict whose hash is cheap, whatever the pickle holds.

    Args:
        key: As read.

    Returns:
        The key.

    Raises:
        NotPlain: If it is a container that is nested or long, or a number beyond all use.

    Example:
        >>> checked_key(("group", 0))
        ('group', 0)
    """
    if isinstance(key, str | bytes | Made | Global) or key is None:
        return key
    if isinstance(key, int | float) and -LARGEST_KEY < key < LARGEST_KEY:
        return key
    if isinstance(key, tuple) and len(key) <= 16 and not any(isinstance(part, tuple) for part in key):
        for part in key:
            checked_key(part)
        return key
    raise NotPlain(f"a key of a dict in it is a {type(key).__name__}")
