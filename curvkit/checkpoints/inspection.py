"""What lies at a path, from its headers alone: answered at once, whatever its size, without torch and without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvkit.checkpoints import adapters, distributed, hugging_face, safetensors_file
from curvkit.checkpoints.allowed import explained, refused
from curvkit.checkpoints.candidates import Candidates
from curvkit.checkpoints.command_lines import command_line, weight_options
from curvkit.checkpoints.detection import CODE, Detected, detect
from curvkit.checkpoints.diagonal_files import VALUE, diagonal_in
from curvkit.checkpoints.directory_inspection import as_stored, of_directory, references
from curvkit.checkpoints.inspected import Inspection
from curvkit.checkpoints.layouts import WEIGHT_KEYS, Layout, interpret
from curvkit.checkpoints.loose_files import described_by, part_of
from curvkit.checkpoints.needs import need, next_step
from curvkit.checkpoints.optimizer_summary import optimizer_summary
from curvkit.checkpoints.places import check_places, tied
from curvkit.checkpoints.quantised import quantised_refusal
from curvkit.checkpoints.skeleton import Skeleton, opened
from curvkit.checkpoints.stored import StoredTensor
from curvkit.checkpoints.tensor_groups import group_of, groups_of
from curvkit.errors import CurvkitError, InvalidArgument, UnknownObjective

__all__ = ["Inspection", "inspect"]

SAVE = "Save the weights where the file was made: torch.save(model.state_dict(), path)."


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
        return _safetensors(found, key, ema)
    if (key is not None or ema) and found.kind != "distributed":
        raise InvalidArgument(f"{'--ema' if ema else f'--key {key}'}: {path} holds one model. Leave it out.")
    describe = {"adapter": adapters.describe_adapter, "distributed": distributed.describe}
    return of_directory(describe.get(found.kind, hugging_face.describe)(found.path), weight_options(key, ema))


def _safetensors(found: Detected, key: str | None, ema: bool) -> Inspection:
    header = safetensors_file.header(found.path)
    diagonal = diagonal_in(header.metadata)
    if diagonal is not None:
        stored = as_stored(header.tensors)
        values = {name: tensor for name, tensor in stored.items() if name.startswith(VALUE)}
        others = {name: tensor for name, tensor in stored.items() if name not in values}
        groups = [group_of(name, part) for name, part in (("values", values), ("errors and sums", others)) if part]
        checksum = f"none: {safetensors_file.NO_CHECKSUM}"
        return Inspection(
            found.path, "diagonal of curvkit", found.bytes, checksum, tuple(groups), refusal=f"it holds {diagonal}"
        )
    layout = interpret(found.path, as_stored(header.tensors), key=key, ema=ema)
    notes = (f"written by {header.metadata['format']}",) if header.metadata.get("format") else ()
    checksum = f"none: {safetensors_file.NO_CHECKSUM}"
    described = Inspection(found.path, "safetensors file", found.bytes, checksum, notes=notes)
    described = replace(described, kind="safetensors file", groups=(group_of("model", layout.weights),))
    described = _with_layout(described, layout, weight_options(key, ema))
    part, hint = part_of(found.path), described_by(found.path)
    if part is not None:
        return replace(described, refusal=part, next=command_line("inspect", found.path.parent))
    if hint is not None and described.refusal is None:
        return replace(described, notes=(*described.notes, hint), next=command_line("inspect", found.path.parent))
    return described


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
        what = f"it holds {known}." if known else f"it {references(names)}. {SAVE}"
        module = any(".nn.modules." in name for name in names)
        what += f" If you trust whoever made it: {command_line('init', path, '--trust')}" if module else ""
        return replace(described, kind="pickled model" if module else described.kind, refusal=what)
    try:
        layout = interpret(path, skeleton.content, key=key, ema=ema)
        check_places(path, layout.weights, layout.optimizer)
    except InvalidArgument:
        raise
    except CurvkitError as error:  # what is there can be shown all the same
        chosen = _first_choice(skeleton.content) if isinstance(error, UnknownObjective) else None
        return replace(
            described,
            refusal=str(error).removeprefix(f"{path}: "),
            next=None if chosen is None else command_line("inspect", path, "--key", chosen),
        )
    described = _with_layout(replace(described, kind=layout.kind), layout, weight_options(key, ema))
    legacy = ("written by a torch before 1.6",) if found.kind == "torch legacy" else ()
    step = layout.step if isinstance(layout.step, int) else skeleton.scalar(layout.step)
    return replace(
        described,
        optimizer=optimizer_summary(layout.optimizer, layout.optimizer_said, skeleton.scalar),
        step=int(step) if step is not None else None,
        notes=(*described.notes, *legacy),
    )


def _first_choice(content: Any) -> str | None:
    """One of several sets of weights of which none is the usual one."""
    found = Candidates.of(content, StoredTensor, WEIGHT_KEYS) if isinstance(content, Mapping) else None
    return next(iter({**found.raw, **found.averaged}), None) if found is not None else None


def _with_layout(described: Inspection, layout: Layout, chosen: tuple[str, ...]) -> Inspection:
    refusal, path = quantised_refusal(layout.weights), described.path
    needed = need(described.kind, layout.config, recipe=layout.recipe is not None, places=(path.parent,))
    return replace(
        described,
        refusal=refusal,
        removed_prefixes=layout.removed,
        recipe=_recipe(layout.recipe),
        tied=tuple(tied(layout.weights)),
        keys=layout.keys,
        weight_keys=layout.weight_keys,
        variants=layout.variants,
        notes=(*described.notes, *layout.notes),
        next=next_step(path, needed, *chosen) if refusal is None else None,
    )


def _recipe(recipe: Mapping[str, Any] | None) -> str | None:
    if recipe is None:
        return None
    if isinstance(recipe.get("objective"), str):
        return f"named: {recipe['objective'][:200]}"
    builder, loss = recipe.get("builder"), recipe.get("loss")
    return f"data: {str(builder)[:60]}, {str(loss)[:60]}"
