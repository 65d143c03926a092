"""The contract of projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkit import seeds
from curvkit.errors import InvalidArgument
from curvkit.objectives.surroundings import random_state
from curvkit.projection.named_vectors import distance, drawn, inner, length, rounding
from curvkit.projection.protocol import Projection
from curvkit.testing.contract import Contract

CONTRACT = Contract(
    "check_projection",
    "Mend the projection; the docstring of curvkit.testing.check_projection has each property as an equation.",
)


def check_projection(projection: Projection, like: Mapping[str, Tensor], *, seed: int = 0) -> None:
    """Check that a projection keeps what curvkit relies on: linear, symmetric, idempotent, repeatable, and without side effects.

    With updates u and v of independent standard normal numbers:

        ||P(u + c v) - P u - c P v|| <= (1 + c) l     |u'(P v) - v'(P u)| <= l max(||u||, ||v||)     ||P P u - P u|| <= l
        P u = P u bit for bit on the CPU, within l on other devices     P 0 = 0        l = e max(||u||, ||v||)

    where e is 4 eps of the coarsest dtype and 64 eps of the arithmetic, which must be float32 or better. Results have the names, shapes,
    dtypes and devices of the update, are finite, need no gradient and have memory of their own; update and earlier results stay as they
    were; the global random state is neither used nor moved. An update with a tensor of another shape, or with a name that there is not,
    is refused by `InvalidArgument`.

    Args:
        projection: Any `Projection`.
        like: An update that fits, for names, shapes, dtypes and devices; its numbers are not read.
        seed: Of the updates.

    Raises:
        InvalidArgument: Naming the first property that fails.

    Cost: seven projections.

    Example:
        >>> def first(update):
        ...     if update.keys() != {"w"} or update["w"].shape != (2,):
        ...         raise InvalidArgument("first: pass {'w': a tensor of shape [2]}.")
        ...     return {"w": update["w"] * torch.tensor([1.0, 0.0])}
        >>> check_projection(first, {"w": torch.zeros(2)})
    """
    seeds.settle(seed)
    if not callable(projection):
        CONTRACT.refuse("a projection", f"a {type(projection).__name__} cannot be called", "__call__(update)")
    if not like or not all(isinstance(u, Tensor) and u.dtype.is_floating_point for u in like.values()):
        CONTRACT.refuse(
            "an update", "`like` has no tensors, or some that are not floating-point", "real tensors by name"
        )
    probes = _Probes.drawn(projection, like, seed)
    _check_laws(probes)
    _check_repeatable(probes)
    _check_refusals(probes)


@dataclass(frozen=True, eq=False)
class _Probes:
    """Two random updates with their projections."""

    projection: Projection
    u: dict[str, Tensor]
    v: dict[str, Tensor]
    Pu: Mapping[str, Tensor]
    Pv: Mapping[str, Tensor]

    @classmethod
    def drawn(cls, projection: Projection, like: Mapping[str, Tensor], seed: int) -> _Probes:
        u, v = (drawn(like, seed, "check projection", index) for index in range(2))
        Pu = _projected(projection, u)
        kept = {name: tensor.clone() for name, tensor in Pu.items()}
        Pv = _projected(projection, v)
        if not _same(kept, Pu):
            CONTRACT.refuse(
                "results are kept", "a later projection overwrote the tensors of an earlier one", "tensors of its own"
            )
        return cls(projection, u, v, Pu, Pv)

    @property
    def size(self) -> float:
        """Length of the updates."""
        return max(length(self.u), length(self.v))

    @property
    def limit(self) -> float:
        """What rounding may make of a difference, l."""
        return rounding(self.u) * self.size


def _check_laws(probes: _Probes) -> None:
    u, v, Pu, Pv, limit, c = probes.u, probes.v, probes.Pu, probes.Pv, probes.limit, 0.7
    P_sum = _projected(probes.projection, {name: u[name] + c * v[name] for name in u})
    left = {name: P_sum[name].double() - Pu[name].double() - c * Pv[name].double() for name in u}
    CONTRACT.compare("linear", f"||P(u + {c} v) - Pu - {c} Pv||", length(left), (1 + c) * limit)
    zero = _projected(probes.projection, {name: torch.zeros_like(tensor) for name, tensor in u.items()})
    CONTRACT.compare("linear", "||P 0||", length(zero), 0.0)
    CONTRACT.compare("symmetric", "|u.Pv - v.Pu|", abs(inner(u, Pv) - inner(v, Pu)), limit * probes.size)
    CONTRACT.compare("idempotent", "||P(Pu) - Pu||", distance(_projected(probes.projection, dict(Pu)), Pu), limit)


def _check_repeatable(probes: _Probes) -> None:
    with random_state():
        torch.rand(7)  # another random state
        again = _projected(probes.projection, probes.u)
    if all(tensor.device.type == "cpu" for tensor in again.values()):
        if not _same(probes.Pu, again):
            CONTRACT.refuse("repeatable", "two projections of the same update differ", "the same bits")
    else:
        CONTRACT.compare("repeatable", "||Pu - Pu|| of two calls", distance(again, probes.Pu), probes.limit)


def _check_refusals(probes: _Probes) -> None:
    name, u = next(iter(probes.u.items()))
    for what, wrong in (
        (f"{name!r} with one dimension more", {**probes.u, name: u[None]}),
        ("one name more", {**probes.u, f"{name}, and another": u}),
    ):
        try:
            probes.projection(wrong)
        except InvalidArgument:
            continue
        except Exception as error:  # whatever a stranger's projection raises
            raise InvalidArgument(
                CONTRACT.said("wrong updates are refused", f"an update with {what} raised {error!r}", "InvalidArgument")
            ) from error
        CONTRACT.refuse("wrong updates are refused", f"an update with {what} was taken", "InvalidArgument")


def _projected(projection: Projection, update: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A projection, with the checks that hold for each."""
    given, before = dict(update), {name: tensor.clone() for name, tensor in update.items()}
    state = torch.get_rng_state()
    found: Any = projection(update)
    if not torch.equal(torch.get_rng_state(), state):
        CONTRACT.refuse("nothing is disturbed", "a projection moved torch's random state", "the state as it was")
    if given.keys() != update.keys() or any(update[n] is not given[n] for n in given) or not _same(before, update):
        CONTRACT.refuse("the update is left alone", "it was changed in place", "the update as it was")
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        CONTRACT.refuse("a projected update", f"a {type(found).__name__} was returned", "a mapping of names to tensors")
    if set(found) != set(update):
        shown = ", ".join(sorted(map(repr, set(found) ^ set(update)))[:4])
        CONTRACT.refuse("names are kept", f"update and result do not both have {shown}", "the names of the update")
    for name, u in update.items():
        _check_tensor(name, found[name], u)
    return found


def _check_tensor(name: str, found: Tensor, u: Tensor) -> None:
    for what, got, allowed in (
        ("shape", list(found.shape), list(u.shape)),
        ("dtype", found.dtype, u.dtype),
        ("device", found.device, u.device),
        ("requires_grad", found.requires_grad, False),
    ):
        if got != allowed:
            CONTRACT.refuse("shape, dtype and device are kept", f"{name!r} has {what} {got}", f"{what} {allowed}")
    if not bool(torch.isfinite(found).all()):
        CONTRACT.refuse("finite", f"{name!r} has NaN or infinite entries", "finite numbers for finite ones")
    if u.numel() and found.untyped_storage().data_ptr() == u.untyped_storage().data_ptr():
        CONTRACT.refuse("results are kept", f"{name!r} lies in the memory of the update", "tensors of its own")


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether they have the same bits."""
    return all(torch.equal(_bits(one[name]), _bits(other[name])) for name in one)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
