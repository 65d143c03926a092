"""What the annotation of an option allows, and how a text becomes such a value."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Reader:
    """One kind of value.

    Args:
        allowed: In words.
        read: Raises ValueError where a text is no such value.
    """

    allowed: str
    read: Callable[[str], Any]


def readers(hint: Any) -> list[Reader]:
    """How texts become values of an annotation.

    Args:
        hint: The annotation.

    Returns:
        One for each kind of value, texts of any kind last; empty where a text cannot become one.

    Example:
        >>> [reader.read("3") for reader in readers(int | str)]
        [3, '3']
    """
    if hint is None or hint is types.NoneType:
        return [Reader("none", lambda text: _of({"none": None}, text.lower()))]
    if hint is bool:
        return [Reader("true or false", lambda text: _of(BOOLEANS, text.lower()))]
    if hint is int:
        return [Reader("an integer", int)]
    if hint is float:
        return [Reader("a number", _finite)]
    if hint is str:
        return [Reader("a text", str)]
    if typing.get_origin(hint) is Literal:
        values = {str(value): value for value in typing.get_args(hint)}
        return [Reader(listed(map(repr, typing.get_args(hint))), lambda text: _of(values, text))]
    inside = [part for part in parts(hint) if part is not hint]
    return sorted((r for part in inside for r in readers(part)), key=lambda reader: reader.allowed == "a text")


def _of(values: Mapping[str, Any], text: str) -> Any:
    if text not in values:
        raise ValueError(text)
    return values[text]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def allowed(hint: Any) -> str:
    """The values of an annotation, in words.

    Args:
        hint: The annotation.

    Returns:
        A phrase.

    Example:
        >>> allowed(Literal["hessian", "ggn"]), allowed(int | None)
        ("'hessian' or 'ggn'", 'an integer or none')
    """
    said, inside = [reader.allowed for reader in readers(hint)], estimators(hint)
    if inside:
        classes = [part.__name__ for part in inside if not _is_protocol(part)]
        said.insert(0, f"an estimator ({listed(classes)})" if classes else "an estimator")
    return listed(said) or f"of type {hint.__name__ if isinstance(hint, type) else hint}"


def parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union; else the annotation itself.

    Args:
        hint: The annotation.

    Returns:
        One or more annotations.
    """
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def estimators(hint: Any) -> list[type[Any]]:
    """The members of an annotation that are estimators: classes with a method `estimate`, and protocols.

    Args:
        hint: The annotation.

    Returns:
        Classes.
    """
    return [part for part in parts(hint) if _is_estimator(part)]


def _is_estimator(part: Any) -> bool:
    return isinstance(part, type) and (_is_protocol(part) or hasattr(part, "estimate"))


def _is_protocol(part: type[Any]) -> bool:
    return bool(getattr(part, "_is_protocol", False))


def takes(hint: Any, kind: type[Any]) -> bool:
    """Whether an option takes estimators of a class.

    Args:
        hint: Its annotation.
        kind: The class.

    Returns:
        For a protocol whether the class has all that it defines.
    """
    return any(_conforms(kind, part) if _is_protocol(part) else issubclass(kind, part) for part in estimators(hint))


def _conforms(kind: type[Any], protocol: type[Any]) -> bool:
    wanted = {
        name for part in protocol.__mro__ if _is_protocol(part) for name in vars(part) if not name.startswith("_")
    }
    return all(hasattr(kind, name) for name in wanted)


def listed(words: Iterable[str]) -> str:
    """Join words by commas and "or".

    Args:
        words: Any number.

    Returns:
        A phrase.

    Example:
        >>> listed("abc")
        'a, b or c'
    """
    *first, last = [*words] or [""]
    return f"{', '.join(first)} or {last}" if first else last
