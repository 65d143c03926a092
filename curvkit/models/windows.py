"""Windows of a sequence of tokens, each with the same window one token later as its target."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.models.checks import check_count


def random_windows(tokens: Tensor, length: int, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw windows at independent, uniformly distributed places, for training.

        x_i = tokens[s_i : s_i + T],   y_i = tokens[s_i + 1 : s_i + 1 + T]

    Args:
        tokens: [n], n > T.
        length: T.
        count: N.
        generator: On the CPU; N numbers are drawn from it.

    Returns:
        x and y, both [N, T].

    Raises:
        InvalidArgument: If a size is not an integer >= 1, or there are not more than T tokens in one
            dimension.

    Example:
        >>> x, y = random_windows(torch.arange(9), 4, 2, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(y, x + 1)
        True
    """
    _check_windows("random_windows", tokens, length, count, overlapping=True)
    return _cut(tokens, torch.randint(len(tokens) - length, (count,), generator=generator), length)


def spaced_windows(tokens: Tensor, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Cut evenly spaced windows that do not overlap, for calibration: the same ones every time.

        x_i = tokens[s_i : s_i + T],   y_i = tokens[s_i + 1 : s_i + 1 + T],   s_i = i floor(n / N)

    No position is the input of two windows, and none the target of two.

    Args:
        tokens: [n], n > N T.
        length: T.
        count: N.

    Returns:
        x and y, both [N, T].

    Raises:
        InvalidArgument: If a size is not an integer >= 1, or there are not more than N T tokens in one
            dimension.

    Example:
        >>> spaced_windows(torch.arange(9), 3, 2)[0]
        tensor([[0, 1, 2],
                [4, 5, 6]])
    """
    _check_windows("spaced_windows", tokens, length, count, overlapping=False)
    return _cut(tokens, torch.arange(count) * (len(tokens) // count), length)


def _check_windows(owner: str, tokens: Tensor, length: int, count: int, *, overlapping: bool) -> None:
    check_count(owner, "length", length, "the number of tokens in one window", 64)
    check_count(owner, "count", count, "the number of windows", 32)
    needed = (length if overlapping else count * length) + 1  # the last target lies one beyond the last input
    if tokens.dim() != 1 or len(tokens) < needed:
        windows = "one window at least" if overlapping else f"{count} windows without overlap"
        raise InvalidArgument(
            f"{owner}: tokens of shape {tuple(tokens.shape)} must be [n] with n >= {needed}: {windows}, "
            f"of {length} tokens each, and a last target. Pass one longer sequence, or lower length or count."
        )


def _cut(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    places = (starts[:, None] + torch.arange(length)).to(tokens.device)  # [N, T]
    return tokens[places], tokens[places + 1]
