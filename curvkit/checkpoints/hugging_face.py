"""Directories of Hugging Face: a model, a snapshot of the download cache, or the checkpoints of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvkit.checkpoints import adapters, distributed, shards, training_state
from curvkit.checkpoints.checkpoint import Checkpoint
from curvkit.checkpoints.confined import confined, shown, unreadable
from curvkit.checkpoints.description import Description
from curvkit.checkpoints.documents import brief, document
from curvkit.checkpoints.hub_cache import snapshot
from curvkit.checkpoints.names import clean
from curvkit.checkpoints.runs import number_of, numbered
from curvkit.checkpoints.safetensors_file import NO_CHECKSUM
from curvkit.checkpoints.shards import Load, Shards
from curvkit.checkpoints.training_entries import optimizer_entry
from curvkit.checkpoints.trust import NOTHING, Trust
from curvkit.errors import RefusedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

SPREAD = "pytorch_model_fsdp_0"
MODEL, CHECKPOINT, PLAIN = "Hugging Face directory", "Hugging Face checkpoint", "directory of weights"


def read_directory(path: Path, *, load: Load, trust: Trust = NOTHING) -> Checkpoint:
    """Read the model that a directory holds: of a run, its last checkpoint by number.

    Tensors have the dtypes of the file, and its names without what wrappers put into them. Weights that the model ties to others are
    not in the file; config.json says so.

    Args:
        path: A directory with config.json and weights, with `checkpoint-N` in it, or `models--x--y` of the download cache.
        load: Reads a file of torch.save as plain data: optimizer.pt, and weights in the old format.
        trust: With `everything`, a model whose configuration names code of its own is read as well.

    Returns:
        Weights, configuration, and of a training run the optimizer's state and the step. training_args.bin is never opened.

    Raises:
        RefusedCheckpoint: If something is missing, damaged, quantised, outside the directory, or names code.

    Cost: one pass over the weights, two over files of torch.save.
    """
    directory, notes = _chosen(path)
    if (directory / adapters.CONFIG).exists():
        found = adapters.read_adapter(directory, load=load)
        return replace(found, notes=(*notes, *found.notes))
    config = _config(directory)
    refusal = _refusal(config, trust)
    if refusal is not None:
        raise RefusedCheckpoint(f"{directory / 'config.json'}: {refusal}")
    if _spread(directory):
        tensors, optimizer, said = _gathered(directory)
    else:
        tensors, said = shards.read(_weights(directory), load)
        optimizer, unread = training_state.optimizer_beside(directory, load)
        said = (*said, *unread)
    mapping, removed = clean(tensors)
    return Checkpoint(
        directory,
        _kind(directory, config),
        {mapping[name]: tensor for name, tensor in tensors.items()},
        optimizer,
        training_state.step(directory),
        None,
        removed=removed,
        config=config,
        notes=(*notes, *said, *_config_notes(config)),
        schedule=training_state.logged_rates(directory),
    )


def describe(path: Path) -> Description:
    """Say what a directory holds, from its headers.

    Args:
        path: As for `read_directory`.

    Returns:
        Names, shapes and dtypes; of weights in files of torch.save, these files.

    Raises:
        RefusedCheckpoint: As `read_directory`, but for what only the numbers or a pickle can show; a model that is not measured because of
            its configuration is described all the same, with the reason.

    Cost: headers are read; torch is not imported.
    """
    directory, notes = _chosen(path)
    if (directory / adapters.CONFIG).exists():
        found = adapters.describe_adapter(directory)
        return replace(found, notes=(*notes, *found.notes))
    config = _config(directory)
    refusal = _refusal(config, NOTHING)
    if _spread(directory):
        found = distributed.describe(directory)
        return replace(
            found,
            kind=_kind(directory, config),
            step=training_state.step(directory),
            config=config,
            notes=(*notes, *found.notes, *_config_notes(config)),
            refusal=refusal,
        )
    weights = _weights(directory)
    tensors, said = shards.described(weights) if weights.safetensors else ({}, weights.notes)
    state = training_state.optimizer_file(directory)
    return Description(
        directory,
        _kind(directory, config),
        weights.bytes + (state.stat().st_size if state else 0),
        NO_CHECKSUM if weights.safetensors else "CRC-32 of every record",
        {"model": tensors} if weights.safetensors else {},
        () if weights.safetensors else tuple(weights.files.values()),
        state,
        training_state.step(directory),
        config,
        (
            *notes,
            *(note for note in said if note != NO_CHECKSUM),
            *training_state.several_optimizers(directory),
            *_config_notes(config),
        ),
        refusal,
    )


def _chosen(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The directory of one model, and how it was chosen."""
    if path.name.startswith("models--") and (path / "snapshots").is_dir():
        found = snapshot(path)
        return found, (f"snapshot {found.name} was taken",)
    runs = numbered(path)
    own = (adapters.CONFIG, SPREAD)
    if not runs or any((path / name).exists() for name in own) or shards.find(path):
        return path, ()
    last = runs[-1]
    if not last.resolve().is_relative_to(path.resolve()):
        raise RefusedCheckpoint(
            f"{last}: a link to {last.resolve()}, outside the run. Pass that directory itself if it is yours."
        )
    return last, (
        f"{last.name} was taken, the last of {len(runs)} checkpoints" if len(runs) > 1 else f"{last.name} was taken",
    )


def _spread(directory: Path) -> bool:
    """Whether the Trainer or accelerate kept the weights of FSDP as every process had them."""
    return (directory / SPREAD).exists() and shards.find(directory) is None


def _gathered(directory: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None, tuple[str, ...]]:
    """Weights, optimizer state and notes, put together from the files of all processes."""
    from torch import Tensor  # `describe` is used where torch is not wanted

    content = distributed.read_distributed(directory)
    weights, notes = content.get("model"), ["the weights are spread over the files of several processes"]
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise RefusedCheckpoint(
            f"{directory / SPREAD}: holds no tensors by name under 'model', where accelerate puts the weights. "
            "Pass the directory as accelerate wrote it."
        )
    return weights, optimizer_entry((content,), notes), tuple(notes)


def _weights(directory: Path) -> Shards:
    weights = shards.find(directory)
    if weights is not None:
        return weights
    try:
        names = sorted(child.name for child in directory.iterdir())
    except OSError as error:
        raise RefusedCheckpoint(unreadable(directory, error)) from error
    looked = ", ".join(name for name, _ in shards.CANDIDATES)
    first = ", ".join(map(shown, names[:8])) or "nothing"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    raise RefusedCheckpoint(
        f"{directory}: no weights under the names {looked}. It holds: {first}{more}. {_next_step(directory, names)}"
    )


def _next_step(directory: Path, names: list[str]) -> str:
    """What to type, by what lies there instead of weights."""
    earlier = [run for run in numbered(directory.parent) if run.name != directory.name]
    if number_of(directory.name) is not None and earlier:
        return f"The checkpoint is incomplete or still being written; an earlier one is {earlier[-1]}"
    within = [name for name in names if (directory / name / adapters.CONFIG).is_file()]
    if within:
        return f"Adapters lie in {', '.join(map(shown, within[:5]))}: pass one of these directories."
    files = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin"))]
    if files:
        return f"Pass the file that holds the weights, for example {directory / files[0]}"
    return "Pass the directory that save_pretrained or the Trainer wrote, or wait until it is complete."


def _config(directory: Path) -> dict[str, Any] | None:
    if not (directory / "config.json").exists() and not (directory / "config.json").is_symlink():
        return None
    return document(confined(directory, "config.json", source=str(directory)))


def _refusal(config: dict[str, Any] | None, trust: Trust) -> str | None:
    """Why a model of this configuration is not measured, and what to do; None if it is."""
    for place, key, value in _entries(config or {}):
        where = f"{place}{key}"
        if key == "quantization_config" and value is not None:
            return (
                f"the weights are quantised ({where}). Quantised weights have no curvature of their own; "
                "pass the checkpoint before quantisation."
            )
        if key == "auto_map" and value and not trust.everything:
            return (
                f"the model needs code that comes with it ({where}: {brief(value)}). Nothing was imported. "
                "If you have read that code and believe it, add --trust."
            )
        named = "attn_implementation" in key and isinstance(value, str) and "/" in value
        if named and not trust.everything:
            return f"{where} is {brief(value)}, code to be downloaded. Nothing was. Write 'eager' in its place."
    return None


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every key of the configuration and of those within it, such as text_config."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        place, held = waiting.pop()
        if isinstance(held, dict):
            for key, value in held.items():
                yield place, key, value
                waiting.append((f"{place}{key}."[-200:], value))
        elif isinstance(held, list):
            waiting.extend((place, item) for item in held)


def _config_notes(config: dict[str, Any] | None) -> tuple[str, ...]:
    if config is None:
        return ("there is no config.json: the directory does not say which model the weights belong to",)
    return ("the configuration names code of its own (auto_map)",) if config.get("auto_map") else ()


def _kind(directory: Path, config: dict[str, Any] | None) -> str:
    if config is None:
        return PLAIN
    return CHECKPOINT if (directory / "trainer_state.json").exists() else MODEL
