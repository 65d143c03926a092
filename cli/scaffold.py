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

from .guesses import LONGEST, Guess, printable

OBJECTIVE, CONFIG, FUNCTION = "curvkit_objective.py", "curvkit.toml", "objective"
MOST_NAMES, MOST_SETTINGS = 40, 16
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
TAKEN = {
    "torch",
    "nn",
    "F",
    "curvkit",
    "token_cross_entropy",
    "make_model",
    "make_data",
    "loss",
    FUNCTION,
    "draw",
    "inputs",
    "targets",
}
"""Names that an argument of the function would hide."""
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
{definition}

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
        architecture: Class of transformers that config.json names; empty if there is none.
        directory: Where that config.json lies.
    """

    checkpoint: str
    summary: str
    shapes: Mapping[str, Sequence[int]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = ""
    removed: Sequence[str] = ()
    architecture: str = ""
    directory: str = ""


def objective_file(found: Found) -> str:
    """The Python file: a skeleton that runs once make_model() returns the model."""
    arguments = _arguments(found.settings)
    guess = Guess.of(found.shapes, found.architecture)
    return TEMPLATE.format(
        checkpoint=_quotable(found.checkpoint),
        file=OBJECTIVE,
        function=FUNCTION,
        facts="\n".join(f"# {line}".rstrip() for line in _facts(found)),
        signature=", ".join(f"{name}: {type(value).__name__} = {value!r}" for name, value in arguments.items()),
        call=", ".join(arguments),
        suggestion="\n".join(f"    # {line}" for line in _suggestions(found, arguments)),
        data="\n".join(f"    {line}" for line in guess.data()),
        imports=f"{guess.imports}\n" if guess.imports else "",
        loss=guess.loss,
        definition=guess.definition,
    )


def config_file(found: Found) -> str:
    """The configuration beside it."""
    arguments = _arguments(found.settings)
    lines = "".join(f"\n# {name} = {_toml(value)}" for name, value in arguments.items())
    return SETTINGS.format(file=OBJECTIVE, function=FUNCTION, settings=lines)


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
    if found.architecture.isidentifier() and found.architecture.isascii():
        kind = printable(found.architecture)
        yield f"from transformers import AutoConfig, {kind}"
        yield f"return {kind}(AutoConfig.from_pretrained({printable(repr(found.directory))}, local_files_only=True))"
        return
    named = found.settings.get("_class_path")
    call = ", ".join(f"{name}={name}" for name in arguments)
    if isinstance(named, str) and DOTTED.fullmatch(named):
        module, _, kind = named.rpartition(".")
        yield f"The checkpoint names: from {printable(module)} import {printable(kind)}"
        yield f"return {printable(kind)}({printable(call)})"
    elif isinstance(arch := found.settings.get("arch"), str) and arch.isidentifier():
        yield f'It may be timm: import timm; return timm.create_model("{printable(arch)}", num_classes={Guess.of(found.shapes).outputs})'
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
