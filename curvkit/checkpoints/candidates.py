"""Sets of weights in what a file holds: which there are, which is meant when nothing is said, which are averages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkit.checkpoints.command_lines import quoted
from curvkit.checkpoints.printable import printable
from curvkit.errors import InvalidArgument

AVERAGED = re.compile(r"(^|[_.\-])(ema|swa|average|averaged|averaging|avg|polyak|shadow)([_.\-]|$)", re.IGNORECASE)
"""In the key of weights that were averaged over training."""
NOT_MODELS = re.compile(
    r"optim|(^|_)opt(_|$)|sched|rng|random|scaler|callback|loop|metric|batch|history", re.IGNORECASE
)
"""In keys of what has tensors by name but is no model."""
DEEPEST = 3
MOST = 2000
"""Dicts that are looked at."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The sets of weights in a file, by dotted key.

    Args:
        whole: The content itself, if it is a state dict.
        raw: Of the last step.
        averaged: Of several steps: EMA, SWA.
        default: The key that is meant when nothing is said; None if that is not known.
    """

    whole: Mapping[Any, Any] | None
    raw: Mapping[str, Mapping[Any, Any]]
    averaged: Mapping[str, Mapping[Any, Any]]
    default: str | None

    @classmethod
    def of(cls, content: Mapping[Any, Any], tensor: type[Any], usual: tuple[str, ...]) -> Candidates:
        """Look for them.

        Args:
            content: Of the file.
            tensor: What a tensor is.
            usual: Keys under which weights usually are, in order of preference.

        Returns:
            What there is.

        Cost: linear in the number of entries of the outer dicts.
        """
        if is_state_dict(content, tensor) and all(
            isinstance(value, tensor) or str(name).endswith("_extra_state") for name, value in content.items()
        ):
            return cls(content, {}, {}, None)
        found = {name: state for name, state in _search(content, tensor, usual)}
        averaged = {name: state for name, state in found.items() if AVERAGED.search(name)}
        if "current_model_state" in found and "state_dict" in found:  # Lightning's WeightAveraging swaps them
            averaged["state_dict"] = found["state_dict"]
        raw = {name: state for name, state in found.items() if name not in averaged}
        return cls(None, raw, averaged, _default(raw, averaged, usual))

    def is_averaged(self, key: str) -> bool:
        """Whether weights are averages.

        Args:
            key: Of them.

        Returns:
            What their key says.
        """
        return key in self.averaged

    def variants(self, chosen: str) -> tuple[str, ...]:
        """What else could have been taken.

        Args:
            chosen: Key of what was taken.

        Returns:
            "ema" or "raw".
        """
        if self.is_averaged(chosen):
            return ("raw",) if self.raw else ()
        return ("ema",) if self.averaged else ()


def is_state_dict(value: Any, tensor: type[Any]) -> bool:
    """Whether something holds tensors by name.

    Args:
        value: Part of a content.
        tensor: What a tensor is.

    Returns:
        True for a dict with at least one tensor, all of whose keys are text.
    """
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, tensor) for item in value.values())
        and all(isinstance(name, str) for name in value)
    )


def located(
    path: Path, content: Mapping[Any, Any], key: str, found: Candidates, tensor: type[Any]
) -> tuple[str, Mapping[Any, Any]]:
    """Follow a dotted key.

    Args:
        path: For messages.
        content: Of the file.
        key: As typed: keys joined by dots; or the first part of the names in the state dict that is meant by default.
        found: The sets of weights that there are.
        tensor: What a tensor is.

    Returns:
        The key of the weights, and the weights.

    Raises:
        InvalidArgument: If there are none.
    """
    value = _followed(content, key)
    if is_state_dict(value, tensor):
        return key, value
    if isinstance(value, Mapping):
        inner = Candidates.of(value, tensor, ("model", "state_dict", "model_state_dict", "module", "net", "weights"))
        if inner.default is not None:
            return f"{key}.{inner.default}", {**inner.raw, **inner.averaged}[inner.default]
    default = found.whole if found.whole is not None else found.raw.get(found.default or "")
    if default is not None:
        start = f"{key}."
        inside = {name.removeprefix(start): item for name, item in default.items() if str(name).startswith(start)}
        if inside:
            return key, inside
    typed = f"--key {quoted(key)}"
    if found.whole is not None:
        parts = list(dict.fromkeys(str(name).partition(".")[0] for name in found.whole if "." in str(name)))
        of_part = f", or take a part of it, by how its names begin: {_listed(parts)}" if parts else ""
        raise InvalidArgument(
            f"{typed}: {path} is one state dict, with nothing under that name. Leave --key out{of_part}."
        )
    raise InvalidArgument(
        f"{typed}: {path} has no weights under that key. There are: {_listed([*found.raw, *found.averaged])}."
    )


def _listed(names: list[str]) -> str:
    return (", ".join(printable(name, 80) for name in names[:8]) or "none") + (" ..." if len(names) > 8 else "")


def _followed(content: Any, key: str) -> Any:
    """The value under a dotted key, whose parts may themselves have dots."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    position = key.find(".")
    while position >= 0:
        if key[:position] in content:
            value = _followed(content[key[:position]], key[position + 1 :])
            if value is not None:
                return value
        position = key.find(".", position + 1)
    return None


def _search(
    content: Mapping[Any, Any], tensor: type[Any], usual: tuple[str, ...]
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    opened = {id(content)}
    known: dict[int, tuple[bool, bool]] = {}  # a dict may be there under many names
    for depth in range(DEEPEST):
        deeper: list[tuple[str, Mapping[Any, Any]]] = []
        for path, parent in level:
            for name, value in parent.items():
                if not isinstance(value, Mapping) or not isinstance(name, str) or "param_groups" in value:
                    continue
                if NOT_MODELS.search(name) or name == "curvkit":
                    continue
                if id(value) not in known:
                    known[id(value)] = is_state_dict(value, tensor), _has_weights(value, tensor)
                has_tensors, has_weights = known[id(value)]
                if not has_tensors:
                    if id(value) not in opened and len(opened) < MOST:
                        opened.add(id(value))
                        deeper.append((f"{path}{name}.", value))
                elif (depth == 0 and name in usual) or has_weights:
                    yield f"{path}{name}", value
        level = deeper


def _has_weights(state: Mapping[Any, Any], tensor: type[Any]) -> bool:
    """Floating-point tensors of at least one dimension: no table of single results, no state of a generator."""
    return any(
        isinstance(value, tensor)
        and len(value.shape) > 0
        and str(value.dtype).removeprefix("torch.").startswith(("float", "bfloat", "complex"))
        for value in state.values()
    )


def _default(
    raw: Mapping[str, Mapping[Any, Any]], averaged: Mapping[str, Mapping[Any, Any]], usual: tuple[str, ...]
) -> str | None:
    for name in ("current_model_state", *usual):
        if name in raw:
            return name
    inner = [name for name in raw if name.rpartition(".")[2] in usual]
    if len(inner) == 1 and all(name.startswith(inner[0].rpartition(".")[0]) for name in raw):
        return inner[0]
    if len(raw) == 1:
        return next(iter(raw))
    return next(iter(averaged)) if not raw and len(averaged) == 1 else None
