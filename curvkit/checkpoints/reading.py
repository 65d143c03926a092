"""Read a checkpoint as data: nothing in it runs, and damage is found before it becomes a number."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.command_lines import weight_options
from curvkit.checkpoints.detection import detect
from curvkit.checkpoints.diagonal_files import diagonal_in
from curvkit.checkpoints.layouts import WEIGHT_KEYS, Layout, interpret
from curvkit.checkpoints.live import Materialiser
from curvkit.checkpoints.loose_files import described_by, part_of
from curvkit.checkpoints.places import check_places
from curvkit.checkpoints.skeleton import Skeleton
from curvkit.checkpoints.torch_file import data_of, load
from curvkit.checkpoints.trust import NOTHING, Trust
from curvkit.errors import InvalidArgument, RefusedCheckpoint

__all__ = ["WEIGHT_KEYS", "digest", "load", "read"]


def read(path: Path, *, key: str | None = None, ema: bool = False, trust: Trust = NOTHING) -> Checkpoint:
    """Open a checkpoint of any kind that is read.

    Args:
        path: A file of torch.save or safetensors; or a directory of Hugging Face, of an adapter, or of torch.distributed.checkpoint.
        key: Dotted path to the weights, where a file holds several models.
        ema: Take averaged weights instead of those of the last step.
        trust: What the file may do; nothing by default.

    Returns:
        Its contents.

    Raises:
        RefusedCheckpoint: If it is damaged, would run code, or is of a kind that is not read; the text says what to do.
        UnknownObjective: If it holds several models, and none was asked for.
        InvalidArgument: If `key` or `ema` ask for what is not there.

    Cost: one pass over the file; the memory of weights and optimizer state.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "ckpt.pt"
        >>> torch.save({"model": {"module.w": torch.ones(3)}, "step": 4}, path)
        >>> found = read(path)
        >>> found.kind, list(found.weights), found.step
        ('training dict', ['w'], 4)
    """
    allowed = tuple(word for name in trust.classes for word in ("--allow", name))
    options = (*weight_options(key, ema), *allowed, *(("--trust",) if trust.everything else ()))
    return replace(_read(path, key, ema, trust), options=options)


def _read(path: Path, key: str | None, ema: bool, trust: Trust) -> Checkpoint:
    found = detect(path)
    if found.kind == "safetensors":
        return _safetensors(path, key, ema)
    if found.kind == "Hugging Face directory" or found.kind == "adapter":
        _refuse_choice(path, key, ema)
        return _directory(found.path, found.kind, trust)
    if found.kind == "distributed":
        from curvkit.checkpoints.distributed import read_distributed

        content = read_distributed(found.path)
        return _checkpoint(path, interpret(path, content, key=key, ema=ema, tensor=Tensor), Tensor)
    with data_of(path, trust) as data:
        if not isinstance(data, Skeleton):
            return _checkpoint(path, interpret(path, data, key=key, ema=ema, tensor=Tensor), Tensor)
        layout = interpret(path, data.content, key=key, ema=ema)
        check_places(path, layout.weights, layout.optimizer)
        live = Materialiser(str(path), data.sizes, data.file).live
        checkpoint = _made(path, layout, live, data.notes)
        data.file.verify()
        return checkpoint


def digest(path: Path) -> str:
    """Identify a file by its size and its first and last MiB.

    Args:
        path: A file.

    Returns:
        "sha256-ends:" and 16 hexadecimal digits.
    """
    size, sha = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        sha.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        sha.update(file.read(1 << 20))
    sha.update(str(size).encode())
    return f"sha256-ends:{sha.hexdigest()[:16]}"


def _checkpoint(path: Path, layout: Layout, tensor: type[Any]) -> Checkpoint:
    check_places(path, layout.weights, layout.optimizer, tensor)
    return _made(path, layout, lambda value: value, ())


def _made(path: Path, layout: Layout, live: Any, notes: tuple[str, ...]) -> Checkpoint:
    step = live(layout.step)
    return Checkpoint(
        path,
        layout.kind,
        live(layout.weights),
        live(layout.optimizer),
        int(step) if isinstance(step, Tensor) else step,
        live(layout.recipe),
        layout.keys,
        layout.weight_keys,
        layout.optimizer_names,
        layout.removed,
        layout.variants,
        live(layout.config),
        notes=(*layout.notes, *notes),
        optimizer_said=layout.optimizer_said,
        schedule=live(layout.schedule),
    )


def _refuse_choice(path: Path, key: str | None, ema: bool) -> None:
    if key is not None or ema:
        given = f"--key {key}" if key is not None else "--ema"
        raise InvalidArgument(
            f"{given}: {path} holds one model, and no averages beside it. Leave {given.split()[0]} out."
        )


def _directory(path: Path, kind: str, trust: Trust) -> Checkpoint:
    trusting = functools.partial(load, trust=trust)
    if kind == "adapter":
        from curvkit.checkpoints.adapters import read_adapter

        return read_adapter(path, load=trusting)
    from curvkit.checkpoints.hugging_face import read_directory

    return read_directory(path, load=trusting, trust=trust)


def _safetensors(path: Path, key: str | None, ema: bool) -> Checkpoint:
    from curvkit.checkpoints.safetensors_file import NO_CHECKSUM, header, read_tensors

    part, diagonal = part_of(path), diagonal_in(header(path).metadata)
    if part is not None:
        raise RefusedCheckpoint(f"{path}: {part}")
    if diagonal is not None:
        raise RefusedCheckpoint(f"{path}: it holds {diagonal}.")
    layout = interpret(path, read_tensors(path), key=key, ema=ema, tensor=Tensor)
    hint = described_by(path)
    made = _checkpoint(path, layout, Tensor)
    return Checkpoint(
        path,
        "safetensors file",
        made.weights,
        None,
        None,
        None,
        removed=made.removed,
        variants=made.variants,
        notes=(*made.notes, NO_CHECKSUM, *((hint,) if hint is not None else ())),
    )
