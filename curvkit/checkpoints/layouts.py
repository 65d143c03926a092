"""What the parts of a checkpoint mean: which of them are the weights, the optimizer's state, the step, and who wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvkit.checkpoints.candidates import Candidates, located
from curvkit.checkpoints.command_lines import quoted
from curvkit.checkpoints.learning_rates import schedule_entry
from curvkit.checkpoints.names import clean
from curvkit.checkpoints.pickle_values import Made
from curvkit.checkpoints.printable import printable, printable_key
from curvkit.checkpoints.quantised import ADVICE, quantised_name
from curvkit.checkpoints.stored import StoredTensor
from curvkit.checkpoints.training_entries import OPTIMIZER_KEYS, is_optimizer_state, optimizer_entry, step_entry
from curvkit.checkpoints.writers import writer
from curvkit.errors import InvalidArgument, RefusedCheckpoint, UnknownObjective

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net", "weights", "params")
"""Under which key a training dict holds the weights, in order of preference."""
COUNTER = "n_averaged"
"""Of torch.optim.swa_utils.AveragedModel."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The parts of a checkpoint, with live tensors or with `StoredTensor`s, as the content had.

    Its fields are those of `Checkpoint`; the step may still be a tensor.
    """

    kind: str
    weights: dict[str, Any]
    optimizer: Mapping[str, Any] | None = None
    step: Any = None
    recipe: Mapping[str, Any] | None = None
    keys: tuple[str, ...] = ()
    weight_keys: tuple[str, ...] = ()
    optimizer_names: list[list[str]] | None = None
    removed: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    optimizer_said: str | None = None
    schedule: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def interpret(
    path: Path, content: Any, *, key: str | None = None, ema: bool = False, tensor: type[Any] = StoredTensor
) -> Layout:
    """Find weights, optimizer and step in what a file holds.

    Args:
        path: For messages.
        content: A state dict, or a dict, list or tuple that has one in it.
        key: Dotted path to the weights, where there are several models; also the first part of names, as "generator".
        ema: Take the averaged weights instead of the raw ones.
        tensor: What a tensor is: `torch.Tensor`, or `StoredTensor` for an outline.

    Returns:
        The parts, with clean names.

    Raises:
        RefusedCheckpoint: If there are no weights, or quantised ones, or those of one process among several.
        UnknownObjective: If there are several models and none was asked for.
        InvalidArgument: If what was asked for is not there.

    Cost: linear in the number of tensors; no number is read.

    Example:
        >>> w = StoredTensor((2,), "float32", "0", 0, (1,), 2)
        >>> found = interpret(Path("a.pt"), {"model": {"module.w": w}, "step": 3})
        >>> found.kind, list(found.weights), found.removed, found.step
        ('training dict', ['w'], ('module.',), 3)
    """
    if isinstance(content, list | tuple):
        content = {str(index): value for index, value in enumerate(content)}
    if not isinstance(content, Mapping):
        what = content.full if isinstance(content, Made) and content.full else _word(content)
        raise RefusedCheckpoint(
            f"{path}: holds a {what}, not a state dict. Save the weights: torch.save(model.state_dict(), path)."
        )
    found = Candidates.of(content, tensor, WEIGHT_KEYS)
    if key is not None:
        chosen, state = located(path, content, key, found, tensor)
    elif ema:
        chosen, state = _averaged(path, found, content, tensor)
    else:
        chosen, state = _raw(path, found, content)
    notes: list[str] = []
    weights = {name: value for name, value in state.items() if isinstance(value, tensor) and isinstance(name, str)}
    averaged = COUNTER in weights and all(name == COUNTER or name.startswith("module.") for name in weights)
    if averaged:
        del weights[COUNTER]
    if not weights:
        raise RefusedCheckpoint(f"{path}: {chosen or 'the file'} holds no tensor by name. {_keys(content)}")
    _refuse_kinds(path, weights)
    mapping, removed = clean(weights)
    parent = _parent(content, chosen)
    own = content.get("curvkit")
    own = own if isinstance(own, Mapping) else {}
    default = key is None or key == found.default
    alone = all(name == chosen for name in found.raw if name.startswith(f"{chosen.rpartition('.')[0]}."))
    places = (parent, content) if default else (parent,) if parent is not content and alone else ()
    optimizer = optimizer_entry(places, notes)
    if (
        optimizer is None
        and not default
        and any(name in place for place in (parent, content) for name in OPTIMIZER_KEYS)
    ):
        notes.append(f"the optimizer's state in the file was not taken: nothing says that it belongs to {key!r}")
    if (ema or found.is_averaged(chosen)) and optimizer is not None:
        notes.append("averaged weights; the optimizer's state belongs to the raw ones")
        optimizer = None
    if chosen and key is None and chosen not in WEIGHT_KEYS:
        notes.append(f"the weights are those under {chosen!r}")
    recipe, said = own.get("recipe"), own.get("optimizer")
    kind, config = writer(content, own, chosen, averaged)
    others = (
        (chosen, *(name for name in found.raw if name != chosen)) if chosen and not found.is_averaged(chosen) else ()
    )
    return Layout(
        kind,
        {mapping[name]: value for name, value in weights.items()},
        optimizer,
        step_entry((parent, content), tensor),
        recipe if isinstance(recipe, Mapping) else None,
        tuple(map(printable_key, content)) if chosen else (),
        others,
        _clean_names(own.get("optimizer_names"), mapping) if default else None,
        removed,
        found.variants(chosen),
        config,
        said if isinstance(said, str) and optimizer is not None else None,
        schedule_entry((parent, content), kind) if optimizer is not None else None,
        tuple(notes),
    )


def _raw(path: Path, found: Candidates, content: Mapping[Any, Any]) -> tuple[str, Mapping[Any, Any]]:
    if found.whole is not None:
        return "", found.whole
    if is_optimizer_state(content):
        raise RefusedCheckpoint(
            f"{path}: holds the state of an optimizer, and no weights. Pass the file that has the weights, or save both in one: "
            "torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, path)."
        )
    if found.default is not None:
        return found.default, {**found.raw, **found.averaged}[found.default]
    if found.raw:
        shown = ", ".join(map(printable, list(found.raw)[:6])) + (" ..." if len(found.raw) > 6 else "")
        raise UnknownObjective(
            f"{path}: holds several models, and none of them is under a usual key: {shown}. "
            f"Say which one is meant, for example --key {_typed(found.raw)}"
        )
    raise RefusedCheckpoint(
        f"{path}: no state dict found. {_keys(content)} The weights are looked for under {', '.join(WEIGHT_KEYS)}. "
        "Save them as torch tensors by name: torch.save({'model': model.state_dict()}, path)."
    )


def _averaged(
    path: Path, found: Candidates, content: Mapping[Any, Any], tensor: type[Any]
) -> tuple[str, Mapping[Any, Any]]:
    if len(found.averaged) == 1:
        return next(iter(found.averaged.items()))
    if found.averaged:
        raise UnknownObjective(
            f"{path}: holds several sets of averaged weights: {', '.join(map(printable, found.averaged))}. "
            f"Say which one is meant, for example --key {_typed(found.averaged)}"
        )
    if found.whole is not None and isinstance(found.whole.get(COUNTER), tensor):
        return "", found.whole
    raise InvalidArgument(f"--ema: {path} has no averaged weights. {_keys(content)} Leave --ema out.")


def _parent(content: Mapping[Any, Any], chosen: str) -> Mapping[Any, Any]:
    """The dict beside whose weights lie the optimizer and the step that belong to them."""
    parent: Any = content
    for part in chosen.split(".")[:-1]:
        parent = parent.get(part) if isinstance(parent, Mapping) else None
    return parent if isinstance(parent, Mapping) else content


def _refuse_kinds(path: Path, weights: Mapping[str, Any]) -> None:
    quantised = quantised_name(weights)
    if quantised is not None:
        raise RefusedCheckpoint(f"{path}: the weights are quantised ({printable(quantised)!r}). {ADVICE}")
    flat = next((name for name in weights if name.rpartition(".")[2] in ("_flat_param", "flat_param")), None)
    if flat is not None:
        raise RefusedCheckpoint(
            f"{path}: the part that one process of FSDP held ({printable(flat)!r}), not a model. "
            "Save with StateDictType.FULL_STATE_DICT, or pass the directory of torch.distributed.checkpoint."
        )


def _clean_names(names: Any, mapping: Mapping[str, str]) -> list[list[str]] | None:
    """Names of parameters per group, as the weights have them now."""
    if not isinstance(names, list) or not all(isinstance(group, list) for group in names):
        return None
    if not all(isinstance(name, str) for group in names for name in group):
        return None
    return [[mapping.get(name, name) for name in group] for group in names]


def _keys(content: Mapping[Any, Any]) -> str:
    return f"Its keys are: {', '.join(map(printable_key, list(content)[:8])) or 'none'}."


def _typed(found: Mapping[str, Any]) -> str:
    """The first key as it is typed."""
    return quoted(printable(next(iter(found))))


def _word(content: Any) -> str:
    return "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
