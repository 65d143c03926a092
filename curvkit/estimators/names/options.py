"""Options of an estimator as texts, read by the annotations of its dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.estimators.names.annotations import allowed, estimators, listed, parts, readers, takes


@dataclass(frozen=True)
class Option:
    """An option of an estimator.

    Args:
        name: Of the field.
        allowed: Its values, in words: "an integer", "'hessian' or 'ggn'".
        default: As Python writes it; None: it must be given.
    """

    name: str
    allowed: str
    default: str | None

    def __str__(self) -> str:
        """Name, values, default."""
        return f"{self.name} ({self.allowed}, {'no default' if self.default is None else f'default {self.default}'})"


def options(kind: type[Any]) -> tuple[Option, ...]:
    """List the options of an estimator.

    Args:
        kind: A dataclass.

    Returns:
        One for each field that `__init__` takes and `repr` shows, in order.

    Raises:
        InvalidArgument: If the annotations cannot be evaluated.

    Example:
        >>> from curvkit.estimators import Fisher
        >>> [str(option) for option in options(Fisher)]
        ['num_samples (an integer, default 1)']
    """
    hints = _hints(kind)
    return tuple(
        Option(field.name, allowed(hints[field.name]), None if _required(field) else repr(_default(field)))
        for field in _fields(kind)
    )


def made(name: str, kind: type[Any], given: Mapping[str, str], known: Mapping[str, type[Any]], base: Any = None) -> Any:
    """Make an estimator from texts.

    Args:
        name: Of the estimator, for messages.
        kind: A frozen dataclass.
        given: Texts by option; `inner=hutchinson` names a nested estimator, `inner.num_probes=4` is an option of that.
        known: Classes by name, for nested estimators.
        base: An instance whose values stand where nothing is given; None: the defaults.

    Returns:
        An instance.

    Raises:
        InvalidArgument: If an option is not known or lacks, or a value is not allowed.
        CurvkitError: If a nested estimator cannot be imported.

    Example:
        >>> from curvkit.estimators import Fisher
        >>> made("fisher", Fisher, {"num_samples": "4"}, known={})
        Fisher(num_samples=4)
    """
    hints, fields = _hints(kind), {field.name: field for field in _fields(kind)}
    plain = {key: text for key, text in given.items() if "." not in key}
    nested = _nested(name, given, kind, hints)
    values: dict[str, Any] = {}
    for key in (key for key in fields if key in plain or key in nested):
        hint, text = hints[key], plain.get(key)
        none = text is not None and text.lower() == "none" and types.NoneType in parts(hint) and key not in nested
        if estimators(hint) and not none:
            before = getattr(base, key) if base is not None else _default(fields[key])
            values[key] = _made_inside((name, key), hint, text, nested.get(key, {}), known, before)
        else:
            values[key] = _value(name, key, plain[key], hint)
    missing = [key for key, field in fields.items() if base is None and _required(field) and key not in values]
    if missing:
        raise InvalidArgument(f"estimator {name}: lacks {', '.join(map(repr, missing))}. It takes {_listed(kind)}.")
    try:
        return kind(**values) if base is None else dataclasses.replace(base, **values)
    except CurvkitError:
        raise
    except (TypeError, ValueError) as error:  # how a stranger's class refuses a value
        raise InvalidArgument(f"estimator {name}: {error}. It takes {_listed(kind)}.") from error


def _nested(
    name: str, given: Mapping[str, str], kind: type[Any], hints: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """Options of nested estimators, by the option that holds them; every name in `given` is checked."""
    found: dict[str, dict[str, str]] = {}
    for key, text in given.items():
        head, dot, tail = key.partition(".")
        known = [field.name for field in _fields(kind)]
        if head not in known:
            close = difflib.get_close_matches(head, known, 1)
            near = f", nearest: {close[0]!r}" if close else ""
            raise InvalidArgument(f"estimator {name}: no option {head!r}{near}. It takes {_listed(kind)}.")
        if dot and not estimators(hints[head]):
            raise InvalidArgument(
                f"estimator {name}: {key}={text!r}, but {head!r} has no options of its own. It is {allowed(hints[head])}."
            )
        if dot:
            found.setdefault(head, {})[tail] = text
    return found


def _made_inside(
    place: tuple[str, str],
    hint: Any,
    text: str | None,
    given: Mapping[str, str],
    known: Mapping[str, type[Any]],
    before: Any,
) -> Any:
    """An estimator that is the value of an option; `place` is the estimator that has it, and its name."""
    name, key = place
    if text is None:
        if before is None or before is dataclasses.MISSING:
            raise InvalidArgument(
                f"estimator {name}: {key}.{next(iter(given))} is an option of {key!r}, which is not given. Say which it is, as "
                f"{key}=hutchinson."
            )
        return made(f"{name}, {key}", type(before), given, known, before)
    inner = known[text]
    if not takes(hint, inner):
        fitting = listed(other for other in known if takes(hint, known[other]))
        raise InvalidArgument(f"estimator {name}: {key}={text!r} does not fit. It must be {fitting or allowed(hint)}.")
    return made(text, inner, given, known)


def _value(name: str, key: str, text: str, hint: Any) -> Any:
    kinds = readers(hint)
    for reader in kinds:
        try:
            return reader.read(text.strip())
        except ValueError:
            continue
    if not kinds:
        raise InvalidArgument(
            f"estimator {name}: {key}={text!r} cannot be given as text ({allowed(hint)}). Use the estimator from Python."
        )
    raise InvalidArgument(f"estimator {name}: {key}={text!r} must be {allowed(hint)}.")


def _fields(kind: type[Any]) -> list[dataclasses.Field[Any]]:
    """Those that `__init__` takes and `repr` shows: options, not data."""
    return [field for field in dataclasses.fields(kind) if field.init and field.repr]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _hints(kind: type[Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except Exception as error:  # whatever evaluating a stranger's annotation raises
        raise InvalidArgument(
            f"the estimator {kind.__name__}: its annotations cannot be evaluated ({type(error).__name__}: {error}). Import what they "
            "name at the top of its module, outside of TYPE_CHECKING."
        ) from error


def _listed(kind: type[Any]) -> str:
    return ", ".join(map(str, options(kind))) or "no options"
