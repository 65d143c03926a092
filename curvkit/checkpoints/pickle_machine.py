"""The state of a pickle that is being read, and the moves from which its opcodes are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvkit.checkpoints.pickle_values import Global, Made, NotPlain, checked_key

LONGEST_NAME = 1024
"""Characters of a module and a name in it."""
Maker = Callable[["Machine", Any], Any]
"""(the pickle, arguments) -> a plain value."""
MARK = object()
"""Where a container begins on the stack."""


class Machine:
    """The stack and the memo of a pickle that is being read.

    Args:
        data: Bytes that hold it.
        position: Where it begins.
        makers: Full name -> what to make of a call to it; other calls become `Made`.
        persistent: Makes a value of a persistent id, by which torch refers to storages.
    """

    def __init__(
        self,
        data: bytes,
        position: int = 0,
        *,
        makers: dict[str, Maker] | None = None,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.data, self.position = data, position
        self.makers, self.persistent = makers or {}, persistent
        self.globals: set[str] = set()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = len(data) - position + 1024

    def afford(self, count: int) -> None:
        """Account for a copy.

        Args:
            count: Of items.

        Raises:
            NotPlain: If a short pickle asks for far more memory than its length by copying one thing again and again.
        """
        self.budget -= count
        if self.budget < 0:
            raise NotPlain("it copies the same container many times, to fill the memory")

    def made(self, maker: Any, arguments: Any) -> Any:
        """What a call would have made.

        Args:
            maker: What would have been called.
            arguments: A tuple.

        Returns:
            A plain value where the maker is known, else `Made`.

        Raises:
            NotPlain: If there are no arguments to call it with.
        """
        if not isinstance(arguments, tuple):
            raise NotPlain(f"malformed near byte {self.position}")
        known = self.makers.get(maker.full) if isinstance(maker, Global) else None
        return Made(maker, arguments) if known is None else known(self, arguments)

    def take(self, count: int) -> bytes:
        """The next bytes.

        Args:
            count: How many.

        Returns:
            They themselves.

        Raises:
            NotPlain: If there are fewer.
        """
        end = self.position + count
        if end > len(self.data):
            raise NotPlain("it ends too early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, width: int) -> int:
        """The next bytes as a number without a sign.

        Args:
            width: How many.

        Returns:
            The number.
        """
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """The next line.

        Returns:
            Without its end.

        Raises:
            NotPlain: If it is long.
        """
        end = self.data.find(b"\n", self.position, self.position + LONGEST_NAME)
        if end < 0:
            raise NotPlain("a name in it has no end")
        return self.take(end + 1 - self.position)[:-1].decode("utf-8")

    def pop(self) -> Any:
        """Take the last value.

        Returns:
            The value.

        Raises:
            NotPlain: If a container begins there.
        """
        value = self.stack.pop()
        if value is MARK:
            raise NotPlain(f"malformed near byte {self.position}")
        return value

    def top(self) -> Any:
        """Look at the last value.

        Returns:
            The value.

        Raises:
            NotPlain: If a container begins there.
        """
        value = self.stack[-1]
        if value is MARK:
            raise NotPlain(f"malformed near byte {self.position}")
        return value

    def to_mark(self) -> list[Any]:
        """Take what was pushed since the last mark.

        Returns:
            The values, in order.
        """
        items: list[Any] = []
        while (value := self.stack.pop()) is not MARK:
            items.append(value)
        items.reverse()
        return items

    def extend(self, items: list[Any]) -> None:
        """Put values into the list before them.

        Args:
            items: The values.

        Raises:
            NotPlain: If there is no list.
        """
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Made):  # a list of a class of its own; the name is known, and that suffices
            raise NotPlain(f"malformed near byte {self.position}")

    def assign(self, items: list[Any]) -> None:
        """Put keys and values into the dict before them.

        Args:
            items: Keys and values in turn.

        Raises:
            NotPlain: If there is no dict.
        """
        target = self.top()
        if isinstance(target, Made):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise NotPlain(f"malformed near byte {self.position}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value
