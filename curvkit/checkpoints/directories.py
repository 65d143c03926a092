"""Say what a directory is by the names in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from curvkit.checkpoints.candidates import NOT_MODELS
from curvkit.checkpoints.command_lines import quoted
from curvkit.checkpoints.confined import shown
from curvkit.checkpoints.runs import numbered
from curvkit.errors import RefusedCheckpoint

DirectoryKind = Literal["Hugging Face directory", "adapter", "distributed"]

WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
SHARD = re.compile(r"__\d+_\d+\.distcp")
METADATA = re.compile(r"(__\d+)?\.metadata(\.tmp)?")
ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".tar")
FSDP = re.compile(r"pytorch_model_fsdp_\d+")
"""How accelerate and the Trainer call the directory of sharded weights."""
TRAINING_ARGUMENTS = "training_args.bin"
"""Of the Trainer: a pickle without weights."""
TRAINER = {"config.json", "trainer_state.json"}
"""What the Trainer writes beside them."""


def directory_kind(path: Path) -> tuple[DirectoryKind, Path, str]:
    """Recognise a directory that is one checkpoint.

    Args:
        path: A directory.

    Returns:
        Its kind, where the checkpoint lies, and a note for the user, or "".

    Raises:
        RefusedCheckpoint: If it is none, or of DeepSpeed, or a half-written one; the text says what to pass instead.

    Cost: one listing.
    """
    names = {entry.name for entry in path.iterdir()}
    kind = _own_kind(path, names)
    if kind is not None:
        return kind, path, ""
    if any(FSDP.fullmatch(name) for name in names):
        return ("Hugging Face directory" if TRAINER & names else "distributed"), path, ""
    if path.name.startswith("models--") and "snapshots" in names:
        return "Hugging Face directory", path, "a folder of the download cache of Hugging Face"
    runs = numbered(path)
    if runs:
        return "Hugging Face directory", path, f"a run with {len(runs)} checkpoints, of which the last is taken"
    raise RefusedCheckpoint(f"{path}: {_advice(path, names)}")


def _own_kind(path: Path, names: set[str]) -> DirectoryKind | None:
    if any(METADATA.fullmatch(name) or SHARD.fullmatch(name) for name in names):
        return "distributed"  # its reader says whether it is complete
    if "adapter_config.json" in names:
        return "adapter"
    if any(WEIGHTS.fullmatch(name) for name in names):
        return "Hugging Face directory"
    if "zero_to_fp32.py" in names or ("latest" in names and any(name.startswith("global_step") for name in names)):
        raise RefusedCheckpoint(
            f"{path}: a checkpoint of DeepSpeed, whose weights are spread over files that only DeepSpeed can put together. "
            f"Run its own script, {_gathering(path)}, and pass what it writes."
        )
    if any(name.startswith(("mp_rank_", "zero_pp_rank_", "bf16_zero_pp_rank_")) for name in names):
        script = path.parent / "zero_to_fp32.py"
        run = (
            f"Run {_gathering(path.parent)}" if script.is_file() else "Run DeepSpeed's zero_to_fp32.py on their folder"
        )
        raise RefusedCheckpoint(
            f"{path}: shards of DeepSpeed, each of which holds a part of the weights. {run}, and pass what it writes."
        )
    if "config.json" in names and not any(name.endswith(ENDINGS) for name in names):
        return "Hugging Face directory"  # its reader says which weights are missing
    return None


def _gathering(path: Path) -> str:
    """How the script that DeepSpeed puts into a folder is called."""
    return f"python {quoted(path / 'zero_to_fp32.py')} {quoted(path)} OUTPUT"


def _advice(path: Path, names: set[str]) -> str:
    """What to say of a directory that is no checkpoint: which of its files are."""
    if not names:
        return "the directory is empty. Pass the checkpoint itself."
    files = sorted((name for name in names if name.endswith(ENDINGS) and (path / name).is_file()), key=_natural)
    folders = sorted((name for name in names if (path / name).is_dir()), key=_natural)
    if files:
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        which = "Pass it:" if len(files) == 1 else "Pass one of them, for example"
        likely = [name for name in files if not NOT_MODELS.search(name) and name != TRAINING_ARGUMENTS] or files
        return f"a directory with {', '.join(map(shown, files[:4]))}{more}. {which} {path / likely[-1]}"
    held = next((name for name in reversed(folders) if _holds_checkpoint(path / name)), None)
    if held is not None:
        return f"a directory, not a checkpoint. Pass one that is in it, for example {path / held}"
    return "a directory without a checkpoint in it. Pass a file of torch.save, a .safetensors file, or a model's directory."


def _holds_checkpoint(folder: Path) -> bool:
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError:
        return False
    return any(METADATA.fullmatch(name) or WEIGHTS.fullmatch(name) or name.endswith(ENDINGS) for name in names)


def _natural(name: str) -> list[tuple[int, str]]:
    """Step 9 before step 10."""
    return [(int(part[:18]), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
