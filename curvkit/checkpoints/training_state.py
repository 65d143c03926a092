"""What a trainer writes beside the weights: the optimizer's state and the step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from curvkit.checkpoints.confined import confined, unreadable
from curvkit.checkpoints.documents import document
from curvkit.checkpoints.places import check_places
from curvkit.checkpoints.trust import NeedsTrust
from curvkit.errors import RefusedCheckpoint

OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
"""Of the Trainer of Hugging Face, and of accelerate."""
NUMBERED = re.compile(r"checkpoint-(\d{1,18})")
"""How the Trainer names the directories of a run."""


def optimizer_file(directory: Path) -> Path | None:
    """The file with the optimizer's state.

    Args:
        directory: Of one checkpoint.

    Returns:
        Its resolved path; None if there is none.

    Raises:
        RefusedCheckpoint: If it leads outside the directory.

    Cost: look-ups in the file system.
    """
    name = next((name for name in OPTIMIZER_FILES if (directory / name).exists()), None)
    return None if name is None else confined(directory, name, source=str(directory))


def optimizer_beside(directory: Path, load: Callable[[Path], Any]) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Read the optimizer's state that lies beside weights, which do not need it.

    Args:
        directory: Of one checkpoint.
        load: Reads a file of torch.save.

    Returns:
        The state, and notes; None if there is none, or if reading it would need more trust than the file has.

    Raises:
        RefusedCheckpoint: If it is damaged, leads outside the directory, is something else, or claims more memory than it has numbers.

    Cost: two passes over the file.
    """
    path = optimizer_file(directory)
    if path is None:
        return None, ()
    try:
        content = load(path)
    except NeedsTrust as error:
        return None, (f"the optimizer's state was not read: {error}",)
    from torch import Tensor  # descriptions are made where torch is not wanted

    state = optimizer_state(path, content)
    check_places(path, {}, state, Tensor)
    return state, ()


def optimizer_state(path: Path, content: Any) -> Mapping[str, Any]:
    """Check that a file holds what `Optimizer.state_dict()` returns.

    Args:
        path: Of the file, for messages.
        content: What was read.

    Returns:
        The content.

    Raises:
        RefusedCheckpoint: If it is something else.

    Cost: none.
    """
    if isinstance(content, Mapping) and isinstance(content.get("param_groups"), list):
        return content
    raise RefusedCheckpoint(
        f"{path}: does not hold the state of an optimizer (a dict with param_groups). Put the file back that the run wrote, "
        "or take it away: the weights can be read without it."
    )


def step(directory: Path) -> int | None:
    """The training step: from trainer_state.json, else from the name `checkpoint-N`.

    Args:
        directory: Of one checkpoint.

    Returns:
        The step; None if nothing says it.

    Raises:
        RefusedCheckpoint: If trainer_state.json is damaged; the Trainer writes it last.

    Cost: that file is read.
    """
    if (directory / "trainer_state.json").exists():
        state = document(confined(directory, "trainer_state.json", source=str(directory)))
        found = state.get("global_step")
        if type(found) is int and 0 <= found < 1 << 63:
            return found
        raise RefusedCheckpoint(
            f"{directory / 'trainer_state.json'}: has no global_step that is a number >= 0. Take another copy or an earlier checkpoint."
        )
    named = NUMBERED.fullmatch(directory.name)
    return int(named[1]) if named else None


def numbered(directory: Path) -> list[Path]:
    """The checkpoints of a run, by number.

    Args:
        directory: Of the run.

    Returns:
        Its children `checkpoint-N`, the last one last.

    Raises:
        RefusedCheckpoint: If the directory cannot be listed.

    Cost: one listing.
    """
    try:
        found = [(int(m[1]), p) for p in directory.iterdir() if (m := NUMBERED.fullmatch(p.name)) and p.is_dir()]
    except OSError as error:
        raise RefusedCheckpoint(unreadable(directory, error)) from error
    return [path for _, path in sorted(found)]
