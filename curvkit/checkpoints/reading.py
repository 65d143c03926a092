"""Read a checkpoint as data: nothing in it runs, and damage is found before it becomes a number."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvkit.checkpoints.allowed import SAFE_GLOBALS
from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.detection import UNREADABLE, Detected, detect
from curvkit.errors import RefusedCheckpoint

WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net", "weights", "params")
"""Under which key a training dict holds the weights, in order of preference."""
STEP_KEYS = ("step", "global_step", "iter_num", "iteration", "epoch")

FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
"""How torch names what it will not load."""


def read(path: Path) -> Checkpoint:
    """Open a checkpoint with `weights_only`, after its checksums.

    Args:
        path: A file that torch.save or curvkit.save wrote: a state dict, or a dict that has one.

    Returns:
        Its contents.

    Raises:
        RefusedCheckpoint: If it is damaged, would run code, or is of a kind that is not read; the text says what to do.

    Cost: two passes over the file.
    """
    found = detect(path)
    _refuse_kind(found)
    if found.kind == "torch zip":
        _verify_archive(path)
    return _interpret(path, _load(found))


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


def _refuse_kind(found: Detected) -> None:
    save = "Save the weights instead: torch.save(model.state_dict(), path)."
    advice = {
        "torchscript": ("a TorchScript file", f"TorchScript is code. {save}"),
        "exported program": ("a program of torch.export", f"It is code. {save}"),
        "safetensors": (
            "a safetensors file",
            "This version reads files of torch.save. Convert it: torch.save(safetensors.torch.load_file(path), 'weights.pt').",
        ),
        "directory": ("a directory", "This version reads files of torch.save. Pass the file that holds the weights."),
    }
    if found.kind in advice:
        what, next_step = advice[found.kind]
        raise RefusedCheckpoint(f"{found.path}: {what}, which is not read. {next_step}")


def _verify_archive(path: Path) -> None:
    """Check every record's CRC, which torch does not, and that none is compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise RefusedCheckpoint(
                        f"{path}: the record {record.filename!r} is compressed, which torch.save never does: it could expand to any size. "
                        "Write the checkpoint again with torch.save."
                    )
            damaged = archive.testzip()
    except UNREADABLE as error:
        raise RefusedCheckpoint(
            f"{path}: the archive is damaged ({error}). Take another copy or an earlier checkpoint."
        ) from error
    if damaged is not None:
        raise RefusedCheckpoint(
            f"{path}: the record {damaged!r} does not match its checksum: the file was damaged after it was written. "
            "Take another copy or an earlier checkpoint."
        )


def _load(found: Detected) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_GLOBALS):
            warnings.simplefilter("ignore")
            return torch.load(found.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedCheckpoint(_unsafe(found, error)) from error
    except Exception as error:  # a damaged pickle can end in any of them
        raise RefusedCheckpoint(
            f"{found.path}: the file is damaged ({_reason(error)}). Take another copy or an earlier checkpoint."
        ) from error


def _reason(error: Exception) -> str:
    """The first line that says something."""
    lines = str(error).split("WeightsUnpickler error:")[-1].splitlines()
    return next((line.strip()[:200] for line in lines if line.strip()), type(error).__name__)


def _unsafe(found: Detected, error: Exception) -> str:
    """Why a file is refused, with the names that it refers to; nothing is unpickled to find them."""
    names = set(FORBIDDEN.findall(str(error)))
    if found.kind == "torch zip":
        with contextlib.suppress(Exception), torch.serialization.safe_globals(SAFE_GLOBALS):
            names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(found.path))
    shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
    pickled = any(".nn.modules." in name for name in names)
    kind = "a whole pickled model" if pickled else "more than tensors and plain data"
    what = f"it refers to {shown}, and loading that could run code" if names else _reason(error)
    return (
        f"{found.path}: refused, {kind}: {what}. Nothing was executed. "
        "Save the weights alone where the file was made: torch.save(model.state_dict(), path)."
    )


def _interpret(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise RefusedCheckpoint(
            f"{path}: holds a {type(content).__name__}, not a state dict. Save the weights: torch.save(model.state_dict(), path)."
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return Checkpoint(path, "state dict", _own_tensors(path, content), None, None, None)
    key = next((k for k in WEIGHT_KEYS if _is_state_dict(content.get(k))), None)
    if key is None:
        shown = ", ".join(map(str, list(content)[:8])) or "none"
        raise RefusedCheckpoint(
            f"{path}: no state dict found. Its keys are: {shown}. The weights are looked for under {', '.join(WEIGHT_KEYS)}."
        )
    own = content.get("curvkit")
    own = own if isinstance(own, Mapping) else {}
    step = next((content[k] for k in STEP_KEYS if isinstance(content.get(k), int)), None)
    optimizer = next(
        (content[k] for k in ("optimizer", "optimizer_state_dict", "optim") if isinstance(content.get(k), Mapping)),
        None,
    )
    names, recipe = own.get("optimizer_names"), own.get("recipe")
    return Checkpoint(
        path,
        "checkpoint of curvkit.save" if own else "training dict",
        _own_tensors(path, content[key]),
        optimizer,
        step,
        recipe if isinstance(recipe, Mapping) else None,
        tuple(map(str, content)),
        (key, *(str(other) for other in content if other != key and _is_state_dict(content[other]))),
        names if isinstance(names, list) else None,
    )


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and any(isinstance(v, Tensor) for v in value.values())


def _own_tensors(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, each checked against its storage before anything is copied."""
    weights = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module
        if tensor.layout is torch.strided and tensor.numel() * tensor.element_size() > max(
            tensor.untyped_storage().nbytes(), 1
        ):
            raise RefusedCheckpoint(
                f"{path}: the tensor {name!r} claims {tensor.numel():,} elements, but {tensor.untyped_storage().nbytes():,} bytes are "
                "stored. Such a file would fill the memory; write it again with .contiguous() tensors."
            )
        weights[str(name)] = tensor
    return weights
