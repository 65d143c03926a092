"""What is said when the weights of a file and a model do not fit each other."""

from __future__ import annotations

import difflib

from curvkit.checkpoints.names import clean

SHOWN = 5
MOST_COMPARED = 2000
"""Names among which the nearest is looked for."""


def mismatch(
    source: str, missing: list[str], unexpected: list[str], shapes: list[str], num_own: int, num_weights: int
) -> str:
    """Say which names and shapes differ, and what would help.

    Args:
        source: The file.
        missing: Names that only the model has.
        unexpected: Names that only the file has.
        shapes: Lines with a name and both shapes.
        num_own: Tensors in the model.
        num_weights: Tensors in the file.

    Returns:
        Several lines; at most five names of a kind.

    Cost: names are compared with each other, at most a few thousand of them.
    """
    lines = [
        f"{source}: the weights do not fit the model (tensors: {num_weights} in the file, {num_own} in the model)."
    ]
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {word:<12}{', '.join(names[:SHOWN])}{more}")
    for index, shape in enumerate(shapes[:SHOWN]):
        lines.append(f"  {'' if index else 'other shape':<12}{shape}")
    if len(shapes) > SHOWN:
        lines.append(f"  {'':<12}and {len(shapes) - SHOWN} more")
    prefixes = _prefixes(missing, unexpected)
    if len(prefixes) > 1:
        lines.append(
            f"The names fit under each of the prefixes {', '.join(prefixes)}: say which one, with --key {prefixes[0][:-1]}"
        )
        return "\n".join(lines)
    prefix = prefixes[0] if prefixes else _added(missing, unexpected)
    if prefix:
        lines.append(
            f"The names fit without the prefix {prefix!r}: save the state dict of the module that was wrapped."
            if prefixes
            else f"The names of the model have the prefix {prefix!r} more: build the module that it wraps."
        )
        return "\n".join(lines)
    near = [
        (name, close[0])
        for name in missing[:SHOWN]
        if (close := difflib.get_close_matches(name, unexpected[:MOST_COMPARED], 1, 0.7))
    ]
    if near:
        lines.append(f"  {'nearest':<12}{', '.join(f'{a} ~ {b}' for a, b in near)}")
    lines.append("Build the model with the sizes of the run that wrote the file, for example with --set.")
    return "\n".join(lines)


def _prefixes(missing: list[str], unexpected: list[str]) -> list[str]:
    """Beginnings of names in the file under which all that is missing would be found."""
    if not missing:
        return []
    there = set(unexpected)
    starts = [name.removesuffix(missing[0]) for name in unexpected if name.endswith(f".{missing[0]}")]
    return [start for start in starts if all(start + name in there for name in missing)]


def _added(missing: list[str], unexpected: list[str]) -> str:
    """A prefix that only the model has; wrappers apart, which are seen through."""
    if not missing or not unexpected or clean(missing)[1]:
        return ""
    there = set(missing)
    start = next((name.removesuffix(unexpected[0]) for name in missing if name.endswith(f".{unexpected[0]}")), "")
    return start if start and {start + name for name in unexpected} == there else ""
