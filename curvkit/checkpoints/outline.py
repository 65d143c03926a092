"""What the pickles of torch.save mean: which calls make plain values and which make tensors; none is made."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from curvkit.checkpoints.pickle_machine import Machine, Maker
from curvkit.checkpoints.pickle_values import Made, NotPlain, checked_key
from curvkit.checkpoints.pickles import Pickle
from curvkit.checkpoints.stored import Storage, storage_of, tensor_of

NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u4": "I", "u1": "B", "b1": "?"}
"""numpy's name of a type -> that of struct."""


@dataclass(frozen=True, eq=False)
class Outline:
    """The content of a pickle.

    Args:
        content: Plain data with a `StoredTensor` for every tensor, and `Made` for what is neither.
        globals: Every name that the pickle refers to.
        storages: Those that it refers to, by key.
        end: The byte after it.
    """

    content: Any
    globals: set[str]
    storages: dict[str, Storage]
    end: int


def outline(data: bytes, position: int = 0) -> Outline:
    """Read a pickle of torch.save.

    Args:
        data: Bytes that hold it.
        position: Where it begins.

    Returns:
        Its content; nothing that it names was imported.

    Raises:
        NotPlain: If it is malformed, or a tensor would read outside its storage.

    Cost: linear in its length.

    Example:
        >>> import pickle, argparse
        >>> found = outline(pickle.dumps({"lr": 0.1, "args": argparse.Namespace(depth=2)}))
        >>> found.content["args"].state, sorted(found.globals)
        ({'depth': 2}, ['argparse.Namespace'])
    """
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        found = storage_of(identity)
        if isinstance(found, Storage):
            earlier = storages.setdefault(found.key, found)
            if earlier.bytes < found.bytes:
                storages[found.key] = found
        return found

    reader = Pickle(data, position, makers=MAKERS, persistent=persistent)
    content = reader.load()
    return Outline(content, reader.globals, storages, reader.position)


def _dict(reader: Machine, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if not arguments:
        return {}
    pairs = arguments[0].items() if isinstance(arguments[0], dict) else arguments[0]
    if not isinstance(pairs, Iterable):
        raise NotPlain("a dict in it is made of something else")
    made: dict[Any, Any] = {}
    for pair in pairs:
        reader.afford(1)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise NotPlain("a dict in it is made of something else")
        made[checked_key(pair[0])] = pair[1]
    return made


def _list(reader: Machine, arguments: tuple[Any, ...]) -> list[Any]:
    items = arguments[0] if arguments else ()
    if not isinstance(items, list | tuple):
        raise NotPlain("a list in it is made of something else")
    reader.afford(len(items))
    return list(items)


def _size(reader: Machine, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_list(reader, arguments))


def _encoded(reader: Machine, arguments: tuple[Any, ...]) -> bytes:
    text, *rest = arguments
    if not isinstance(text, str) or rest not in ([], ["latin1"]):
        raise NotPlain("bytes in it are written in an unknown way")
    reader.afford(len(text))
    return text.encode("latin1")


def _bytes(reader: Machine, arguments: tuple[Any, ...]) -> bytes:
    content = arguments[0] if arguments else b""
    if isinstance(content, str):
        return _encoded(reader, arguments)
    if not isinstance(content, bytes):
        raise NotPlain("bytes in it are written in an unknown way")
    reader.afford(len(content))
    return content


def _complex(reader: Machine, arguments: tuple[Any, ...]) -> complex:
    real, imaginary = arguments
    return complex(real, imaginary)


def _scalar(reader: Machine, arguments: tuple[Any, ...]) -> Any:
    """A number of numpy as one of Python; of another type, what would have been made."""
    kind, content = arguments if len(arguments) == 2 else (None, None)
    name = kind.arguments[0] if isinstance(kind, Made) and kind.arguments else None
    state: Any = kind.state if isinstance(kind, Made) and isinstance(kind.state, tuple) else ()
    big = len(state) > 1 and state[1] == ">"
    if isinstance(name, str) and name in NUMBERS and isinstance(content, bytes):
        return struct.unpack((">" if big else "<") + NUMBERS[name], content)[0]
    return Made("numpy scalar", arguments)


def _tensor(reader: Machine, arguments: tuple[Any, ...]) -> Any:
    storage, offset, shape, stride, *rest = arguments
    _plain_bits(rest[2:])
    return tensor_of(storage, offset, shape, stride)


def _typed_tensor(reader: Machine, arguments: tuple[Any, ...]) -> Any:
    storage, offset, shape, stride, _, _, dtype, *rest = arguments
    _plain_bits(rest)
    return tensor_of(storage, offset, shape, stride, dtype)


def _plain_bits(metadata: list[Any]) -> None:
    if metadata and metadata[0]:
        raise NotPlain("a tensor in it is conjugated or negated lazily: save it after .resolve_conj().resolve_neg()")


def _first(reader: Machine, arguments: tuple[Any, ...]) -> Any:
    return arguments[0]


def _of_type(reader: Machine, arguments: tuple[Any, ...]) -> Any:
    function, _, inner, *_ = arguments
    return reader.made(function, inner)


MAKERS: dict[str, Maker] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda reader, arguments: _dict(reader, arguments[1:]),
    "collections.deque": _list,
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.set": _list,
    "builtins.frozenset": _list,
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _encoded,
    "torch.Size": _size,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
}
"""Full name -> what a call to it makes."""
