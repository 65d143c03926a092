"""Functions of torch whose own code is followed, call by call, where parameters enter several calls inside of them."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch.nn.functional as F

INSIDES: tuple[Any, ...] = (F.multi_head_attention_forward,)
"""Inside of them dimension 1 counts the examples."""


def followed(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the code of a function of torch without its question whether someone wants to be told of the call as a whole.

    Under a `TorchFunctionMode` the question would be answered by the mode again, without end. All else is torch's own, so that numbers
    and random draws are bit for bit those of the call.

    Args:
        function: Of `torch.nn.functional`, written in Python.
        *args: As it takes them.
        **kwargs: Likewise.

    Returns:
        What it returns.
    """
    known = {**vars(F), "has_torch_function": lambda _: False}
    body = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    return body(*args, **kwargs)
