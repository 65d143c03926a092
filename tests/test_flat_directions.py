"""Flat directions by a mask and by the complement of an eigenspace, asked for in one way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CASES
from oracles import relative

from curvkit.errors import InvalidArgument
from curvkit.estimators import Exact, Fisher, Lanczos
from curvkit.objectives import Objective
from curvkit.operators import Hessian
from curvkit.projection import (
    ComplementOf,
    Eigenspace,
    FlatDirections,
    FlatMask,
    FlatRule,
    Intersection,
    MaskOf,
    Projected,
    Projection,
    SharpComplement,
    directions,
)
from curvkit.testing import check_operator, check_projection

RULE = FlatRule(0.6)


def mlp() -> Objective:
    return CASES["mlp"]().objective()


def test_an_estimator_gives_the_mask_of_its_diagonal():
    """Brute force: the dense diagonal, sorted."""
    objective = mlp()
    H = Hessian(objective)
    diagonal = H.matmat(torch.eye(H.n, dtype=torch.float64)).diagonal().abs()
    flat = directions(Exact(), objective, RULE, seed=0)
    keep = torch.zeros(H.n).bool()
    keep[diagonal.argsort()[: int(0.6 * H.n)]] = True
    assert isinstance(flat, FlatMask)
    assert torch.equal(H.space.flatten(flat.view()), keep)
    ones = {name: torch.ones_like(p) for name, p in zip(H.space.names, objective.tensors, strict=True)}
    assert torch.equal(H.space.flatten(flat(ones)) == 1.0, keep)
    check_projection(flat, ones)
    check_projection(flat.inverted(), ones)
    check_operator(Projected(H, flat), objective=objective)


def test_a_search_gives_a_mask_alone_and_a_complement_where_that_is_asked_for():
    objective, search = mlp(), Lanczos(rank=3)
    assert isinstance(directions(search, objective, RULE, seed=0), FlatMask)
    flat = directions(ComplementOf(search), objective, RULE, seed=0)
    assert isinstance(flat, SharpComplement)
    V, expected = flat.eigenpairs.vectors, search.eigenpairs(objective, seed=0).vectors
    assert V is not None
    assert expected is not None
    assert torch.equal(V, expected)
    assert isinstance(flat.sharp, Eigenspace)


@pytest.mark.parametrize("source", [Fisher(), Lanczos(rank=2), ComplementOf(Lanczos(rank=2)), MaskOf(Fisher())])
def test_every_source_gives_a_projection_and_the_same_one_for_the_same_seed(source: Any):
    objective = mlp()
    like = objective.parameters.unflatten(objective.gradient())
    one, again = (directions(source, objective, RULE, seed=5) for _ in range(2))
    assert isinstance(one, Projection)
    check_projection(one, like)
    assert all(torch.equal(one(like)[name], again(like)[name]) for name in like)


def test_the_protocol_tells_the_two_apart():
    assert isinstance(ComplementOf(Lanczos()), FlatDirections)
    assert isinstance(MaskOf(Fisher()), FlatDirections)
    assert not isinstance(Fisher(), FlatDirections)
    assert eval(repr(ComplementOf(Lanczos(rank=2)))) == ComplementOf(Lanczos(rank=2))


def test_groups_reach_the_mask():
    """Each tensor a group of its own is the rule for tensors."""
    objective = mlp()
    groups = {name: name for name in objective.parameters.names}
    by_group = directions(Exact(), objective, FlatRule(0.6, scope="group"), groups=groups, seed=0)
    by_tensor = directions(Exact(), objective, FlatRule(0.6, scope="tensor"), seed=0)
    assert isinstance(by_group, FlatMask)
    assert isinstance(by_tensor, FlatMask)
    assert all(torch.equal(by_group.view()[name], by_tensor.view()[name]) for name in groups)


def test_flat_coordinates_without_the_sharpest_direction_among_them():
    """The eigenvector within the mask, its complement, and both: the gradient loses exactly these parts."""
    from dataclasses import replace

    from curvkit.linalg import lanczos

    objective = mlp()
    mask, H = directions(Exact(), objective, RULE, seed=0), Hessian(objective)
    pairs = lanczos.eigenpairs(Projected(H, mask), 1, which="magnitude", tolerance=1e-12, seed=0)
    g = H.space.unflatten(objective.gradient())
    both = Intersection(mask, SharpComplement(replace(pairs, space=H.space)), like=g)
    within, v = H.space.flatten(mask(g)), pairs.vectors
    assert v is not None
    assert relative(H.space.flatten(both(g)), within - v[:, 0] * (v[:, 0] @ within)) <= 1e-10
    check_projection(both, g)


@dataclass(frozen=True)
class Everything:
    """Directions of the user's own."""

    def directions(
        self, objective: Objective, rule: FlatRule, *, seed: int | None = None, groups: Any = None
    ) -> Projection:
        return lambda update: {name: u.clone() for name, u in update.items()}


def test_directions_of_ones_own():
    flat = directions(Everything(), mlp(), RULE, seed=0)
    assert flat({"w": torch.ones(2)})["w"].tolist() == [1.0, 1.0]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "groups", "said"),
    [
        (FlatRule(0.6, scope="tensor"), None, "scope='tensor' asks for flat directions within parts of the parameters"),
        (FlatRule(0.6, scope="group"), {"w": "a"}, "scope='group' with groups asks for flat directions within parts"),
        (RULE, {"w": "a"}, "scope='global' with groups asks for flat directions within parts"),
    ],
)
def test_a_complement_of_parts_is_refused(rule: FlatRule, groups: Any, said: str):
    with pytest.raises(InvalidArgument, match=re.escape("ComplementOf: " + said)):
        directions(ComplementOf(Lanczos()), mlp(), rule, groups=groups)


@pytest.mark.parametrize(
    ("wrong", "shown"), [(Fisher, "the class Fisher"), (0.6, "float"), (None, "NoneType"), (FlatRule(0.6), "FlatRule")]
)
def test_what_finds_no_directions_is_refused(wrong: Any, shown: str):
    with pytest.raises(InvalidArgument, match=f"^directions: source={shown} has neither estimate"):
        directions(wrong, mlp(), RULE)
    with pytest.raises(InvalidArgument, match=f"^MaskOf: estimator={shown} is no estimator of a diagonal"):
        MaskOf(wrong)
    with pytest.raises(InvalidArgument, match=f"^ComplementOf: search={shown} is no Lanczos"):
        ComplementOf(wrong)


def test_an_estimator_alone_has_no_eigenspace():
    with pytest.raises(
        InvalidArgument, match="^ComplementOf: search=Fisher is no Lanczos: only that finds an eigenspace"
    ):
        ComplementOf(Fisher())  # pyright: ignore[reportArgumentType]
