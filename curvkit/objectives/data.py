"""Draw the batches once, note what the loader does to them, and refuse what is not the same data twice."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.losses.batches import Batch, check_batch, map_tensors, tensors
from curvkit.objectives.surroundings import random_state

DRAW_SEED = 0
"""A loader that shuffles is drawn under this seed, so that the draw is the same in every process."""
AUGMENTATION_DRAWS = 8
"""So often one example is fetched; a flip with probability 1/2 stays unseen with probability 1/128."""


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
    if isinstance(data, Iterator):  # to ask a DataLoader for an iterator would draw a random number
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
    if not isinstance(data, list | tuple) and not _is_map_style(data):
        notes += _second_pass(data, batches, limit)
    if limit is not None and len(batches) == limit and _length(data) not in (None, limit):
        notes.append(
            f"the first {limit} of {_length(data)} batches" if limit > 1 else f"the first batch of {_length(data)}"
        )
    return batches, tuple(notes)


def fingerprint(batches: Iterable[Batch]) -> str:
    """Hash the data that a result belongs to.

    Args:
        batches: The batches.

    Returns:
        16 hexadecimal digits of SHA-256 over shapes, dtypes and bytes, in order.
    """
    return hashlib.sha256("".join(_fingerprints(batches)).encode()).hexdigest()[:16]


def _once(data: Iterable[Batch], limit: int | None, seed: int = DRAW_SEED) -> tuple[Batch, ...]:
    """One pass, or its beginning, under a seed; as ordinary tensors, also inside `torch.inference_mode`."""
    if type(data) in (list, tuple):  # draws nothing; to set every random state takes a millisecond
        with torch.inference_mode(False):
            return tuple(_ordinary(batch) for batch in itertools.islice(data, limit))
    batch_sampler = getattr(data, "batch_sampler", None)
    nested = (getattr(batch_sampler, "sampler", None), getattr(data, "sampler", None), getattr(data, "dataset", None))
    holders = {id(holder): holder for holder in (data, batch_sampler, *nested)}.values()
    generators = [g for g in (getattr(h, "generator", None) for h in holders) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    with _seeded(seed), torch.inference_mode(False):
        for g in generators:
            g.manual_seed(seed)
        try:
            return tuple(_ordinary(batch) for batch in itertools.islice(data, limit))
        finally:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)


@contextlib.contextmanager
def _seeded(seed: int) -> Generator[None]:
    """Every global random state at a seed, and as it was on leaving."""
    with random_state():
        torch.manual_seed(seed)
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed)
        yield


def _ordinary(batch: Batch) -> Batch:
    """The batch itself, or a copy of one that was made in inference mode, which cannot be differentiated through."""
    if not any(tensor.is_inference() for tensor in tensors(batch)):
        return batch
    return map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)


def _second_pass(data: Iterable[Batch], batches: tuple[Batch, ...], limit: int | None) -> list[str]:
    """Draw again under another seed: other examples are random, the same examples in another order are shuffled."""
    if _fingerprints(_once(data, 1, DRAW_SEED + 1)) == _fingerprints(batches[:1]):
        return []
    name = type(data.dataset).__name__ if isinstance(data, DataLoader) else type(data).__name__
    if (
        limit is not None and _length(data) is None
    ):  # perhaps without end, so that there is no set of examples to compare
        return [f"{name} gives other batches with each pass; the first {limit} of one pass are kept"]
    one, other = (sorted(_row_prints(_once(data, None, DRAW_SEED + index))) for index in (0, 1))
    if one != other:
        raise UnsupportedModel(
            f"Objective: two passes over the data ({name}) give different examples: random augmentation or sampling. "
            "Curvature needs one fixed data set: turn it off, or pass list(data) to measure one draw."
        )
    return [f"{name} shuffles; one draw of its batches is kept"]


def _is_map_style(data: Iterable[Batch]) -> bool:
    return isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)


def _loader_notes(loader: DataLoader[Any]) -> list[str]:
    notes = []
    sampler: object = getattr(loader.batch_sampler, "sampler", None) or loader.batch_sampler or loader.sampler
    if isinstance(sampler, RandomSampler):
        notes.append("the DataLoader shuffles; one draw of its batches is kept")
    elif _is_map_style(loader) and not isinstance(sampler, SequentialSampler):
        notes.append(f"the DataLoader draws by {type(sampler).__name__}; one draw of its batches is kept")
    size = _length(loader.dataset)
    if loader.drop_last and loader.batch_size and size is not None and size % loader.batch_size:
        notes.append(f"drop_last leaves {size % loader.batch_size} of {size} examples out")
    return notes


def _refuse_augmentation(loader: DataLoader[Any]) -> None:
    """Compare one example of a map-style data set with itself, fetched and collated under other random states."""
    dataset = loader.dataset
    if not _is_map_style(loader) or not _length(dataset):
        return
    prints: set[str] = set()
    for seed in range(AUGMENTATION_DRAWS):
        with _seeded(seed):
            try:
                example = loader.collate_fn([dataset[0]] if loader.batch_sampler is not None else dataset[0])
            except Exception:
                return  # keyed by something else than positions, or collated in some number; a real fault shows in the draw
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
