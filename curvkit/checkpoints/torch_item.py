"""One item of a larger file, as torch.save writes it: a tensor, a number, a list."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from curvkit.checkpoints.allowed import refused
from curvkit.checkpoints.archive import Archive
from curvkit.checkpoints.documents import brief
from curvkit.checkpoints.outline import Outline, outline
from curvkit.checkpoints.pickles import NotPlain
from curvkit.errors import RefusedCheckpoint


def item(path: Path, content: bytes) -> Any:
    """Read what torch.save wrote into a part of a file.

    Args:
        path: Of the file, for messages.
        content: The part.

    Returns:
        Tensors and plain values; nothing is imported or called.

    Raises:
        RefusedCheckpoint: If it is damaged, or refers to anything else.

    Cost: one pass over the part, and the memory of its tensors.

    Example:
        >>> import torch
        >>> file = io.BytesIO()
        >>> torch.save({"lr": 0.5}, file)
        >>> item(Path("__0_0.distcp"), file.getvalue())
        {'lr': 0.5}
    """
    from curvkit.checkpoints.live import Materialiser  # imports torch, which `number` does without

    archive, found = _outline(path, content)
    live = Materialiser(str(path), archive.sizes, archive).live(found.content)
    archive.verify()
    return live


def number(path: Path, content: bytes) -> int | None:
    """Read an item that is one whole number.

    Args:
        path: Of the file, for messages.
        content: The part of it.

    Returns:
        The number; None if it is something else.

    Raises:
        RefusedCheckpoint: As `item`.

    Cost: one pass over the part; torch is not imported.

    Example:
        >>> import torch
        >>> file = io.BytesIO()
        >>> torch.save(7, file)
        >>> number(Path("__0_0.distcp"), file.getvalue())
        7
    """
    found = plain(path, content)
    return found if type(found) is int else None


def plain(path: Path, content: bytes) -> Any:
    """Read an item whose tensors, if it has any, are not wanted.

    Args:
        path: Of the file, for messages.
        content: The part of it.

    Returns:
        Plain values, with a `StoredTensor` for every tensor.

    Raises:
        RefusedCheckpoint: As `item`.

    Cost: one pass over the part; torch is not imported.

    Example:
        >>> import torch
        >>> file = io.BytesIO()
        >>> torch.save({"lr": 0.5}, file)
        >>> plain(Path("__0_0.distcp"), file.getvalue())
        {'lr': 0.5}
    """
    archive, found = _outline(path, content)
    archive.verify()
    return found.content


def _outline(path: Path, content: bytes) -> tuple[Archive, Outline]:
    archive = Archive(path, io.BytesIO(content))
    try:
        found = outline(archive.outline())
    except NotPlain as error:
        raise RefusedCheckpoint(
            f"{path}: an item in it is not what torch.save writes: {error}. Take another copy or an earlier checkpoint."
        ) from error
    names = refused(found.globals)
    if names:
        raise RefusedCheckpoint(
            f"{path}: refused, an item in it refers to {', '.join(map(brief, names[:5]))}, and loading that could run code. "
            "Nothing was executed. Save the model alone where the checkpoint was made: dcp.save({'model': model.state_dict()}, ...)."
        )
    for key, storage in found.storages.items():
        if storage.bytes > archive.sizes.get(key, -1):
            raise RefusedCheckpoint(
                f"{path}: a tensor in it claims {storage.bytes:,} bytes that are not there. Take another copy or an earlier checkpoint."
            )
    return archive, found
