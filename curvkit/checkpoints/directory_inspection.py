"""What lies in the directory of a checkpoint, in terms of an inspection; files of torch.save in it are looked at in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from curvkit.checkpoints import adapters
from curvkit.checkpoints.allowed import WIDTHS, refused
from curvkit.checkpoints.base_models import base_model
from curvkit.checkpoints.description import Description
from curvkit.checkpoints.documents import document
from curvkit.checkpoints.inspected import Inspection
from curvkit.checkpoints.names import clean
from curvkit.checkpoints.needs import Need, need, next_step
from curvkit.checkpoints.optimizer_summary import OptimizerSummary, optimizer_summary
from curvkit.checkpoints.places import check_places
from curvkit.checkpoints.printable import printable
from curvkit.checkpoints.quantised import quantised_refusal
from curvkit.checkpoints.safetensors_file import NO_CHECKSUM, Stored
from curvkit.checkpoints.skeleton import opened
from curvkit.checkpoints.stored import StoredTensor, dense
from curvkit.checkpoints.tensor_groups import TensorGroup, group_of, groups_of
from curvkit.errors import RefusedCheckpoint

SAVE = "Save the weights again where they were made: model.save_pretrained(path)."


@dataclass
class _Parts:
    """What the files of torch.save in a directory add to its description."""

    weights: dict[str, Any]
    groups: list[TensorGroup]
    notes: list[str]
    refusal: str | None
    names: set[str] = field(default_factory=set)
    optimizer: OptimizerSummary | None = None
    checksum: str | None = None

    def look_at_weights(self, file: Path) -> None:
        with opened(file) as skeleton:
            self.names |= skeleton.globals
            self.refusal = self.refusal or _claims(file, skeleton.content)
            self.groups += [replace(group, name="model") for group in groups_of(skeleton.content)]
            self.checksum = skeleton.file.checksum or f"none: {skeleton.notes[0]}"
            content = skeleton.content if isinstance(skeleton.content, Mapping) else {}
            self.weights |= {str(n): t for n, t in content.items() if isinstance(t, StoredTensor)}

    def look_at_optimizer(self, file: Path) -> None:
        """The weights do not need it: what it is not is a note."""
        try:
            with opened(file) as skeleton:
                beyond = refused(skeleton.globals)
                if beyond:
                    self.notes.append(f"{file.name} {references(beyond)}; it is not read without trust")
                self.refusal = self.refusal or _claims(file, skeleton.content)
                content = skeleton.content if isinstance(skeleton.content, Mapping) else {}
                self.optimizer = optimizer_summary(content, None, skeleton.scalar)
                self.groups += [replace(group, name="optimizer") for group in groups_of({"optimizer": content})]
        except RefusedCheckpoint as error:
            self.refusal = self.refusal or str(error)


def of_directory(found: Description, chosen: tuple[str, ...] = ()) -> Inspection:
    """Put together what a description says and what its files of torch.save hold.

    Args:
        found: Of the directory.
        chosen: What was typed to say which weights are meant.

    Returns:
        The same as of a file.

    Raises:
        RefusedCheckpoint: If a file is damaged.

    Cost: headers are read, and no numbers; torch is not imported.
    """
    groups = [group_of(name, as_stored(tensors)) for name, tensors in found.groups.items()]
    weights: dict[str, Any] = dict(found.groups.get("model") or next(iter(found.groups.values()), {}))
    parts = _Parts(weights, groups, list(found.notes), found.refusal)
    base = None
    if found.kind == adapters.KIND:
        try:
            base, _ = base_model(found.path, found.config or {}, source=str(found.path / adapters.CONFIG))
        except RefusedCheckpoint as error:  # the adapter can be shown all the same
            parts.refusal = parts.refusal or str(error)
    for file in found.torch_files:
        parts.look_at_weights(file)
    if found.optimizer_file is not None:
        parts.look_at_optimizer(found.optimizer_file)
    elif found.optimizer is not None:
        parts.optimizer = optimizer_summary(found.optimizer, None, _plain_number)
    beyond = refused(parts.names)
    refusal = f"it {references(beyond)}. {SAVE}" if beyond else parts.refusal or quantised_refusal(parts.weights)
    checksum = parts.checksum or found.checksum
    return Inspection(
        found.path,
        found.kind,
        found.bytes,
        f"none: {checksum}" if checksum == NO_CHECKSUM else checksum,
        _joined(parts.groups),
        beyond,
        refusal,
        parts.optimizer,
        found.step,
        clean(parts.weights)[1],
        notes=tuple(parts.notes),
        next=next_step(found.path, _need(found, base), *chosen) if refusal is None else None,
    )


def references(names: tuple[str, ...]) -> str:
    """What is said of a file that names what would have to be imported.

    Args:
        names: The names.

    Returns:
        A clause.

    Example:
        >>> references(("train.Config",))
        'refers to train.Config, which loading would import and could run'
    """
    more = " ..." if len(names) > 5 else ""
    return f"refers to {', '.join(map(printable, names[:5]))}{more}, which loading would import and could run"


def as_stored(tensors: Mapping[str, Stored]) -> dict[str, StoredTensor]:
    """Tensors of safetensors headers in the form of an outline.

    Args:
        tensors: By name.

    Returns:
        The same, each with a storage of its own.
    """
    return {name: dense(name, t.shape, t.dtype if t.dtype in WIDTHS else "uint8") for name, t in tensors.items()}


def _need(found: Description, base: Path | None) -> Need:
    if base is None:
        return need(found.kind, found.config, places=(found.path,))
    return need(found.kind, found.config, base=document(base / "config.json"), places=(found.path, base))


def _plain_number(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) else None


def _claims(path: Path, content: Any) -> str | None:
    """Why a file would fill the memory; None if it would not."""
    named = content if isinstance(content, Mapping) else {}
    try:
        check_places(path, {str(n): t for n, t in named.items() if isinstance(t, StoredTensor)}, content)
    except RefusedCheckpoint as error:
        return str(error)
    return None


def _joined(groups: list[TensorGroup]) -> tuple[TensorGroup, ...]:
    """Groups of one name, as of several shards, together."""
    joined: dict[str, TensorGroup] = {}
    for group in groups:
        joined[group.name] = joined[group.name].plus(group) if group.name in joined else group
    return tuple(joined.values())
