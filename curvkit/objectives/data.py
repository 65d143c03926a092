"""Draw the batches once, note what the loader does to them, and refuse what is not the same data twice."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.losses.batches import Batch, check_batch, tensors
from curvkit.objectives.surroundings import random_state

DRAW_SEED = 0
"""A loader that shuffles is drawn under this seed, so that the draw is the same in every process."""


def check_source(data: Any) -> None:
    """Refuse what cannot be drawn twice or is a batch rather than data, before anything is drawn.

    Args:
        data: What the user passed as `data`.

    Raises:
        InvalidArgument: If it is a lone batch, a one-shot iterator, or not iterable.
    """
    if isinstance(data, Tensor | Mapping) or (
        isinstance(data, tuple) and data and all(isinstance(x, Tensor) for x in data)
    ):
        raise InvalidArgument(
            f"Objective: data is a single batch (a {type(data).__name__}), but an iterable of batches is expected. "
            "Put it in a list: data=[batch]."
        )
    if not isinstance(data, Iterable):
        raise InvalidArgument(
            f"Objective: data={type(data).__name__} cannot be iterated. Pass a DataLoader or a list of batches, each (inputs, targets)."
        )
    if iter(data) is data:
        raise InvalidArgument(
            f"Objective: data is a one-shot iterator (a {type(data).__name__}): it gives its batches only once. "
            "Pass the loader itself, or list(iterator)."
        )


def draw(data: Iterable[Batch], limit: int | None) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    """Take the batches, all or the first few, and leave every random state as it was.

    Args:
        data: Checked by `check_source`.
        limit: How many batches; None takes all.

    Returns:
        The batches, and notes for the record.

    Raises:
        InvalidArgument: If there is none, or one is not made of tensors.
        UnsupportedModel: If examples change from one drawing to the next.
    """
    notes: list[str] = []
    if isinstance(data, DataLoader):
        notes += _loader_notes(data)
        _refuse_augmentation(data)
    batches = _once(data, limit)
    if not batches:
        raise InvalidArgument(
            "Objective: data gave no batches. Pass at least one batch; a loader with drop_last=True drops a short one."
        )
    for index, batch in enumerate(batches):
        check_batch(batch, index)
    if not isinstance(data, DataLoader | list | tuple) and _fingerprints(_once(data, 1)) != _fingerprints(batches[:1]):
        if sorted(_row_prints(_once(data, None))) != sorted(_row_prints(_once(data, None))):
            raise UnsupportedModel(
                f"Objective: two passes over the data ({type(data).__name__}) give different examples: random augmentation or sampling. "
                "Curvature needs one fixed data set: turn it off, or pass list(data) to measure one draw."
            )
        notes.append(f"{type(data).__name__} shuffles; one draw of its batches is kept")
    if limit is not None and len(batches) == limit and _length(data) not in (None, limit):
        notes.append(f"the first {limit} of {_length(data)} batches")
    return batches, tuple(notes)


def fingerprint(batches: Iterable[Batch]) -> str:
    """Hash the data that a result belongs to.

    Args:
        batches: The batches.

    Returns:
        16 hexadecimal digits of SHA-256 over shapes, dtypes and bytes, in order.
    """
    return hashlib.sha256("".join(_fingerprints(batches)).encode()).hexdigest()[:16]


def _once(data: Iterable[Batch], limit: int | None) -> tuple[Batch, ...]:
    generators = [
        g for g in (getattr(data, "generator", None), getattr(getattr(data, "sampler", None), "generator", None)) if g
    ]
    states = [g.get_state() for g in generators]
    with random_state():
        torch.manual_seed(DRAW_SEED)
        for g in generators:
            g.manual_seed(DRAW_SEED)
        try:
            return tuple(itertools.islice(data, limit))
        finally:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)


def _loader_notes(loader: DataLoader[Any]) -> list[str]:
    notes = []
    if isinstance(loader.sampler, RandomSampler):
        notes.append("the DataLoader shuffles; one draw of its batches is kept")
    elif not isinstance(loader.sampler, SequentialSampler):
        notes.append(f"the DataLoader draws by {type(loader.sampler).__name__}; one draw of its batches is kept")
    size = _length(loader.dataset)
    if loader.drop_last and loader.batch_size and size is not None and size % loader.batch_size:
        notes.append(f"drop_last leaves {size % loader.batch_size} of {size} examples out")
    return notes


def _refuse_augmentation(loader: DataLoader[Any]) -> None:
    """Compare one example of a map-style data set with itself, fetched under another random state."""
    dataset = loader.dataset
    if not hasattr(dataset, "__getitem__") or not _length(dataset):
        return
    prints = set()
    with random_state():
        for seed in (1, 2):
            torch.manual_seed(seed)
            try:
                example = dataset[0]
            except (KeyError, IndexError, TypeError):
                return  # keyed by something else than positions
            prints.add("".join(_fingerprints([example])))
    if len(prints) > 1:
        transform = getattr(dataset, "transform", None)
        where = f"{type(dataset).__name__}" + (f" with transform {transform!r}" if transform is not None else "")
        raise UnsupportedModel(
            f"Objective: the same example of the data set comes out different each time ({where}): random augmentation. "
            "Curvature needs one fixed data set: use the evaluation transform, or pass list(loader) to measure one draw."
        )


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _fingerprints(batches: Iterable[Batch]) -> list[str]:
    return [_print(tensor) for batch in batches for tensor in tensors(batch)]


def _row_prints(batches: Iterable[Batch]) -> list[str]:
    """One print per example, so that a change of order or of batch size does not show."""
    prints = []
    for batch in batches:
        parts = [tensor if tensor.ndim else tensor[None] for tensor in tensors(batch)]
        for row in zip(*(part.unbind(0) for part in parts), strict=False):
            prints.append("".join(_print(value) for value in row))
    return prints


def _print(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()
