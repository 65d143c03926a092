"""A batch is a tensor, a tuple or list, or a mapping of tensors; these functions treat the three alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument, UnknownObjective

Batch = Any
"""A tensor, a tuple or list of batches, or a mapping with batches as values; other leaves are passed through."""

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Under which key a mapping holds the targets of a loss (outputs, targets)."""


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Walk over the tensors of a batch, in a fixed order.

    Args:
        batch: Any batch.

    Yields:
        Each tensor.

    Example:
        >>> len(list(tensors({"x": torch.ones(2), "y": (torch.ones(1), 3)})))
        2
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors(value)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to each tensor of a batch.

    Args:
        function: Tensor -> Tensor.
        batch: Any batch.

    Returns:
        A new batch of the same structure; a mapping becomes a dict.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def rows(batch: Batch) -> int | None:
    """Number of examples: the common size of dimension 0.

    Args:
        batch: Any batch.

    Returns:
        The size; None if the tensors disagree or there is none.

    Example:
        >>> rows((torch.ones(4, 2), torch.ones(4)))
        4
    """
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors(batch)}
    return sizes.pop() if len(sizes) == 1 else None


def take_rows(batch: Batch, index: Tensor) -> Batch:
    """Select examples of a batch.

    Args:
        batch: A batch whose tensors have a common dimension 0.
        index: [r] int64.

    Returns:
        The batch of these rows; a copy.
    """
    return map_tensors(lambda tensor: tensor.index_select(0, index.to(tensor.device)), batch)


def inputs_and_targets(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Divide a batch for a loss of the form (outputs, targets).

    Args:
        batch: (inputs ..., targets), the last being the targets; or a mapping that has them under one of `TARGET_KEYS`, with
            the inputs under "x" or "inputs" alone, or under the names of the model's keyword arguments.

    Returns:
        Positional inputs, keyword inputs, targets.

    Raises:
        UnknownObjective: If the batch has no targets.
    """
    advice = "Give batches as (inputs, targets), or write the loss as curvkit.BatchLoss(fn) with fn(model, batch)."
    if isinstance(batch, Mapping):
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) != 1:
            raise UnknownObjective(
                f"Objective: a loss (outputs, targets) needs the targets of the batch; among its keys {sorted(map(str, batch))} "
                f"exactly one of {', '.join(TARGET_KEYS)} is expected. {advice}"
            )
        rest = {key: value for key, value in batch.items() if key != keys[0]}
        if len(rest) == 1 and next(iter(rest)) in ("x", "inputs", "input"):
            return tuple(rest.values()), {}, batch[keys[0]]
        return (), rest, batch[keys[0]]
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    got = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
    raise UnknownObjective(
        f"Objective: a loss (outputs, targets) needs targets; the batch is {got} without any. {advice}"
    )


def check_batch(batch: Batch, index: int) -> None:
    """Refuse what is not a batch.

    Args:
        batch: What the data gave.
        index: Its number, for the message.

    Raises:
        InvalidArgument: If it holds no tensor, is neither tensor, tuple, list nor mapping, or has no rows.
    """
    if not isinstance(batch, Tensor | tuple | list | Mapping) or next(tensors(batch), None) is None:
        raise InvalidArgument(
            f"Objective: batch {index} is a {type(batch).__name__} without tensors. Batches are tensors, tuples or dicts of tensors; "
            "convert arrays with torch.as_tensor."
        )
    if rows(batch) == 0:
        raise InvalidArgument(
            f"Objective: batch {index} is empty: its tensors have 0 rows. Leave empty batches out of the data."
        )


def cast(batch: Batch, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Batch:
    """Move a batch; only floating-point tensors change their dtype.

    Args:
        batch: Any batch.
        device: Target, or None to stay.
        dtype: For real floating-point tensors, or None to keep.

    Returns:
        The moved batch.
    """
    return map_tensors(
        lambda tensor: tensor.to(device=device, dtype=dtype if tensor.dtype.is_floating_point else None), batch
    )
