"""What lies at a path, from its headers alone: answered at once, whatever its size, without torch and without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from curvkit.checkpoints import adapters, distributed, hugging_face, safetensors_file
from curvkit.checkpoints.allowed import WIDTHS, explained, harmless, refused
from curvkit.checkpoints.description import Description
from curvkit.checkpoints.detection import CODE, Detected, detect
from curvkit.checkpoints.layouts import Layout, interpret
from curvkit.checkpoints.names import clean
from curvkit.checkpoints.optimizer_summary import OptimizerSummary, optimizer_summary
from curvkit.checkpoints.places import check_places, tied
from curvkit.checkpoints.skeleton import Skeleton, opened
from curvkit.checkpoints.stored import StoredTensor, dense
from curvkit.checkpoints.tensor_groups import TensorGroup, group_of, groups_of
from curvkit.errors import CurvkitError, InvalidArgument, RefusedCheckpoint

SAVE = "Save the weights where the file was made: torch.save(model.state_dict(), path)."


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Args:
        path: Where it lies.
        kind: In words.
        bytes: Of the file, or of all files that would be read.
        checksum: What protects its numbers against damage, in words. Inspecting does not verify it; reading does.
        groups: Parts with tensors in them.
        refused_globals: Names that the file refers to and that would have to be imported; empty if it is safe to load.
        refusal: Why it is not read when it is measured, and what to do; None if it is.
        optimizer: What its state says.
        step: Of training.
        removed_prefixes: Of wrappers, taken from the names of the weights.
        recipe: How its objective is rebuilt, in words; None if it has no recipe.
        tied: Names of weights that are the same numbers.
        keys: Top-level keys of a training dict.
        weight_keys: Those that hold weights, the one that is taken first.
        variants: Other sets of weights that could be taken, such as "ema".
        notes: What a reader should know.
    """

    path: Path
    kind: str
    bytes: int
    checksum: str
    groups: tuple[TensorGroup, ...] = ()
    refused_globals: tuple[str, ...] = ()
    refusal: str | None = None
    optimizer: OptimizerSummary | None = None
    step: int | None = None
    removed_prefixes: tuple[str, ...] = ()
    recipe: str | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    keys: tuple[str, ...] = ()
    weight_keys: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plain form, for JSON.

        Returns:
            Names and plain values, in the order of the fields.
        """
        return {**asdict(self), "path": str(self.path)}


def inspect(path: Path, *, key: str | None = None, ema: bool = False) -> Inspection:
    """Say what lies at a path.

    Args:
        path: A file, or the directory of a checkpoint.
        key: Dotted path to the weights, as of `read`.
        ema: Look at the averaged weights.

    Returns:
        What its headers say. A file that would be refused for what it refers to is described as far as that can be done safely.

    Raises:
        RefusedCheckpoint: If it is damaged, or nothing that is known.
        InvalidArgument: If `key` or `ema` ask for what is not there.

    Cost: headers are read, and no numbers; torch is not imported.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "ckpt.pt"
        >>> torch.save({"model": {"module.w": torch.ones(3)}, "step": 4}, path)
        >>> found = inspect(path)
        >>> found.kind, found.groups[0].numbers, found.removed_prefixes, found.step
        ('training dict', 3, ('module.',), 4)
    """
    found = detect(path)
    if found.kind == "torch zip" or found.kind == "torch legacy":
        with opened(path) as skeleton:
            return _torch_file(found, skeleton, key, ema)
    if found.kind in CODE:
        kind = CODE[found.kind].removeprefix("a ").removesuffix(" file")
        why = f"{CODE[found.kind]} is code, which is loaded with --trust alone"
        return Inspection(path, kind, found.bytes, "CRC-32 of every record", refusal=f"{why}. {SAVE}")
    if found.kind == "safetensors":
        header = safetensors_file.header(path)
        tensors = _as_stored(header.tensors)
        layout = interpret(path, tensors, key=key, ema=ema)
        notes = (f"written by {header.metadata['format']}",) if header.metadata.get("format") else ()
        described = Inspection(
            path, "safetensors file", found.bytes, f"none: {safetensors_file.NO_CHECKSUM}", notes=notes
        )
        return _with_layout(described, layout, (group_of("model", layout.weights),), "safetensors file")
    if (key is not None or ema) and found.kind != "distributed":
        raise InvalidArgument(f"{'--ema' if ema else f'--key {key}'}: {path} holds one model. Leave it out.")
    describe = {"adapter": adapters.describe_adapter, "distributed": distributed.describe}
    return _described(describe.get(found.kind, hugging_face.describe)(found.path))


def _torch_file(found: Detected, skeleton: Skeleton, key: str | None, ema: bool) -> Inspection:
    path, names = found.path, refused(skeleton.globals)
    checksum = skeleton.file.checksum
    described = Inspection(
        path,
        "legacy file of torch" if found.kind == "torch legacy" else "file of torch.save",
        found.bytes,
        checksum or f"none: {skeleton.notes[0]}",
        groups_of(skeleton.content),
        names,
    )
    if names:
        known = explained(names)
        shown = ", ".join(map(harmless, names[:5])) + (" ..." if len(names) > 5 else "")
        what = (
            f"it holds {known}." if known else f"it refers to {shown}, which loading would import and could run. {SAVE}"
        )
        module = any(".nn.modules." in name for name in names)
        return replace(described, kind="pickled model" if module else described.kind, refusal=what)
    try:
        layout = interpret(path, skeleton.content, key=key, ema=ema)
        check_places(path, layout.weights, layout.optimizer)
    except InvalidArgument:
        raise
    except CurvkitError as error:  # what is there can be shown all the same
        return replace(described, refusal=str(error).removeprefix(f"{path}: "))
    described = _with_layout(described, layout, described.groups, layout.kind)
    legacy = ("written by a torch before 1.6",) if found.kind == "torch legacy" else ()
    scalar = _scalars(skeleton)
    own = skeleton.content.get("curvkit") if isinstance(skeleton.content, Mapping) else None
    name = own.get("optimizer") if isinstance(own, Mapping) else None
    step = layout.step if isinstance(layout.step, int) else scalar(layout.step)
    return replace(
        described,
        optimizer=optimizer_summary(layout.optimizer, name if isinstance(name, str) else None, scalar),
        step=int(step) if step is not None else None,
        notes=(*described.notes, *legacy),
    )


def _with_layout(described: Inspection, layout: Layout, groups: tuple[TensorGroup, ...], kind: str) -> Inspection:
    return replace(
        described,
        kind=kind,
        groups=groups,
        removed_prefixes=layout.removed,
        recipe=_recipe(layout.recipe),
        tied=tuple(tied(layout.weights)),
        keys=layout.keys,
        weight_keys=layout.weight_keys,
        variants=layout.variants,
        notes=(*described.notes, *layout.notes),
    )


def _scalars(skeleton: Skeleton) -> Any:
    """Reads single numbers: a learning rate or a step that was saved as a tensor."""

    def scalar(value: Any) -> float | int | None:
        if isinstance(value, int | float):
            return value
        if not isinstance(value, StoredTensor) or value.numel != 1 or skeleton.sizes[value.storage_key] > 4096:
            return None
        return skeleton.file.number(value)

    return scalar


def _described(found: Description) -> Inspection:
    """Of a directory, in terms of an inspection; files of torch.save in it are looked at in turn."""
    groups = [group_of(name, _as_stored(tensors)) for name, tensors in found.groups.items()]
    names: set[str] = set()
    weights = {name: stored for tensors in list(found.groups.values())[:1] for name, stored in tensors.items()}
    removed = clean(weights)[1]
    refusal = found.refusal
    for file in found.torch_files:
        with opened(file) as skeleton:
            names |= skeleton.globals
            refusal = refusal or _claims(file, skeleton.content)
            groups += [replace(group, name="model") for group in groups_of(skeleton.content)]
    optimizer, notes = None, found.notes
    if found.optimizer_file is not None:
        with opened(found.optimizer_file) as skeleton:
            beyond = refused(skeleton.globals)
            if beyond:
                notes = (*notes, f"{found.optimizer_file.name} {_refers(beyond)}; it is not read without trust")
            refusal = refusal or _claims(found.optimizer_file, skeleton.content)
            content = skeleton.content if isinstance(skeleton.content, Mapping) else {}
            optimizer = optimizer_summary(content, None, _scalars(skeleton))
            groups += [replace(group, name="optimizer") for group in groups_of({"optimizer": content})]
    bad = refused(names)
    return Inspection(
        found.path,
        found.kind,
        found.bytes,
        found.checksum,
        _joined(groups),
        bad,
        f"it {_refers(bad)}. {SAVE}" if bad else refusal,
        optimizer,
        found.step,
        removed,
        notes=notes,
    )


def _claims(path: Path, content: Any) -> str | None:
    """Why a file would fill the memory; None if it would not."""
    named = content if isinstance(content, Mapping) else {}
    try:
        check_places(path, {str(n): t for n, t in named.items() if isinstance(t, StoredTensor)}, content)
    except RefusedCheckpoint as error:
        return str(error)
    return None


def _refers(names: tuple[str, ...]) -> str:
    return f"refers to {', '.join(map(harmless, names[:5]))}, which loading would import and could run"


def _joined(groups: list[TensorGroup]) -> tuple[TensorGroup, ...]:
    """Groups of one name, as of several shards, together."""
    joined: dict[str, TensorGroup] = {}
    for group in groups:
        joined[group.name] = joined[group.name].plus(group) if group.name in joined else group
    return tuple(joined.values())


def _as_stored(tensors: Mapping[str, safetensors_file.Stored]) -> dict[str, StoredTensor]:
    return {name: dense(name, t.shape, t.dtype if t.dtype in WIDTHS else "uint8") for name, t in tensors.items()}


def _recipe(recipe: Mapping[str, Any] | None) -> str | None:
    if recipe is None:
        return None
    if isinstance(recipe.get("objective"), str):
        return f"named: {recipe['objective'][:200]}"
    builder, loss = recipe.get("builder"), recipe.get("loss")
    return f"data: {str(builder)[:60]}, {str(loss)[:60]}"
