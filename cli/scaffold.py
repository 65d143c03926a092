"""The files that `curvkit init` writes: what a checkpoint says of its model, and the places that its owner fills in.

A checkpoint is a stranger's: its names and texts go into Python source only as comments of printable characters, as plain literals, and as
identifiers that hide nothing.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OBJECTIVE, CONFIG, FUNCTION = "curvkit_objective.py", "curvkit.toml", "objective"
MOST_NAMES, MOST_SETTINGS, LONGEST = 40, 16, 120
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
TAKEN = {
    "torch",
    "nn",
    "F",
    "curvkit",
    "token_cross_entropy",
    "make_model",
    "make_data",
    FUNCTION,
    "draw",
    "inputs",
    "targets",
}
"""Names that an argument of the function would hide."""
EMBEDDING = re.compile(r"emb|wte|tok", re.IGNORECASE)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)

TEMPLATE = '''\
"""Which model, loss and data curvkit measures {checkpoint} with.

Fill in make_model() and make_data(), then:  curvkit sharpness {checkpoint}
"""

import torch
import torch.nn.functional as F
from torch import nn

import curvkit
{imports}
{facts}


def make_model({signature}) -> nn.Module:
    """The model that the weights belong to. Its initial weights do not matter: the checkpoint's replace them."""
{suggestion}
    raise NotImplementedError("{file}: make_model() does not return the model yet")


def make_data():
    """The examples that are measured, the same in every run: a list of (inputs, targets), or a DataLoader that does not shuffle."""
    print("{file}: make_data() still returns random numbers: the result says nothing about your data")
    draw = torch.Generator().manual_seed(0)
{data}
    return list(zip(inputs.split(16), targets.split(16)))


@curvkit.objective
def {function}({signature}):
    # Any function of (outputs, targets) does as a loss; use the one of the training run.
    return curvkit.Objective(make_model({call}), {loss}, make_data())
'''

SETTINGS = """\
# How curvkit measures the checkpoints in and below this directory. What is typed wins over what stands here.
objective = "{file}:{function}"

[set]
# Arguments of {function}(), as with --set.{settings}

[defaults]
# Options of every command, as with --seed; of one command under [defaults.sharpness].
# seed = 0
"""


@dataclass(frozen=True)
class Found:
    """What a checkpoint says, as far as it helps to write its objective.

    Args:
        checkpoint: As it was typed.
        summary: One line.
        shapes: Of the weights, by name, in order.
        settings: Hyper-parameters and whatever else the file says of the model.
        optimizer: One line; empty if there is none.
        removed: Prefixes that were taken from the names.
    """

    checkpoint: str
    summary: str
    shapes: Mapping[str, Sequence[int]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = ""
    removed: Sequence[str] = ()


def objective_file(found: Found) -> str:
    """The Python file: a skeleton that runs once make_model() returns the model."""
    arguments = _arguments(found.settings)
    outputs, tokens = _outputs(found.shapes), _takes_tokens(found.shapes)
    return TEMPLATE.format(
        checkpoint=_quotable(found.checkpoint),
        file=OBJECTIVE,
        function=FUNCTION,
        facts="\n".join(f"# {line}".rstrip() for line in _facts(found)),
        signature=", ".join(f"{name}: {type(value).__name__} = {value!r}" for name, value in arguments.items()),
        call=", ".join(arguments),
        suggestion="\n".join(f"    # {line}" for line in _suggestions(found, arguments)),
        data="\n".join(f"    {line}" for line in _data(found.shapes, outputs)),
        imports="from curvkit.losses import token_cross_entropy\n" if tokens else "",
        loss="token_cross_entropy" if tokens else "F.cross_entropy" if outputs > 1 else "F.mse_loss",
    )


def config_file(found: Found) -> str:
    """The configuration beside it."""
    arguments = _arguments(found.settings)
    lines = "".join(f"\n# {name} = {_toml(value)}" for name, value in arguments.items())
    return SETTINGS.format(file=OBJECTIVE, function=FUNCTION, settings=lines)


def printable(text: object, most: int = LONGEST) -> str:
    """A text of a stranger's as part of a comment: one line, no control characters, not endless."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: 4 * most])
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _facts(found: Found) -> Iterator[str]:
    yield f"The checkpoint: {printable(found.summary, 2 * LONGEST)}"
    if found.optimizer:
        yield f"Optimizer: {printable(found.optimizer)}"
    if found.removed:
        yield f"Prefixes taken from the names below: {printable(', '.join(found.removed))}"
    if found.settings:
        yield "What it says of the model:"
        for name, value in list(found.settings.items())[:MOST_NAMES]:
            yield f"    {printable(name, 60)} = {printable(_shown(value))}"
    yield "Its weights:"
    names = list(found.shapes)
    width = min(max((len(printable(name)) for name in names), default=0), 60)
    for name in names[:MOST_NAMES]:
        yield f"    {printable(name):<{width}}  {tuple(found.shapes[name])}"
    if len(names) > MOST_NAMES:
        yield f"    and {len(names) - MOST_NAMES} more: curvkit inspect --plain lists the groups"


def _suggestions(found: Found, arguments: Mapping[str, Any]) -> Iterator[str]:
    """How the model may be made; comments, since nothing that a checkpoint names is imported."""
    named = found.settings.get("_class_path")
    call = ", ".join(f"{name}={name}" for name in arguments)
    if isinstance(named, str) and DOTTED.fullmatch(named):
        module, _, kind = named.rpartition(".")
        yield f"The checkpoint names: from {printable(module)} import {printable(kind)}"
        yield f"return {printable(kind)}({printable(call)})"
    elif isinstance(arch := found.settings.get("arch"), str) and arch.isidentifier():
        yield f'It may be timm: import timm; return timm.create_model("{printable(arch)}", num_classes={_outputs(found.shapes)})'
    else:
        yield f"from train import Net; return Net({printable(call)})"


def _arguments(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Those of the settings that can be arguments of a function, with plain literals as defaults."""
    fit: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if len(fit) == MOST_SETTINGS:
            break
        named = isinstance(name, str) and len(name) <= 40 and IDENTIFIER.fullmatch(name) is not None
        if named and not keyword.iskeyword(name) and name not in TAKEN and _literal(value):
            fit[name] = value
    return fit


def _literal(value: Any) -> bool:
    if type(value) is bool or (type(value) is int and abs(value) < 1 << 63):
        return True
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is str and len(value) <= 60 and value.isascii() and value.isprintable()


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"{len(value)} values"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number of more than 63 bits"
    return repr(value)


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if isinstance(value, str) else repr(value)


def _quotable(text: str) -> str:
    """Within a docstring: nothing that could end it or escape."""
    return printable(text.replace("\\", "/").replace('"', "'"), 2 * LONGEST)


def _matrices(shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    return [(name, shape) for name, shape in shapes.items() if len(shape) >= 2 and 0 not in shape]


def _outputs(shapes: Mapping[str, Sequence[int]]) -> int:
    """Rows of the last matrix: the classes, if it is the last layer."""
    matrices = _matrices(shapes)
    return matrices[-1][1][0] if matrices else 1


def _takes_tokens(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the first matrix looks like an embedding of tokens."""
    first, shape = next(iter(_matrices(shapes)), ("", ()))
    return len(shape) == 2 and EMBEDDING.search(first) is not None


def _data(shapes: Mapping[str, Sequence[int]], outputs: int) -> Iterator[str]:
    """Random inputs and targets of the shapes that the first and the last layer suggest."""
    first, shape = next(iter(_matrices(shapes)), ("", (1, 1)))
    if _takes_tokens(shapes):
        yield f"inputs = torch.randint({shape[0]}, (32, 16), generator=draw)  # guessed from {printable(first, 60)}"
        yield f"targets = torch.randint({shape[0]}, (32, 16), generator=draw)"
        return
    size = {3: ", 64", 4: ", 32, 32", 5: ", 8, 32, 32"}.get(len(shape), "")
    yield f"inputs = torch.randn(32, {shape[1]}{size}, generator=draw)  # guessed from {printable(first or 'nothing', 60)}"
    if outputs > 1:
        yield f"targets = torch.randint({outputs}, (32,), generator=draw)"
    else:
        yield "targets = torch.randn(32, 1, generator=draw)"
