"""Adapters of PEFT: small weights that belong to a base model elsewhere on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvkit.checkpoints import training_state
from curvkit.checkpoints.base_models import FIELD, base_model
from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.confined import confined, shown
from curvkit.checkpoints.description import Description
from curvkit.checkpoints.documents import brief, document
from curvkit.checkpoints.safetensors_file import NO_CHECKSUM, header, read_tensors
from curvkit.checkpoints.shards import Load
from curvkit.errors import RefusedCheckpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "LOHA", "LOKR")
"""Low-rank updates of weight matrices, which is what `peft_type` may say."""
KIND = "PEFT adapter"
IMPORTING = ("megatron_config",)
"""Fields of the configuration that make PEFT import a module which the configuration names."""


def read_adapter(path: Path, *, load: Load | None = None) -> Checkpoint:
    """Read the weights of an adapter and find its base model on this disk.

    Args:
        path: A directory with adapter_config.json and adapter_model.safetensors.
        load: Reads a file of torch.save; without it the optimizer's state is left out.

    Returns:
        Its weights, its configuration, and the directory of its base model.

    Raises:
        RefusedCheckpoint: If the base model is not on this disk, the adapter is not of low rank, or a file is damaged.

    Cost: one pass over the adapter; the base model is not read.
    """
    config = _config(path)
    base, found = base_model(path, config, source=str(path / CONFIG))
    weights = read_tensors(_weights(path))
    _check_names(path, weights)
    optimizer, unread = training_state.optimizer_beside(path, load) if load is not None else (None, ())
    return Checkpoint(
        path,
        KIND,
        weights,
        optimizer,
        training_state.step(path),
        None,
        config=config,
        base=base,
        notes=(found, NO_CHECKSUM, *unread, *_others(path)),
        schedule=training_state.logged_rates(path),
    )


def describe_adapter(path: Path) -> Description:
    """Say what an adapter holds, from its headers; its base model need not be there.

    Args:
        path: As for `read_adapter`.

    Returns:
        Names and shapes.

    Raises:
        RefusedCheckpoint: If the adapter is not of low rank, or a file is damaged.

    Cost: headers are read; torch is not imported.
    """
    config = _config(path)
    found = header(_weights(path))
    _check_names(path, found.tensors)
    state = training_state.optimizer_file(path)
    named = config.get(FIELD)
    return Description(
        path,
        KIND,
        found.bytes + (state.stat().st_size if state else 0),
        NO_CHECKSUM,
        {"adapter": found.tensors},
        optimizer_file=state,
        step=training_state.step(path),
        config=config,
        notes=(f"base model: {named}" if isinstance(named, str) else "the base model is not named", *_others(path)),
    )


def _config(path: Path) -> dict[str, Any]:
    config = document(confined(path, CONFIG, source=str(path)))
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise RefusedCheckpoint(
            f"{path / CONFIG}: peft_type is {brief(kind)}; adapters of the kinds {', '.join(KINDS)} are read. "
            "Merge it into its base (model.merge_and_unload()) and pass the merged model."
        )
    named = [field for field in IMPORTING if config.get(field)]
    if named:
        raise RefusedCheckpoint(
            f"{path / CONFIG}: {named[0]} makes PEFT import the module that the file names. Nothing was imported. "
            "Take the field out if the adapter does not need it."
        )
    return config


def _weights(path: Path) -> Path:
    if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
        raise RefusedCheckpoint(
            f"{path}: the adapter is a pickle (adapter_model.bin), as PEFT wrote before it used safetensors. "
            "Load it with PEFT and write it again with model.save_pretrained(path)."
        )
    return confined(path, WEIGHTS, source=str(path))


def _check_names(path: Path, weights: Mapping[str, Any]) -> None:
    foreign = [name for name in weights if not name.startswith("base_model.model.")]
    if foreign or not weights:
        what = f"the tensor {brief(foreign[0])}" if foreign else "no tensor"
        raise RefusedCheckpoint(
            f"{path / WEIGHTS}: holds {what}; names of an adapter begin with 'base_model.model.'. "
            "Take the directory that model.save_pretrained(path) of PEFT wrote."
        )


def _others(path: Path) -> tuple[str, ...]:
    """A model with several adapters keeps all but "default" in directories of their own."""
    names = sorted(shown(other.parent.name) for other in path.glob(f"*/{CONFIG}"))
    return (f"further adapters lie in {', '.join(names[:5])}; pass that directory to read one",) if names else ()
