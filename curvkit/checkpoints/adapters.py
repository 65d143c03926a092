"""Adapters of PEFT: small weights that belong to a base model elsewhere on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvkit.checkpoints import training_state
from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.confined import confined, shown
from curvkit.checkpoints.description import Description
from curvkit.checkpoints.documents import brief, document
from curvkit.checkpoints.hub_cache import cached
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
    base = _base(path, config)
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
        notes=(f"base model: {base}", NO_CHECKSUM, *unread, *_others(path)),
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
    named = config.get("base_model_name_or_path")
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


def _base(path: Path, config: Mapping[str, Any]) -> Path:
    """The directory of the base model: a path on this disk, or a name in the cache of downloads."""
    source, named, revision = str(path / CONFIG), config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str) or not named.strip():
        raise RefusedCheckpoint(
            f"{source}: does not say which model the adapter belongs to (base_model_name_or_path). "
            "Write the directory of that model into the file."
        )
    if not named.isprintable() or len(named) > 1000 or "://" in named:
        raise RefusedCheckpoint(
            f"{source}: base_model_name_or_path is {brief(named)}, which is neither a directory nor the name of a model; "
            "nothing is downloaded. Write the directory of the base model into the file."
        )
    if revision is not None and not isinstance(revision, str):
        raise RefusedCheckpoint(f"{source}: revision is {brief(revision)}, not a name. Write null into the file.")
    try:
        places = [Path(named).expanduser(), path / named]
        found = next((place for place in places if place.is_dir()), None) or cached(named, revision)
    except (OSError, RuntimeError, ValueError) as error:  # a home that does not exist; a name that is too long
        raise RefusedCheckpoint(
            f"{source}: the base model {brief(named)} cannot be looked up ({error}). Write its directory into the file."
        ) from error
    if found is None:
        raise RefusedCheckpoint(
            f"{source}: the base model {named!r} is not on this disk, and nothing is downloaded. Write its directory into the file "
            f"(base_model_name_or_path), or put it into the cache of Hugging Face where the network may be used: hf download {named}"
        )
    if found.resolve() == path.resolve() or not (found / "config.json").is_file():
        raise RefusedCheckpoint(
            f"{source}: the base model {named!r} is {found}, where no config.json of a model lies. "
            "Write the directory that holds the base model into the file."
        )
    return found


def _others(path: Path) -> tuple[str, ...]:
    """A model with several adapters keeps all but "default" in directories of their own."""
    names = sorted(shown(other.parent.name) for other in path.glob(f"*/{CONFIG}"))
    return (f"further adapters lie in {', '.join(names[:5])}; pass that directory to read one",) if names else ()
