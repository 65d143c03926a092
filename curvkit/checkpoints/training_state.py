"""What a trainer writes beside the weights: the optimizer's state and the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from curvkit.checkpoints.allowed import refused
from curvkit.checkpoints.confined import confined
from curvkit.checkpoints.documents import document
from curvkit.checkpoints.places import check_places
from curvkit.checkpoints.runs import number_of
from curvkit.checkpoints.skeleton import read_skeleton
from curvkit.checkpoints.trust import NeedsTrust
from curvkit.errors import RefusedCheckpoint

OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
"""Of the Trainer of Hugging Face, and of accelerate."""


def optimizer_file(directory: Path) -> Path | None:
    """The file with the optimizer's state.

    Args:
        directory: Of one checkpoint.

    Returns:
        Its resolved path; None if there is none, or if there are several.

    Raises:
        RefusedCheckpoint: If it leads outside the directory.

    Cost: look-ups in the file system.
    """
    if several_optimizers(directory):
        return None
    name = next((name for name in OPTIMIZER_FILES if (directory / name).exists()), None)
    return None if name is None else confined(directory, name, source=str(directory))


def several_optimizers(directory: Path) -> tuple[str, ...]:
    """What to say of states of several optimizers, as accelerate numbers them: nothing says which one belongs to the weights.

    Args:
        directory: Of one checkpoint.

    Returns:
        A note; nothing if there is one state at most.

    Cost: look-ups in the file system.
    """
    there = [name for name in ("optimizer.bin", "optimizer_1.bin", "optimizer_2.bin") if (directory / name).exists()]
    if len(there) < 2:
        return ()
    return (f"the states of several optimizers are there ({', '.join(there)}); none was taken",)


def optimizer_beside(directory: Path, load: Callable[[Path], Any]) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Read the optimizer's state that lies beside weights, which do not need it.

    Args:
        directory: Of one checkpoint.
        load: Reads a file of torch.save.

    Returns:
        The state, and notes; None if there is none, if reading it would need more trust than the file has, or if it has that trust and is
        no such state all the same.

    Raises:
        RefusedCheckpoint: If a file of plain data is damaged, is something else, or claims more memory than it has numbers; if the file
            leads outside the directory.

    Cost: two passes over the file.
    """
    path = optimizer_file(directory)
    if path is None:
        return None, several_optimizers(directory)
    from torch import Tensor  # descriptions are made where torch is not wanted

    try:
        state = optimizer_state(path, load(path))
        check_places(path, {}, state, Tensor)
    except RefusedCheckpoint as error:
        if not isinstance(error, NeedsTrust) and not refused(read_skeleton(path).globals):
            raise
        return None, (f"the optimizer's state was not read: {error}",)
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
    return number_of(directory.name)


def logged_rates(directory: Path) -> Mapping[str, Any] | None:
    """The highest learning rate that the Trainer has logged so far.

    Args:
        directory: Of one checkpoint.

    Returns:
        {"logged_learning_rate": ...}; None if trainer_state.json is not there or has logged none.

    Raises:
        RefusedCheckpoint: If trainer_state.json is damaged.

    Cost: that file is read.
    """
    if not (directory / "trainer_state.json").exists():
        return None
    history = document(confined(directory, "trainer_state.json", source=str(directory))).get("log_history")
    entries: list[Any] = history if isinstance(history, list) else []
    rates = [entry.get("learning_rate") for entry in entries if isinstance(entry, dict)]
    numbers = [rate for rate in rates if isinstance(rate, int | float) and not isinstance(rate, bool) and rate >= 0]
    return {"logged_learning_rate": max(numbers)} if numbers else None
