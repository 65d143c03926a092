"""Read a pickle as data: opcodes become plain containers, and what the pickle names is written down, never imported or called."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from curvkit.checkpoints.pickle_machine import LONGEST_NAME, MARK, Machine, Maker
from curvkit.checkpoints.pickle_values import Global, Made, NotPlain, checked_key

__all__ = ["Global", "Made", "Maker", "NotPlain", "Pickle", "checked_key"]

LONGEST_INTEGER = 64
"""Bytes; torch's own magic number has ten."""
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules under the names that pickles of protocol 2 have for them."""


class Pickle(Machine):
    """One pickle inside a buffer.

    Args:
        data: Bytes that hold it.
        position: Where it begins.
        makers: Full name -> what to make of a call to it; other calls become `Made`.
        persistent: Makes a value of a persistent id, by which torch refers to storages.

    Example:
        >>> import pickle
        >>> Pickle(pickle.dumps({"a": [1, (2.5, None)]})).load()
        {'a': [1, (2.5, None)]}
    """

    def load(self) -> Any:
        """Read it to its end.

        Returns:
            Dicts, lists, tuples, numbers, strings and bytes, with `Global` and `Made` where the pickle names something.

        Raises:
            NotPlain: If it ends early, is malformed, or uses what torch never writes.

        Cost: linear in its length; `position` is then the byte after it.
        """
        data, length = self.data, len(self.data)
        try:
            while self.position < length:
                opcode = data[self.position]
                self.position += 1
                if opcode == STOP:
                    return self.pop()
                OPCODES[opcode](self)
        except KeyError as error:
            raise NotPlain(f"the bytes near {self.position} are none that torch writes") from error
        except (IndexError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise NotPlain(f"malformed near byte {self.position}") from error
        raise NotPlain("it ends too early")


def _integer(pickle: Machine, width: int) -> int:
    content = pickle.take(pickle.number(width))
    if len(content) > LONGEST_INTEGER:
        raise NotPlain(f"it has an integer of {len(content):,} bytes")
    return int.from_bytes(content, "little", signed=True)


def _global(pickle: Machine, module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > LONGEST_NAME:
        raise NotPlain("a name in it is not text")
    found = Global(PYTHON_2.get(module, module), name)
    pickle.globals.add(found.full)
    return found


def _named_on_stack(pickle: Machine) -> None:
    name, module = pickle.pop(), pickle.pop()
    pickle.stack.append(_global(pickle, module, name))


def _called(pickle: Machine) -> None:
    arguments, maker = pickle.pop(), pickle.pop()
    pickle.stack.append(pickle.made(maker, arguments))


def _called_with_keywords(pickle: Machine) -> None:
    keywords, arguments, maker = pickle.pop(), pickle.pop(), pickle.pop()
    pickle.stack.append(Made(maker, (arguments, keywords)) if keywords else pickle.made(maker, arguments))


def _build(pickle: Machine) -> None:
    state = pickle.pop()
    if isinstance(target := pickle.top(), Made):
        target.state = state


def _persistent(pickle: Machine) -> None:
    if pickle.persistent is None:
        raise NotPlain("it refers to storages, which belong to a file of torch.save")
    pickle.stack.append(pickle.persistent(pickle.pop()))


def _protocol(pickle: Machine) -> None:
    if not 2 <= pickle.number(1) <= 5:
        raise NotPlain("of a pickle protocol that torch never writes")


def _frame(pickle: Machine) -> None:
    pickle.take(8)


def _drop(pickle: Machine) -> None:
    del pickle.stack[-1]


def _remember(pickle: Machine, key: int) -> None:
    pickle.memo[key] = pickle.top()


def _recall(pickle: Machine, key: int) -> None:
    if key not in pickle.memo:
        raise NotPlain(f"malformed near byte {pickle.position}")
    pickle.stack.append(pickle.memo[key])


def _last(pickle: Machine, count: int) -> tuple[Any, ...]:
    return tuple(pickle.pop() for _ in range(count))[::-1]


def _push(value: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    return lambda pickle: pickle.stack.append(value(pickle))


def _text(width: int) -> Callable[[Machine], None]:
    return _push(lambda p: p.take(p.number(width)).decode("utf-8", "surrogatepass"))


def _counted_bytes(width: int) -> Callable[[Machine], None]:
    return _push(lambda p: p.take(p.number(width)))


def _latin1(width: int) -> Callable[[Machine], None]:
    return _push(lambda p: p.take(p.number(width)).decode("latin1"))


def _unpacked(form: str) -> Callable[[Machine], None]:
    shape = struct.Struct(form)
    return _push(lambda p: shape.unpack(p.take(shape.size))[0])


STOP = 0x2E
OPCODES: dict[int, Callable[[Machine], None]] = {
    0x28: _push(lambda p: MARK),
    0x29: _push(lambda p: ()),
    0x30: _drop,
    0x31: lambda p: p.to_mark().clear(),  # POPMARK
    0x32: _push(lambda p: p.top()),  # DUP
    0x42: _counted_bytes(4),
    0x43: _counted_bytes(1),
    0x47: _unpacked(">d"),
    0x4A: _unpacked("<i"),
    0x4B: _unpacked("<B"),
    0x4D: _unpacked("<H"),
    0x4E: _push(lambda p: None),
    0x51: _persistent,
    0x52: _called,  # REDUCE
    0x54: _latin1(4),
    0x55: _latin1(1),
    0x58: _text(4),
    0x5D: _push(lambda p: []),
    0x61: lambda p: p.extend([p.pop()]),
    0x62: _build,
    0x63: _push(lambda p: _global(p, p.line(), p.line())),
    0x65: lambda p: p.extend(p.to_mark()),
    0x68: lambda p: _recall(p, p.number(1)),
    0x6A: lambda p: _recall(p, p.number(4)),
    0x71: lambda p: _remember(p, p.number(1)),
    0x72: lambda p: _remember(p, p.number(4)),
    0x73: lambda p: p.assign(list(_last(p, 2))),
    0x74: _push(lambda p: tuple(p.to_mark())),
    0x75: lambda p: p.assign(p.to_mark()),
    0x7D: _push(lambda p: {}),
    0x80: _protocol,
    0x81: _called,  # NEWOBJ
    0x85: _push(lambda p: _last(p, 1)),
    0x86: _push(lambda p: _last(p, 2)),
    0x87: _push(lambda p: _last(p, 3)),
    0x88: _push(lambda p: True),
    0x89: _push(lambda p: False),
    0x8A: _push(lambda p: _integer(p, 1)),
    0x8B: _push(lambda p: _integer(p, 4)),
    0x8C: _text(1),
    0x8D: _text(8),
    0x8E: _counted_bytes(8),
    0x8F: _push(lambda p: []),  # EMPTY_SET, kept as a list
    0x90: lambda p: p.extend(p.to_mark()),  # ADDITEMS
    0x91: _push(lambda p: p.to_mark()),  # FROZENSET
    0x92: _called_with_keywords,
    0x93: _named_on_stack,
    0x94: lambda p: _remember(p, len(p.memo)),
    0x95: _frame,
    0x96: _counted_bytes(8),
}
"""All that torch and Python 3 write, but for what protocol 0 has and what calls code by number."""
