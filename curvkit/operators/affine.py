"""Is every output of a model affine in each parameter entry by itself, piece by piece? Read off the operations of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvkit.errors import CurvkitError
from curvkit.objectives import Objective

VIEWS = frozenset(
    {"t", "transpose", "permute", "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "alias", "detach"}
)
"""Rearrange one tensor: a parameter stays a parameter."""
PRODUCTS = {"mm": 0, "bmm": 0, "mul": 0, "linear": 0, "convolution": 0, "addmm": 1, "baddbmm": 1}
"""Multiply two operands, the first of which is this argument; the other arguments are added."""
SUMS = frozenset({"add", "sub"})
PIECEWISE = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "threshold", "hardtanh", "abs", "neg", "clamp", "clamp_min"),
        *("max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum", "cat", "clone"),
    }
)
"""Piecewise linear in what they are given."""


class _NotAffine(Exception):
    """An operation that is not known to keep the outputs affine in each parameter entry."""


class _Tracer(TorchDispatchMode):
    """Follows parameters and what depends on them through a forward pass; anything that is not on the lists raises."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._owner: dict[int, str | None] = {id(tensor): name for name, tensor in parameters.items()}
        """Name of the parameter that a tensor is a view of; None for an activation. Others depend on no parameter."""
        self._alive: list[Any] = list(parameters.values())  # an id is good as long as its tensor lives
        self._used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        known = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._owner]
        if not known:
            return made
        owners = [self._owner[id(tensor)] for tensor in known]
        direct = [owner for owner in owners if owner is not None]
        if name not in VIEWS:
            self._refuse_second_use(direct, name)
            if name in PRODUCTS:
                first = PRODUCTS[name]
                pair = [tensor for tensor in args[first : first + 2] if id(tensor) in self._owner]
                if len(pair) == 2 and (self._owner[id(pair[0])] is None) == (self._owner[id(pair[1])] is None):
                    raise _NotAffine(f"{name} of two activations, or of two parameters")
            elif name not in SUMS and (name not in PIECEWISE or direct):
                raise _NotAffine(name)
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            self._owner[id(tensor)] = owners[0] if name in VIEWS else None
            self._alive.append(tensor)
        return made

    def _refuse_second_use(self, direct: list[str], name: str) -> None:
        for owner in direct:
            if owner in self._used:
                raise _NotAffine(f"{name}: {owner} is used twice")
            self._used.add(owner)


def is_affine_in_each_entry(objective: Objective) -> bool:
    """Whether d^2 z / d theta_j^2 = 0 almost everywhere for the outputs z and every parameter entry theta_j.

    It holds if every parameter tensor is used once, as a factor of something that it is not part of or as an addend, and all else is sums
    and piecewise linear maps: then z is piece by piece a polynomial of degree at most one in each entry by itself. That is read off
    the operations of a forward pass over all batches; one that is not on a list, or a product of two activations, gives False.

    Args:
        objective: Its model is run once; parameters that are left out of the space or frozen count, too.

    Returns:
        True only if it was shown. False also for BatchNorm, attention and in-place sums, though it may hold there.

    Cost: one forward pass over the data.
    Source: that the diagonal of H is then that of the GGN is in Martens (2020), section 8; the reading off of operations is ours.

    Example:
        >>> import torch.nn.functional as F
        >>> layers = [torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)]
        >>> data = [(torch.ones(4, 2), torch.zeros(4, 2))]
        >>> is_affine_in_each_entry(Objective(torch.nn.Sequential(*layers), F.mse_loss, data))
        True
        >>> layers[1] = torch.nn.Tanh()
        >>> is_affine_in_each_entry(Objective(torch.nn.Sequential(*layers), F.mse_loss, data))
        False
    """
    parameters = dict(objective.model.named_parameters())
    try:
        with objective.measuring(), torch.no_grad():
            for index in range(len(objective.batches)):
                with _Tracer(parameters):
                    objective.outputs(index)
    except (_NotAffine, CurvkitError, RuntimeError):
        return False
    return True
