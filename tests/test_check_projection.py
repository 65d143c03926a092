"""The contract of projections: sound ones keep it, and every property has a planted fault that breaks it alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
from oracles import normal
from projections import HandMask, orthonormal, pairs_of, space_of
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.projection.sharp_complement import SharpComplement
from curvkit.testing import check_projection

SPACE = space_of(weight=(6, 5), bias=(7,))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Update = Mapping[str, Tensor]


def like(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return SPACE.unflatten(torch.zeros(SPACE.n, dtype=dtype))


def mask() -> HandMask:
    return HandMask(SPACE, normal(SPACE.n) < 0.3)


def complement() -> SharpComplement:
    return SharpComplement(pairs_of(orthonormal(SPACE.n, 3), SPACE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", [mask, complement])
def test_sound_projections_pass(made: Callable[[], Any], dtype: torch.dtype):
    for seed in range(5):
        check_projection(made(), like(dtype), seed=seed)


def test_nothing_and_everything_pass():
    for keep in (torch.zeros(SPACE.n).bool(), torch.ones(SPACE.n).bool()):
        check_projection(HandMask(SPACE, keep), like())


def test_the_check_leaves_random_states_and_its_argument_alone():
    given, states = like(), (torch.get_rng_state(), numpy.random.get_state()[1])
    check_projection(complement(), given)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert numpy.array_equal(numpy.random.get_state()[1], states[1])
    assert not any(tensor.any() for tensor in given.values())


# ---- one fault for each property ------------------------------------------------------------------------------------


class Spoiled(HandMask):
    """The sound mask, with something done to what it returns; `wrong` sees the update and the result."""

    def __init__(self, wrong: Callable[[Update, dict[str, Tensor]], Any]) -> None:
        super().__init__(SPACE, normal(SPACE.n) < 0.3)
        self.wrong = wrong

    def __call__(self, update: Update) -> Any:
        found = super().__call__(update)
        return self.wrong(update, found)


def each(change: Callable[[Tensor], Tensor]) -> Spoiled:
    return Spoiled(lambda update, found: {name: change(tensor) for name, tensor in found.items()})


def flat_map(change: Callable[[Tensor], Tensor]) -> Spoiled:
    """In place of the mask, another map of the joined update."""
    return Spoiled(lambda update, found: SPACE.unflatten(change(SPACE.flatten(update))))


def counting() -> Spoiled:
    calls: list[int] = []

    def wrong(update: Update, found: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        return {name: tensor * (1 + 1e-7 * (len(calls) % 2)) for name, tensor in found.items()}

    return Spoiled(wrong)


def reused() -> Spoiled:
    kept: dict[str, Tensor] = {}

    def wrong(update: Update, found: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in found.items():
            kept.setdefault(name, tensor.clone()).copy_(tensor)
        return kept

    return Spoiled(wrong)


def writing(update: Update, found: dict[str, Tensor]) -> dict[str, Tensor]:
    update["bias"].mul_(2.0)
    return found


def dropping(update: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    update["bias"] = update["bias"].clone()
    return found


def drawing(update: Update, found: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.rand(1)
    return found


def of_global_state(update: Update, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Noise of one rounding from the global state, which is put back."""
    with torch.random.fork_rng(devices=[]):
        return {name: tensor * (1 + 1e-7 * torch.randn_like(tensor)) for name, tensor in found.items()}


def oblique(u: Tensor) -> Tensor:
    """P = a b' with b'a = 1: idempotent, not symmetric."""
    a, b = torch.ones_like(u), torch.zeros_like(u)
    b[0] = 1.0
    return a * (b @ u)


class Unrefusing(HandMask):
    """Takes what does not fit."""

    def __init__(self, fault: str) -> None:
        super().__init__(SPACE, normal(SPACE.n) < 0.3)
        self.fault = fault

    def __call__(self, update: Update) -> dict[str, Tensor]:
        wide = update["weight"].ndim == 3
        if self.fault == "shape" and wide:
            return dict(update)
        if self.fault == "names" and len(update) > 2:
            return dict(update)
        if self.fault == "error" and wide:
            raise RuntimeError("shapes do not fit")
        return super().__call__(update)


def with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


FAULTS: dict[str, tuple[Any, str]] = {
    "shrinks": (each(lambda p: 0.99 * p), "'idempotent' does not hold: ||P(Pu) - Pu|| is"),
    "shrinks by little": (each(lambda p: (1 - 3e-5) * p), "'idempotent'"),
    "rotates": (flat_map(lambda u: u.flip(0)), "'idempotent'"),
    "absolute": (each(torch.abs), "'linear' does not hold: ||P(u + 0.7 v) - Pu - 0.7 Pv|| is"),
    "clips": (each(lambda p: p.clamp(-2.0, 2.0)), "'linear'"),
    "bends by little": (each(lambda p: p + 1e-4 * p.abs()), "'linear' does not hold: ||P(u"),
    "constant": (each(lambda p: p + 1e-7), "'linear' does not hold: ||P 0|| is"),
    "oblique": (flat_map(oblique), "'symmetric' does not hold: |u.Pv - v.Pu| is"),
    "not repeatable": (counting(), "'repeatable' does not hold: two projections of the same update differ"),
    "global random numbers": (Spoiled(of_global_state), "'repeatable'"),
    "moves the random state": (Spoiled(drawing), "'nothing is disturbed' does not hold: a projection moved torch's"),
    "reuses memory": (reused(), "'results are kept' does not hold: a later projection overwrote"),
    "returns the update": (Spoiled(lambda update, found: dict(update)), "'weight' lies in the memory of the update"),
    "returns a view": (Spoiled(lambda u, f: {**f, "bias": u["bias"][:]}), "'bias' lies in the memory of the update"),
    "writes": (Spoiled(writing), "'the update is left alone' does not hold: it was changed in place"),
    "replaces": (Spoiled(dropping), "'the update is left alone'"),
    "no mapping": (Spoiled(lambda update, found: list(found.values())), "a list was returned; allowed: a mapping"),
    "no tensors": (Spoiled(lambda update, found: dict.fromkeys(found, 0.0)), "a dict was returned; allowed: a mapping"),
    "drops a name": (Spoiled(lambda u, f: {"weight": f["weight"]}), "update and result do not both have 'bias'"),
    "adds a name": (Spoiled(lambda u, f: {**f, "new": f["bias"]}), "update and result do not both have 'new'"),
    "shape": (each(lambda p: p[None]), "'weight' has shape [1, 6, 5]; allowed: shape [6, 5]"),
    "dtype": (each(Tensor.double), "'weight' has dtype torch.float64; allowed: dtype torch.float32"),
    "device": (each(lambda p: p.to("meta")), "'weight' has device meta; allowed: device cpu"),
    "graph": (each(Tensor.requires_grad_), "'weight' has requires_grad True; allowed: requires_grad False"),
    "NaN": (each(with_nan), "'finite' does not hold: 'weight' has NaN or infinite entries"),
    "takes any shape": (Unrefusing("shape"), "an update with 'weight' with one dimension more was taken"),
    "takes any name": (Unrefusing("names"), "an update with one name more was taken"),
    "another error": (Unrefusing("error"), "raised RuntimeError('shapes do not fit'); allowed: InvalidArgument"),
    "no function": (3, "'a projection' does not hold: a int cannot be called"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault: str):
    wrong, said = FAULTS[fault]
    with pytest.raises(InvalidArgument, match="^check_projection: .*" + re.escape(said)) as raised:
        check_projection(wrong, like())
    assert str(raised.value).endswith("as an equation.")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tenth_is_found_in_every_dtype(dtype: torch.dtype):
    with pytest.raises(InvalidArgument, match="'idempotent' does not hold"):
        check_projection(each(lambda p: 0.9 * p), like(dtype))


@pytest.mark.parametrize("given", [{}, {"w": torch.zeros(3).long()}, {"w": 0.0}])
def test_what_is_no_update_is_refused(given: Any):
    with pytest.raises(InvalidArgument, match="'an update' does not hold: `like` has no tensors, or some that are not"):
        check_projection(mask(), given)


def test_the_seed_is_checked():
    with pytest.raises(InvalidArgument, match="seed=-1 must be an integer"):
        check_projection(mask(), like(), seed=-1)
