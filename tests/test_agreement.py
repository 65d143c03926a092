"""Agreement of masks, diagonals and subspaces against brute force, scipy and simulation; planted agreement and planted chance."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from oracles import classes, normal, seeded, surroundings
from torch import Tensor, nn

from curvkit import BatchLoss, Objective, ParameterSpace, seeds
from curvkit.errors import InvalidArgument
from curvkit.estimators import EmpiricalFisher, Exact, Fisher, Lanczos, OptimizerState
from curvkit.projection import chance, matching, ranks, spanning
from curvkit.projection.agreeing_diagonals import diagonal_agreement
from curvkit.projection.agreeing_masks import mask_agreement
from curvkit.projection.chance import Cell, jaccard_by_chance
from curvkit.projection.flat_mask import FlatMask
from curvkit.projection.flat_rule import FlatRule
from curvkit.projection.noise import noise_floor
from curvkit.projection.ranks import RankCorrelation, spearman
from curvkit.projection.sharp_mass import mask_subspace_overlap
from curvkit.projection.subspaces import subspace_overlap
from curvkit.results import Cost, DiagonalEstimate, Eigenpairs, plain

SHAPES = {"a.weight": (30, 20), "a.bias": (30,), "scale": (), "b.weight": (9, 30)}


def cut_up(flat: Tensor, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    return {name: p.view(shape) for (name, shape), p in zip(shapes.items(), flat.split(sizes), strict=True)}


def estimate(values: dict[str, Tensor], stderr: dict[str, Tensor] | None = None) -> DiagonalEstimate:
    return DiagonalEstimate(values, stderr, "hessian", "by hand", Cost(1.0, 0.0))


def numbers(found: Any) -> Any:
    """As JSON reads it back."""
    return json.loads(json.dumps(plain(found), allow_nan=False))


# ---- chance ---------------------------------------------------------------------------------------------------------


def all_masks(n: int, k: int) -> Tensor:
    return torch.tensor([[i in chosen for i in range(n)] for chosen in itertools.combinations(range(n), k)]).view(-1, n)


@pytest.mark.parametrize(
    "sizes", [[(6, 3, 2)], [(5, 0, 2)], [(4, 4, 3)], [(4, 2, 2), (3, 1, 2)], [(3, 2, 1), (2, 0, 1), (3, 3, 1)]]
)
def test_chance_of_jaccard_is_the_mean_over_all_pairs_of_sets(sizes: list[tuple[int, int, int]]):
    """Brute force: every pair of sets of these sizes."""

    def every(which: int) -> Tensor:
        choices = [all_masks(size[0], size[which]) for size in sizes]
        return torch.stack([torch.cat(chosen) for chosen in itertools.product(*choices)])

    A, B = every(1)[:, None].double(), every(2)[None].double()
    both, either = (A * B).sum(2), ((A + B) > 0).sum(2)
    J = both / either
    mean, spread = jaccard_by_chance([Cell(*size) for size in sizes])
    assert mean == pytest.approx(J.mean().item(), abs=1e-14)
    assert spread == pytest.approx(J.std(correction=0).item(), abs=1e-14)


def convolved(sizes: list[tuple[int, int, int]]) -> tuple[float, float]:
    """By scipy's hypergeometric distributions over all their values."""
    p = np.ones(1)
    for n, a, b in sizes:
        p = np.convolve(p, scipy.stats.hypergeom(n, a, b).pmf(np.arange(min(a, b) + 1)))
    m, s = np.arange(len(p)), sum(a + b for _, a, b in sizes)
    J = m / (s - m)
    mean = (p * J).sum()
    return mean, math.sqrt((p * (J - mean) ** 2).sum())


@pytest.mark.parametrize(
    "sizes",
    [[(1000, 400, 100)], [(20000, 6000, 12000)], [(700, 300, 20), (50, 49, 49), (900, 10, 890), (300, 0, 5)]],
)
def test_chance_of_jaccard_against_scipy(sizes: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chance, "EXPANSION_ERROR", -1.0)
    mean, spread = jaccard_by_chance([Cell(*size) for size in sizes])
    assert (mean, spread) == pytest.approx(convolved(sizes), rel=1e-10)


def test_the_expansion_keeps_its_bound(monkeypatch: pytest.MonkeyPatch):
    cells = [Cell(400 + i, 40 + i % 7, 60 - i % 5) for i in range(200)]
    expanded = jaccard_by_chance(cells)
    s, mu, variance = sum(c.a + c.b for c in cells), sum(c.mean for c in cells), sum(c.variance for c in cells)
    bound = chance._remainder(cells, s, s - mu, variance)
    assert bound < 1e-6
    monkeypatch.setattr(chance, "EXPANSION_ERROR", -1.0)
    exact = jaccard_by_chance(cells)
    assert exact != expanded  # another path
    assert exact[0] is not None
    assert abs(expanded[0] - exact[0]) <= bound  # type: ignore[operator]
    assert expanded[1] == pytest.approx(exact[1], rel=1e-3)  # to first order


def test_chance_for_ten_billion_coordinates():
    """J concentrates: E J = gamma^2 / (2 gamma - gamma^2) up to 1 / n."""
    mean, spread = jaccard_by_chance([Cell(10**10, 4 * 10**9, 4 * 10**9)])
    assert mean == pytest.approx(0.16 / 0.64, abs=1e-9)
    assert spread == pytest.approx(0.8 / 0.64**2 * math.sqrt(0.4**2 * 0.6**2 / 10**10), rel=1e-6)


def test_two_empty_sets_have_no_index():
    assert jaccard_by_chance([Cell(5, 0, 0)]) == (None, None)


def test_a_set_beyond_its_cell_is_refused():
    with pytest.raises(
        InvalidArgument,
        match=r"Cell\(size=3, a=4, b=1\) has a set larger than itself, or below zero. Pass sizes in \[0, 3\]",
    ):
        jaccard_by_chance([Cell(3, 4, 1)])


# ---- masks ----------------------------------------------------------------------------------------------------------


def random_mask(shares: dict[str, float], seed: int) -> dict[str, Tensor]:
    """As many flat coordinates in each tensor, at random."""
    found = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        order = torch.randperm(math.prod(shape), generator=seeds.generator(seed, "mask", index))
        found[name] = (order < round(shares[name] * math.prod(shape))).view(shape)
    return found


def test_masks_against_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matching, "PIECE", 37)  # pieces within tensors, and a last one that is shorter
    a, b = (random_mask(dict.fromkeys(SHAPES, share), seed) for share, seed in ((0.6, 0), (0.7, 1)))
    turned = {name: b[name].to(torch.uint8) for name in reversed(b)}
    found = mask_agreement(a, turned)
    for row, names in [(found, list(SHAPES)), *((row, [row.name]) for row in found.layers)]:
        flat_a, flat_b = ({(n, i) for n in names for i in m[n].reshape(-1).nonzero()[:, 0].tolist()} for m in (a, b))
        every = {(n, i) for n in names for i in range(math.prod(SHAPES[n]))}
        sharp_a, sharp_b = every - flat_a, every - flat_b
        assert (row.numel, row.flat_a, row.flat_b, row.both_flat) == (
            len(every),
            len(flat_a),
            len(flat_b),
            len(flat_a & flat_b),
        )
        for got, part, whole in (
            (row.flat, flat_a & flat_b, flat_a | flat_b),
            (row.sharp, sharp_a & sharp_b, sharp_a | sharp_b),
            (row.recall, sharp_a & sharp_b, sharp_b),
            (row.precision, sharp_a & sharp_b, sharp_a),
        ):
            assert got.value == (len(part) / len(whole) if whole else None)
            assert (got.within_layers is None) == (row is not found or not whole)
        assert row.recall.chance == (pytest.approx(len(sharp_a) / len(every)) if sharp_b else None)
    assert [row.name for row in found.layers] == list(SHAPES)
    assert numbers(found)["layers"][0]["sharp"]["chance"] == found.layers[0].sharp.chance
    assert repr(found).startswith("MaskAgreement(sharp: Jaccard 0.")


def test_masks_that_are_the_same_agree_by_construction():
    mask = random_mask(dict.fromkeys(SHAPES, 0.5), 0)
    found = mask_agreement(mask, {name: flat.clone() for name, flat in mask.items()})
    assert [found.flat.value, found.sharp.value, found.recall.value, found.precision.value] == [1.0] * 4
    assert found.sharp.chance is not None
    assert found.sharp.chance < 0.4


@pytest.mark.slow
def test_masks_that_agree_by_chance_alone():
    """The mean over 120 pairs of random masks, in all and within layers, lies within 5 standard errors of what is said."""
    like = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    whole, rule = [], FlatRule(0.8)
    for seed in range(0, 240, 2):
        one, other = (FlatMask.random(like, rule, seed=seed + i) for i in range(2))
        whole.append(mask_agreement(one, other))
    for of in ("flat", "sharp", "recall", "precision"):
        shares = [getattr(found, of) for found in whole]
        spread = shares[0].spread
        values = torch.tensor([share.value for share in shares], dtype=torch.float64)
        assert abs(values.mean().item() - shares[0].chance) < 5 * spread / len(values) ** 0.5
        assert values.std().item() == pytest.approx(spread, rel=0.33)  # 5 standard errors of 1 / sqrt(2 m)


def test_masks_that_agree_in_nothing_but_layers():
    """One layer is nearly all flat and one nearly all sharp, in both masks, at random within: far above chance, at chance within layers."""
    shares = {"a.weight": 0.95, "a.bias": 0.5, "scale": 1.0, "b.weight": 0.1}
    values = {of: [] for of in ("flat", "sharp", "recall", "precision")}
    for seed in range(200):
        found = mask_agreement(random_mask(shares, 2 * seed), random_mask(shares, 2 * seed + 1))
        for of, kept in values.items():
            kept.append(getattr(found, of).value)
    for of, kept in values.items():
        told, seen = getattr(found, of), torch.tensor(kept, dtype=torch.float64)
        assert seen.mean().item() > told.chance + 0.08
        assert abs(seen.mean().item() - told.within_layers) < 5 * seen.std().item() / len(kept) ** 0.5


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_masks_without_a_flat_or_a_sharp_coordinate(share: float):
    mask = random_mask(dict.fromkeys(SHAPES, share), 0)
    found = mask_agreement(mask, mask)
    empty, full = (found.flat, found.sharp) if share == 0.0 else (found.sharp, found.flat)
    assert (empty.value, empty.chance, full.value, full.chance) == (None, None, 1.0, 1.0)
    assert (found.recall.value is None) == (share == 1.0)
    assert "none of them sharp" in repr(found) or share == 0.0
    numbers(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: {n: t for n, t in m.items() if n != "a.bias"},
            "mask_agreement: 'a.bias' is in the first and not in the second.",
        ),
        (lambda m: m | {"c": m["scale"]}, "mask_agreement: 'c' is in the second and not in the first."),
        (
            lambda m: m | {"b.weight": m["b.weight"].T},
            "mask_agreement: 'b.weight' has shape (9, 30) in the first and (30, 9) in the second. Compare what belongs",
        ),
        (
            lambda m: m | {"scale": m["scale"].float()},
            "the mask 'scale' has dtype torch.float32; masks are bool, or uint8 of 0 and 1",
        ),
        (
            lambda m: m | {"a.bias": m["a.bias"].to(torch.uint8) * 255},
            "the mask 'a.bias' has an entry 255; masks are bool",
        ),
    ],
)
def test_masks_of_different_models_are_refused(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str):
    mask = random_mask(dict.fromkeys(SHAPES, 0.5), 0)
    with pytest.raises(InvalidArgument) as caught:
        mask_agreement(mask, change(mask))
    assert said in str(caught.value)


def test_masks_of_nothing_are_refused():
    with pytest.raises(
        InvalidArgument, match="mask_agreement: there is no coordinate in .'w'.. Give one non-empty tensor at least."
    ):
        mask_agreement({"w": torch.zeros(0, dtype=torch.bool)}, {"w": torch.zeros(0, dtype=torch.bool)})


# ---- diagonals ------------------------------------------------------------------------------------------------------


def heavy(n: int, seed: int) -> Tensor:
    return normal(n, seed=seed) ** 3


RANKED: dict[str, tuple[Tensor, Tensor]] = {
    "spread out": (heavy(5000, 0), heavy(5000, 0) + 0.3 * heavy(5000, 1)),
    "opposite order": (heavy(5000, 0), 1 / heavy(5000, 0)),
    "unrelated": (heavy(5000, 0), heavy(5000, 1)),
    "half zeros": (heavy(5000, 0) * (normal(5000, seed=2) > 0), heavy(5000, 1).abs()),
    "coarse": (heavy(5000, 0), (heavy(5000, 0) * 2).round()),
    "tiny": (heavy(5000, 0) * 1e-42, heavy(5000, 0)),
}


@pytest.mark.parametrize("case", RANKED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spearman_against_scipy(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matching, "PIECE", 1500)
    a, b = (x.to(dtype) for x in RANKED[case])
    if dtype is torch.float64 and case == "tiny":
        assert spearman([a * 1e-6], [b], sort_up_to=0) == RankCorrelation(
            None, 1.0
        )  # below what float32 holds: nothing is known
    truth = scipy.stats.spearmanr(a.abs().double().numpy(), b.abs().double().numpy()).statistic
    parts = [list(x.split([1000, 0, 4000])) for x in (a, b)]
    sorted_ = spearman(*parts)
    assert sorted_.value == pytest.approx(truth, abs=1e-12)
    assert sorted_.error == 0.0
    counted = spearman(*parts, sort_up_to=0)
    assert abs(counted.value - truth) <= counted.error + 1e-12  # type: ignore[operator]
    if case in ("spread out", "unrelated", "opposite order") and dtype is torch.float64:
        assert 0 < counted.error < 2e-3  # some three bins of 5000 ranks in a row


def test_spearman_from_counts_is_close_for_many():
    n = 200_000
    a, b = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    truth = spearman([a], [a + b])
    counted = spearman([a], [a + b], sort_up_to=n - 1)
    assert counted.error < 3e-4
    assert abs(counted.value - truth.value) < 1e-6  # type: ignore[operator]


@pytest.mark.parametrize("up_to", [0, ranks.SORTED])
def test_without_an_order_there_is_no_correlation(up_to: int):
    assert spearman([torch.zeros(5)], [torch.arange(5.0)], sort_up_to=up_to).value is None


def test_diagonals_against_numpy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matching, "PIECE", 50)
    n = sum(math.prod(shape) for shape in SHAPES.values())
    x, y = heavy(n, 0) + 5, heavy(n, 0) + 0.5 * heavy(n, 1) + 5
    x[::7], y[::5], (s, t) = 0.0, 0.0, (normal(n, seed=i).abs() for i in (2, 3))
    a, b = estimate(cut_up(x), cut_up(s)), replace(estimate(cut_up(y), cut_up(t)), matrix="fisher")
    found = diagonal_agreement(a, b, gammas=[0.0, 0.5, 0.9])
    cuts = torch.tensor([math.prod(shape) for shape in SHAPES.values()]).cumsum(0).tolist()
    spans = [slice(0, n), *(slice(start, stop) for start, stop in zip([0, *cuts[:-1]], cuts, strict=True))]
    for row, span in zip((found, *found.layers), spans, strict=True):
        u, v, su, sv = (z[span].numpy() for z in (x, y, s, t))
        assert row.numel == len(u)
        assert row.same_sign.value == np.mean(np.sign(u) == np.sign(v))
        by_chance = sum(np.mean(np.sign(u) == sign) * np.mean(np.sign(v) == sign) for sign in (-1, 0, 1))
        assert row.same_sign.chance == pytest.approx(by_chance, abs=1e-15)
        if np.linalg.norm(v) == 0:
            assert row.relative_error is None
            continue
        assert row.relative_error == pytest.approx(np.linalg.norm(u - v) / np.linalg.norm(v))
        assert row.noise == pytest.approx(np.sqrt((su**2).sum() + (sv**2).sum()) / np.linalg.norm(v))
        if len(u) > 1:
            assert row.pearson == pytest.approx(scipy.stats.pearsonr(u, v).statistic)
            left = [max(0.0, 1 - (e**2).sum() / ((w - w.mean()) ** 2).sum()) for w, e in ((u, su), (v, sv))]
            assert row.pearson_ceiling == pytest.approx(math.sqrt(left[0] * left[1]))
            assert row.spearman == pytest.approx(scipy.stats.spearmanr(abs(u), abs(v)).statistic)
        else:
            assert (row.pearson, row.pearson_ceiling, row.spearman) == (None, None, None)
    for at in found.masks:
        k = n - math.floor(at.gamma * n)
        tops = [set(z.abs().argsort(stable=True)[n - k :].tolist()) for z in (x, y)]  # of equal ones the first are flat
        assert at.masks.recall.value == pytest.approx(len(tops[0] & tops[1]) / k)
    assert (found.matrices, [at.gamma for at in found.masks]) == (("hessian", "fisher"), [0.0, 0.5, 0.9])
    assert [row["name"] for row in numbers(found)["layers"]] == list(SHAPES)
    assert repr(found).startswith("DiagonalAgreement(hessian and fisher: Spearman 0.")


def test_what_noise_leaves_of_agreement():
    """Two estimates of one diagonal with known errors: relative error and correlation are those that are said."""
    n = 20_000
    truth, s = {"w": heavy(n, 0)}, {"w": heavy(n, 1).abs() / 3}
    a, b = (estimate({"w": truth["w"] + s["w"] * normal(n, seed=seed)}, s) for seed in (2, 3))
    found = diagonal_agreement(a, b, gammas=[])
    assert found.relative_error == pytest.approx(
        found.noise, rel=0.05
    )  # sums of squares of heavy tails, over 20,000 entries
    assert found.pearson == pytest.approx(found.pearson_ceiling, rel=0.03)
    exact = diagonal_agreement(estimate(truth), b, gammas=[])
    assert exact.relative_error == pytest.approx(exact.noise, rel=0.05)
    assert exact.pearson == pytest.approx(exact.pearson_ceiling, rel=0.03)


def test_agreement_of_two_estimators_lies_between_their_floors():
    """One diagonal, one estimator with little noise and one with much: the correlation is the geometric mean, the Jaccard index between."""
    n = 20_000
    truth = normal(n, seed=0)

    def drawn(noise: float, seed: int) -> DiagonalEstimate:
        return estimate({"w": truth + noise * normal(n, seed=seed)})

    a, a2, b, b2 = drawn(0.1, 1), drawn(0.1, 2), drawn(1.0, 3), drawn(1.0, 4)
    own_a, own_b, both = (diagonal_agreement(*pair, gammas=[0.6]) for pair in ((a, a2), (b, b2), (a, b)))
    assert both.pearson == pytest.approx(math.sqrt(own_a.pearson * own_b.pearson), abs=0.03)  # type: ignore[operator]
    J_a, J_b, J = (found.masks[0].masks.sharp.value for found in (own_a, own_b, both))
    assert J_b < J < J_a  # type: ignore[operator]


def test_noise_that_nobody_knows_is_unknown():
    one = {"w": torch.tensor([1.0, 2.0, 4.0])}
    single = estimate(one, {"w": torch.full((3,), math.nan)})
    for other in (single, replace(estimate(one), matrix="second_moment")):
        found = diagonal_agreement(other, estimate(one), gammas=[])
        assert math.isnan(found.noise or 0.0)
        assert math.isnan(found.pearson_ceiling or 0.0)
        assert numbers(found)["noise"] is None
    exact = diagonal_agreement(estimate(one), estimate(one), gammas=[0.5])
    assert (exact.noise, exact.pearson_ceiling, exact.relative_error) == (0.0, 1.0, 0.0)
    assert exact.spearman == pytest.approx(1.0)


def test_constant_diagonals_have_no_correlation():
    """0.1 in float32, whose mean in float64 is rounded: what is left of it is no spread."""
    found = diagonal_agreement(estimate({"w": torch.full((77,), 0.1)}), estimate({"w": torch.rand(77)}), gammas=[])
    assert (found.pearson, found.pearson_ceiling, found.spearman) == (None, None, None)


def test_monotone_functions_make_the_same_masks():
    """Two scores that agree by construction: the order is the same, the values are not."""
    n = sum(math.prod(shape) for shape in SHAPES.values())
    x = heavy(n, 0)
    found = diagonal_agreement(estimate(cut_up(x.sign() * x.abs() ** 0.1)), estimate(cut_up(x)))
    assert found.spearman == pytest.approx(1.0, abs=1e-12)
    assert [at.masks.sharp.value for at in found.masks] == [1.0] * 4
    assert found.pearson is not None
    assert found.pearson < 0.9


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"v": torch.ones(3)}, "diagonal_agreement: 'w' is in the first and not in the second."),
        ({"w": torch.ones(1, 3)}, "diagonal_agreement: 'w' has shape (3,) in the first and (1, 3) in the second."),
        (
            {"w": torch.tensor([1.0, math.inf, 2.0])},
            "'w' of the second diagonal (by hand) has entries that are NaN or infinite",
        ),
    ],
)
def test_diagonals_that_cannot_be_compared(other: dict[str, Tensor], said: str):
    with pytest.raises(InvalidArgument) as caught:
        diagonal_agreement(estimate({"w": torch.ones(3)}), estimate(other))
    assert said in str(caught.value)


def test_a_gamma_outside_of_the_interval_is_refused():
    one = estimate({"w": torch.ones(3)})
    with pytest.raises(InvalidArgument, match="gamma=1.5 must be a number in"):
        diagonal_agreement(one, one, gammas=[1.5])


def test_parameters_without_entries():
    """They have rows in which nothing is known."""
    values = {"none": torch.zeros(0, 3), "one": torch.ones(1), "w": torch.tensor([1.0, -3.0, 2.0])}
    for up_to in (0, 10):
        found = diagonal_agreement(estimate(values), estimate(values), gammas=[0.5], sort_up_to=up_to)
        empty, one, _ = found.layers
        for row in (empty, one):
            assert (row.spearman, row.pearson, row.pearson_ceiling) == (None, None, None)
        assert (empty.relative_error, empty.noise, empty.same_sign.value) == (None, None, None)
        assert (one.relative_error, one.same_sign.value, found.masks[0].masks.layers[0].sharp.value) == (0.0, 1.0, None)
        numbers(found)
    space = ParameterSpace.of(Bare({name: tuple(value.shape) for name, value in values.items()}))
    pairs = pairs_of(orthonormal(4, 2, 0), space)
    assert subspace_overlap(pairs, pairs).layers[0].numel == 0
    mass = mask_subspace_overlap({name: value > 1 for name, value in values.items()}, pairs)
    assert (mass.layers[0].sharp_fraction, mass.sharp_fraction) == (None, 0.75)


# ---- subspaces ------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros(shape)))


SPACE = ParameterSpace.of(Bare(SHAPES))


def pairs_of(V: Tensor, space: ParameterSpace | None = SPACE, *, converged: bool = True) -> Eigenpairs:
    k = V.shape[1]
    zeros = torch.zeros(k, dtype=torch.float64)
    return Eigenpairs(
        zeros, zeros, torch.full((k,), converged), V, True, "largest", 1e-3, 1.0, 0.0, 0.0, 1, asked=k, space=space
    )


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, k, seed=seed)).Q


@pytest.mark.parametrize(("k_a", "k_b"), [(3, 3), (2, 5), (5, 2), (1, 1)])
@pytest.mark.parametrize("near", [1.0, 1e-3, 1e-7])
def test_principal_angles_against_scipy(k_a: int, k_b: int, near: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spanning, "NUMBERS", 100)
    n = SPACE.n
    V = orthonormal(n, k_a, 0)
    mixed = torch.cat([V, normal(n, 5, seed=1)], 1)[:, :k_b] + near * normal(n, k_b, seed=2) / n**0.5
    W = torch.linalg.qr(mixed).Q
    found = subspace_overlap(pairs_of(V), pairs_of(W))
    angles = np.sort(scipy.linalg.subspace_angles(V.numpy(), W.numpy()))
    assert np.deg2rad(found.angles) == pytest.approx(angles, rel=1e-6, abs=1e-13)
    assert found.cosines == pytest.approx(np.cos(angles), abs=1e-14)
    assert found.overlap.value == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-14)
    assert found.overlap.chance == pytest.approx(max(k_a, k_b) / n)
    assert math.fsum(row.a for row in found.layers) == pytest.approx(1.0)
    assert found.layers[0].b == pytest.approx(W[:600].square().sum().item() / k_b)
    assert numbers(found)["dimensions"] == [k_a, k_b]


def test_random_subspaces_overlap_by_chance():
    n = 40
    V = pairs_of(orthonormal(n, 3, 0), None)
    seen = [subspace_overlap(V, pairs_of(orthonormal(n, 5, 1 + seed), None)) for seed in range(200)]
    values = torch.tensor([found.overlap.value for found in seen], dtype=torch.float64)
    assert seen[0].overlap.chance == 5 / 40
    assert abs(values.mean() - 5 / 40) < 5 * values.std() / 200**0.5
    assert seen[0].layers == ()


def test_subspaces_in_single_precision():
    """What V'V lacks of the identity, 1e-7, does not turn into an angle of its root."""
    V = orthonormal(SPACE.n, 4, 0)
    found = subspace_overlap(pairs_of(V.float()), pairs_of((V @ orthonormal(4, 4, 1)).float(), converged=False))
    assert max(found.angles) < 1e-4  # degrees; 2e-6 radians
    assert found.converged == (True, False)


def other_space(**changes: tuple[int, ...]) -> ParameterSpace:
    return ParameterSpace.of(Bare(SHAPES | changes))


V2 = orthonormal(SPACE.n, 2, 0)
FEWER = ParameterSpace.of(Bare({name: SHAPES[name] for name in ("a.weight", "a.bias", "scale")}))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (pairs_of(V2), replace(pairs_of(V2), vectors=None), "has no vectors; partial results"),
        (pairs_of(V2), pairs_of(V2 * 1.1), "differs from the identity by 2.1e-01, and may by 0.0001"),
        (pairs_of(V2), pairs_of(V2[:, [0, 0]]), "differs from the identity by 1.0e+00"),
        (
            pairs_of(V2),
            pairs_of(V2, other_space(**{"b.weight": (30, 9)})),
            "'b_weight' of shape (9, 30) in the first stands where",
        ),
        (pairs_of(V2), pairs_of(V2[:631], FEWER), "'b_weight' is in the first and not in the second"),
        (pairs_of(V2[:631], FEWER), pairs_of(V2), "'b_weight' is in the second and not in the first"),
        (pairs_of(V2, None), pairs_of(V2[1:], None), "the vectors have 901 entries in the first and 900 in the second"),
    ],
)
def test_subspaces_that_cannot_be_compared(a: Eigenpairs, b: Eigenpairs, said: str):
    with pytest.raises(InvalidArgument) as caught:
        subspace_overlap(a, b)
    assert said in str(caught.value)


def named(mask: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".", "_"): flat for name, flat in mask.items()}


def test_mass_of_eigenvectors_in_the_sharp_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spanning, "NUMBERS", 100)
    shares = {"a.weight": 0.7, "a.bias": 0.2, "scale": 1.0, "b.weight": 0.9}
    mask, V = named(random_mask(shares, 0)), orthonormal(SPACE.n, 3, 0)
    found = mask_subspace_overlap(mask, pairs_of(V))
    flat = torch.cat([mask[name].reshape(-1) for name in SPACE.names])
    masses = V[~flat].square().sum(0)
    assert [it.value for it in found.vectors] == pytest.approx(masses.tolist())
    assert found.overlap.value == pytest.approx(masses.mean().item())
    assert found.overlap.chance == found.sharp_fraction == (~flat).sum().item() / SPACE.n
    weights = torch.cat([(~mask[name]).double().mean().expand(mask[name].numel()) for name in SPACE.names])
    assert [it.within_layers for it in found.vectors] == pytest.approx((weights @ V.square()).tolist())
    assert math.fsum(row.mass for row in found.layers) == pytest.approx(1.0)
    assert math.fsum(row.sharp_mass for row in found.layers) == pytest.approx(found.overlap.value)
    assert numbers(found)["converged"] is True


def test_an_eigenvector_along_sharp_coordinates_lies_in_the_sharp_set():
    mask = named(random_mask(dict.fromkeys(SHAPES, 0.9), 0))
    v = torch.cat([(~mask[name]).double().reshape(-1) for name in SPACE.names])[:, None]
    found = mask_subspace_overlap(mask, pairs_of(v / v.norm()))
    assert found.overlap.value == pytest.approx(1.0)
    assert mask_subspace_overlap({n: ~m for n, m in mask.items()}, pairs_of(v / v.norm())).overlap.value == 0.0


def test_masks_and_subspaces_that_do_not_belong_together():
    mask = named(random_mask(dict.fromkeys(SHAPES, 0.5), 0))
    with pytest.raises(
        InvalidArgument, match="mask_subspace_overlap: .* does not know which parameters its vectors belong to"
    ):
        mask_subspace_overlap(mask, pairs_of(V2, None))
    with pytest.raises(
        InvalidArgument, match="mask_subspace_overlap: 'b_weight' is in the first and not in the second"
    ):
        mask_subspace_overlap(mask, pairs_of(V2[:631], FEWER))
    with pytest.raises(
        InvalidArgument, match="mask_subspace_overlap: V'V of the eigenvectors differs from the identity by"
    ):
        mask_subspace_overlap(mask, pairs_of(2 * V2))


# ---- an estimator against itself ------------------------------------------------------------------------------------


def network(num: int = 40, batches: int = 1) -> Objective:
    with seeded(1):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = normal(num, 5, dtype=torch.float32), classes(num, num=3, seed=2)
    return Objective(model, F.cross_entropy, list(zip(x.chunk(batches), y.chunk(batches), strict=True)))


@dataclass(frozen=True)
class Guess:
    """Random numbers for a diagonal: two seeds agree by chance alone."""

    tells_seed: bool = True

    def estimate(self, objective: Objective, *, seed: int | None = None) -> DiagonalEstimate:
        space, drawn = objective.parameters, seeds.settle(seed)
        h = space.unflatten(seeds.normal(space.n, drawn, "guess"))
        return DiagonalEstimate(h, None, "hessian", "Guess", Cost(1.0, 0.0), seed=drawn if self.tells_seed else None)


def test_an_estimator_that_draws_nothing_agrees_with_itself():
    objective = network()
    before = surroundings(objective.model)
    found = noise_floor(Exact("ggn"), objective, FlatRule(0.6), num_pairs=3, seed=0)
    assert surroundings(objective.model) == before
    assert (found.drawn, found.matrix, found.seed, len(found.over_seeds.pairs)) == (False, "ggn", 0, 1)
    assert (found.over_seeds.sharp, found.over_seeds.recall, found.over_seeds.spread) == (1.0, 1.0, None)
    assert found.over_seeds.spearman == pytest.approx(1.0)
    assert [row.over_seeds for row in found.layers] == [1.0] * 4
    assert found.over_data is not None
    assert found.over_data.sharp is not None
    assert 0.3 < found.over_data.sharp < 1.0
    halves = [Exact("ggn").estimate(part, seed=0) for part in objective.in_parts(2)]
    direct = mask_agreement(*(FlatMask.from_diagonal(half, FlatRule(0.6)) for half in halves))
    assert found.over_data.sharp == direct.sharp.value
    assert numbers(found)["rule"]["gamma"] == 0.6
    assert "over seeds" in repr(found)


def test_a_guess_agrees_with_itself_by_chance_alone():
    objective = network()
    found = noise_floor(Guess(), objective, FlatRule(0.6), num_pairs=30, seed=0)
    assert found.drawn
    assert found.seed == 0
    floor = found.over_seeds
    assert floor.sharp is not None
    assert floor.chance is not None
    assert floor.spread is not None
    assert abs(floor.sharp - floor.chance) < 5 * floor.spread / 30**0.5
    assert [pair.seeds for pair in floor.pairs[:2]] == [(0, 1), (2, 3)]
    assert found.over_data is not None
    assert found.over_data.pairs[0].seeds == (60, 61)


@pytest.mark.slow
def test_more_samples_agree_better():
    objective = network(batches=2)
    few, many = (noise_floor(Fisher(num_samples=m), objective, FlatRule(0.5), num_pairs=2, seed=0) for m in (1, 32))
    assert few.over_seeds.sharp < many.over_seeds.sharp < 1.0  # type: ignore[operator]
    own = [Fisher(num_samples=1).estimate(objective, seed=seed) for seed in (0, 1)]
    assert few.over_seeds.pairs[0].diagonals.spearman == diagonal_agreement(*own).spearman
    assert few.cost.gradients == pytest.approx((4 + 2 * 0.5) * own[0].cost.gradients, rel=0.5)


def test_an_estimator_that_hides_its_draws_is_found_out():
    found = noise_floor(Guess(tells_seed=False), network(), FlatRule(0.6), seed=0)
    assert found.notes == ("two runs differ, though the estimator says that it draws nothing",)


def test_data_that_cannot_be_divided():
    x, y = normal(8, 5, dtype=torch.float32), classes(8, num=3)
    whole = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    found = noise_floor(Guess(), Objective(nn.Linear(5, 3), whole, [(x, y)]), FlatRule(0.5), seed=0)
    assert found.over_data is None
    assert found.notes == ("the data cannot be divided",)
    assert numbers(found)["over_data"] is None


def test_a_half_without_a_term_is_said():
    x, y = normal(8, 5, dtype=torch.float32), torch.tensor([0, 1, 2, 0, *[-100] * 4])
    objective = Objective(nn.Linear(5, 3), F.cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])])
    found = noise_floor(EmpiricalFisher(), objective, FlatRule(0.5), seed=0)
    assert found.over_data is None
    assert found.notes[0].startswith("the diagonal of a half of the data is not known: ")


def test_the_optimizer_does_not_look_at_the_data():
    objective = network()
    optimizer = torch.optim.Adam(objective.model.parameters())
    F.cross_entropy(objective.model(objective.batches[0][0]), objective.batches[0][1]).backward()
    optimizer.step()
    found = noise_floor(OptimizerState(source=optimizer), objective, FlatRule(0.5), seed=0)
    assert (found.over_seeds.sharp, found.over_data) == (1.0, None)
    assert found.notes == ("the estimator does not look at the data",)


def test_rules_with_groups():
    objective = network()
    groups = {name: name.partition(".")[0] for name in objective.parameters.names}
    found = noise_floor(Guess(), objective, FlatRule(0.5, scope="group"), groups=groups, seed=0)
    assert [pair.masks.flat_a for pair in found.over_seeds.pairs] == [24 + 13]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (Fisher, 1),
            "noise_floor: estimator=<class 'curvkit.estimators.fisher.Fisher'> is no estimator of a diagonal. Pass an instance",
        ),
        ((Guess(), 0), "noise_floor: num_pairs=0 must be an integer >= 1. The default is 1."),
        ((Guess(), True), "noise_floor: num_pairs=True must be an integer >= 1."),
    ],
)
def test_noise_floor_refuses(arguments: tuple[Any, Any], said: str):
    with pytest.raises(InvalidArgument) as caught:
        noise_floor(arguments[0], network(), FlatRule(0.5), num_pairs=arguments[1])
    assert said in str(caught.value)


def test_estimators_that_agree_by_construction():
    """A network of ReLUs has diag H = diag GGN; both sides share nothing but the model."""
    objective = network()
    found = diagonal_agreement(Exact("hessian").estimate(objective), Exact("ggn").estimate(objective), gammas=[0.6])
    assert found.masks[0].masks.sharp.value == 1.0
    assert found.relative_error < 1e-5  # type: ignore[operator]
    assert found.matrices == ("hessian", "ggn")


def test_top_eigenvectors_lie_in_the_sharp_set_of_the_diagonal():
    objective = network()
    pairs = Lanczos(rank=2).estimate(objective, seed=0).eigenpairs
    assert pairs is not None
    again = Lanczos(rank=2).estimate(objective, seed=1).eigenpairs
    assert again is not None
    assert subspace_overlap(pairs, again).overlap.value == pytest.approx(1.0, abs=1e-3)  # residuals of 1e-3
    mask = FlatMask.from_diagonal(Exact().estimate(objective), FlatRule(0.5))
    found = mask_subspace_overlap(mask, pairs)
    assert found.overlap.value > found.overlap.chance + 0.3  # type: ignore[operator]
