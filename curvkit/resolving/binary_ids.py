"""Ids of tokens as nanoGPT keeps them: a file of 16-bit numbers and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from curvkit.errors import UnknownObjective

LOOKED_AT = 1 << 16
"""Numbers at the beginning of the file of which the width is judged."""
FEWEST_HALVES = 64
"""With fewer of them nothing is concluded."""


def read_ids(path: Path, *, length: int, count: int, vocabulary: int | None = None) -> Tensor:
    """Read what evenly spaced windows need, each with the token after it.

    Args:
        path: The file.
        length: T, of a window.
        count: N, windows that are wanted.
        vocabulary: Ids that the model has; None if it is not known.

    Returns:
        [n] int64; all ids if there are no more than the windows need.

    Raises:
        UnknownObjective: If they are no 16-bit numbers, or the model has more ids than fit into 16 bits.

    Cost: the windows are read, and the beginning of the file.
    """
    _check_width(path, vocabulary)
    size = path.stat().st_size
    total, odd = divmod(size, 2)
    if odd or not total:
        raise UnknownObjective(
            f"--data {path}: {size:,} bytes are no sequence of 16-bit ids, which is what a .bin file of nanoGPT holds. "
            "Write it with numpy.asarray(ids, dtype=numpy.uint16).tofile(path)."
        )
    if total <= count * (length + 1):
        return _ids(path, 0, total)
    step = total // count
    return torch.cat([_ids(path, index * step, length + 1) for index in range(count)])


def _check_width(path: Path, vocabulary: int | None) -> None:
    """Refuse a file of 32-bit ids, whose halves would be read as ids: of small ids every second half is 0 or 1."""
    if vocabulary is not None and vocabulary > 1 << 16:
        raise UnknownObjective(
            f"--data {path}: a .bin file holds 16-bit ids, and the model's vocabulary of {vocabulary:,} does not fit into them. Pass the "
            "text as .txt or .jsonl, or the ids as a directory of datasets with a column input_ids."
        )
    head = _ids(path, 0, LOOKED_AT)
    if len(head) // 2 >= FEWEST_HALVES and bool((head[1::2] <= 1).all()) and bool((head[::2] > 1).any()):
        raise UnknownObjective(
            f"--data {path}: it looks like 32-bit ids (every second 16-bit number is 0 or 1), and a .bin file of nanoGPT has 16-bit ones. "
            "Write it with numpy.asarray(ids, dtype=numpy.uint16).tofile(path)."
        )


def _ids(path: Path, start: int, count: int) -> Tensor:
    found = numpy.fromfile(path, dtype="<u2", count=count, offset=2 * start)
    return torch.from_numpy(found.astype(numpy.int64))
