"""Is every output of a model affine in each parameter entry by itself, piece by piece? Read off the operations of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvkit.errors import CurvkitError
from curvkit.objectives import Objective
from curvkit.objectives.moving import outputs_at

VIEWS = frozenset(
    {
        *("t", "transpose", "permute", "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "alias", "detach"),
        *("slice", "select"),
    }
)
"""Rearrange one tensor, or take a part of it: a parameter stays a parameter."""
PRODUCTS = {"mm": 0, "bmm": 0, "mul": 0, "linear": 0, "convolution": 0, "addmm": 1, "baddbmm": 1}
"""Multiply two operands, the first of which is this argument; the other arguments are added."""
SUMS = frozenset({"add", "sub"})
IN_PLACE_SUMS = frozenset({"add_", "sub_"})
"""The same, written to an activation."""
NORMS = frozenset(
    {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm"}
)
"""By fixed statistics a product with one parameter and a sum with another."""
PIECEWISE = frozenset(
    {
        *("relu", "relu_", "leaky_relu", "threshold", "hardtanh", "abs", "neg", "clamp", "clamp_min"),
        *("max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum", "cat", "clone"),
        *("constant_pad_nd",),
    }
)
"""Piecewise linear in what they are given."""


class _NotAffine(Exception):
    """An operation that is not known to keep the outputs affine in each parameter entry."""


class _Tracer(TorchDispatchMode):
    """Follows parameters and what depends on them through a forward pass; anything that is not on the lists raises.

    Tensors are known by their storage, which views share. The pass runs on copies of the parameters, so that whatever touches the
    model's own, as a view that was made earlier does, is no parameter of this pass.
    """

    def __init__(self, parameters: Mapping[str, Tensor], own: Iterable[Tensor]) -> None:
        super().__init__()
        self._owner: dict[int, str | None] = {_storage(tensor): name for name, tensor in parameters.items()}
        """Name of the parameter that a tensor is a view of; None for an activation. Others depend on no parameter."""
        self._foreign = {_storage(tensor) for tensor in own}
        self._alive: list[Any] = list(parameters.values())  # a storage is known as long as it lives
        self._used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        owners = [self._owner[_storage(tensor)] for tensor in given if self._known(tensor, name)]
        made = func(*args, **(kwargs or {}))
        if not owners:
            return made
        direct = [owner for owner in owners if owner is not None]
        if name not in VIEWS:
            self._refuse_second_use(direct, name)
            if name in PRODUCTS:
                first = PRODUCTS[name]
                pair = [self._owner[_storage(x)] for x in args[first : first + 2] if self._known(x, name)]
                if len(pair) == 2 and (pair[0] is None) == (pair[1] is None):
                    raise _NotAffine(f"{name} of two activations, or of two parameters")
            elif name in NORMS:
                self._refuse_batch_statistics(name, args, kwargs)
            elif name in IN_PLACE_SUMS:
                self._refuse_written_parameter(name, args[0])
            elif name not in SUMS and (name not in PIECEWISE or direct):
                raise _NotAffine(name)
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            self._owner[_storage(tensor)] = owners[0] if name in VIEWS else None
            self._alive.append(tensor)
        return made

    def _known(self, tensor: Any, name: str) -> bool:
        """Whether a tensor depends on a parameter; one that may, but on a path that was not seen, raises."""
        if not isinstance(tensor, Tensor):
            return False
        if _storage(tensor) in self._owner:
            return True
        if tensor.requires_grad or _storage(tensor) in self._foreign:
            raise _NotAffine(f"{name}: a tensor depends on parameters in a way that was not seen")
        return False

    def _refuse_batch_statistics(self, name: str, args: Any, kwargs: Any) -> None:
        """By statistics of the batch, or such that depend on a parameter, it is no product; nor is that of two activations one."""
        training = name != "_native_batch_norm_legit_no_training" and (len(args) < 6 or bool(args[5]))
        depends = any(self._known(tensor, name) for tensor in args[3:5])
        x, weight = (self._owner[_storage(tensor)] if self._known(tensor, name) else "" for tensor in args[:2])
        if training or kwargs or depends or x not in (None, "") or weight is None:
            raise _NotAffine(f"{name}: by statistics of the batch, or not of an activation and a parameter")

    def _refuse_written_parameter(self, name: str, target: Any) -> None:
        if not self._known(target, name) or self._owner[_storage(target)] is not None:
            raise _NotAffine(f"{name}: something that is no activation is written to")

    def _refuse_second_use(self, direct: list[str], name: str) -> None:
        for owner in direct:
            if owner in self._used:
                raise _NotAffine(f"{name}: {owner} is used twice")
            self._used.add(owner)


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor lies in."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _refuse_custom_functions(outputs: Tensor) -> None:
    """What a torch.autograd.Function says of its derivatives need not be what its forward pass computes."""
    waiting, seen = [outputs.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            raise _NotAffine(f"{type(node).__name__} is the backward pass of a custom function")
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]


def is_affine_in_each_entry(objective: Objective) -> bool:
    """Whether d^2 z / d theta_j^2 = 0 almost everywhere for the outputs z and every parameter entry theta_j.

    It holds if every parameter tensor is used once, as a factor of something that it is not part of or as an addend, and all else is sums
    and piecewise linear maps: then z is piece by piece a polynomial of degree at most one in each entry by itself. That is read off
    the operations of a forward pass over all batches, with gradients on, as in products; one that is not on a list, a product of two
    activations, a custom autograd function, and a tensor that depends on parameters in a way that was not seen give False.

    Args:
        objective: Its model is run once; parameters that are left out of the space or frozen count, too.

    Returns:
        True only if it was shown. False also for attention and for other operations that are on no list, though it may hold there.

    Cost: one forward pass over the data, with the graph of a batch; a copy of the parameters.
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
    own = dict(objective.model.named_parameters())
    copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in own.items()}
    try:
        with objective.measuring(), torch.enable_grad():
            for index in range(len(objective.batches)):
                with _Tracer(copies, own.values()):
                    outputs, _ = outputs_at(objective, index, copies)
                if not isinstance(outputs, Tensor):
                    return False
                _refuse_custom_functions(outputs)
    except (_NotAffine, CurvkitError, RuntimeError):
        return False
    return True
