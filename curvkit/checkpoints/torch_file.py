"""One file of torch.save as plain data: what it refers to, its sizes and its checksums are checked, and nothing in it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvkit.checkpoints.allowed import explained, refused
from curvkit.checkpoints.detection import CODE, detect
from curvkit.checkpoints.live import Materialiser
from curvkit.checkpoints.printable import printable
from curvkit.checkpoints.skeleton import Skeleton, opened
from curvkit.checkpoints.trust import NOTHING, NeedsTrust, Trust
from curvkit.checkpoints.trusted import can_be_allowed, trusted_content

SHOWN = 5


def load(path: Path, *, trust: Trust = NOTHING) -> Any:
    """Read all of a torch file.

    Args:
        path: A file that torch.save wrote.
        trust: What the file may do.

    Returns:
        Dicts, lists, tuples, plain values and tensors on the CPU.

    Raises:
        RefusedCheckpoint: If it is damaged, or would run code.

    Cost: one pass over the file; the memory of its tensors.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "ckpt.pt"
        >>> torch.save({"w": torch.ones(2)}, path)
        >>> load(path)
        {'w': tensor([1., 1.])}
    """
    with data_of(path, trust) as data:
        if not isinstance(data, Skeleton):
            return data
        content = Materialiser(str(path), data.sizes, data.file).live(data.content)
        data.file.verify()
        return content


@contextlib.contextmanager
def data_of(path: Path, trust: Trust) -> Generator[Any]:
    """Open a torch file: its outline, or, where the user trusts it with more than that, its live content.

    Args:
        path: A file that torch.save wrote.
        trust: What the file may do.

    Yields:
        A `Skeleton` whose file is open; or, for a file that needs trust and has it, what it unpickled to.

    Raises:
        RefusedCheckpoint: If it is damaged.
        NeedsTrust: If it needs more trust than it has.
    """
    kind = detect(path).kind
    if kind in CODE:
        if not trust.everything:
            raise NeedsTrust(
                f"{path}: {CODE[kind]}, which is code. Save the weights instead: torch.save(model.state_dict(), path). "
                "If you trust whoever made it, add --trust."
            )
        yield trusted_content(path, kind, trust, ())
        return
    with opened(path) as skeleton:
        names = refused(skeleton.globals)
        if not names:
            yield replace(skeleton, notes=(*skeleton.notes, *unneeded(trust)))
            return
        left = tuple(name for name in names if name not in trust.classes)
        if left and not trust.everything:
            raise NeedsTrust(_refusal(path, skeleton, left))
        skeleton.file.verify()
        yield trusted_content(path, kind, trust, names)


def unneeded(trust: Trust) -> tuple[str, ...]:
    """A note for the user of a file that refers to no classes.

    Args:
        trust: With the classes that were let in.

    Returns:
        One note, or none.

    Example:
        >>> unneeded(Trust(classes=("train.Config",)))
        ('--allow train.Config was not needed: the file refers to no class',)
    """
    if not trust.classes:
        return ()
    return (f"--allow {', '.join(trust.classes)} was not needed: the file refers to no class",)


def _refusal(path: Path, skeleton: Skeleton, names: tuple[str, ...]) -> str:
    """Why a file is refused, with the names that it refers to."""
    known = explained(names)
    if known is not None:
        return f"{path}: refused, it holds {known}."
    shown = ", ".join(printable(name) for name in names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
    tensors = any("_rebuild_" in name for name in skeleton.globals)
    modules = [name for name in names if ".nn.modules." in name]
    kind = "a whole pickled model" if modules else "more than tensors and plain data"
    text = f"{path}: refused, {kind}: it refers to {shown}, and loading that could run code. Nothing was executed. "
    if not tensors and not modules:
        return (
            f"{path}: not a checkpoint of a model: it holds no tensor, and refers to {shown}, which loading would run. Nothing was. "
            "Save the weights where the file was made: torch.save(model.state_dict(), path)."
        )
    text += "Save the weights alone where the file was made: torch.save(model.state_dict(), path)."
    if not modules and len(names) <= SHOWN and all(can_be_allowed(name) for name in names):
        text += f" If these classes are yours: {' '.join(f'--allow {name}' for name in names)}"
    elif modules:
        text += " If you trust whoever made it, add --trust."
    return text
