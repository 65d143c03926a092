"""XDiag against its definition by dense QR, dense Hessians, and what its standard error covers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, dense, normal, rotated, seeded, surroundings
from torch import Tensor, nn

from curvkit import Objective, seeds
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.estimators import XDiag
from curvkit.linalg import DenseMap, FunctionMap, xdiag
from curvkit.linalg.student import quantile
from curvkit.parameters import Entry, ParameterSpace


class Named(DenseMap):
    """A dense matrix on one parameter."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.space = ParameterSpace((Entry("w", (len(matrix),), 0),))


def network() -> tuple[Objective, Tensor]:
    """An objective in float64, and its Hessian."""
    with seeded(1):
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = normal(8, 5), classes(8, num=3, seed=2)
    return Objective(model, F.cross_entropy, [(x, y)]), dense(model, lambda call: F.cross_entropy(call(x), y)).hessian


def flat(values: Any) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def diagonals(A: Tensor, seed: int, k: int) -> Tensor:
    *_, state = xdiag.steps(DenseMap(A), seed=seed, most=k)
    return torch.stack([d.clone() for d in state.diagonals()])


def by_definition(A: Tensor, seed: int, k: int) -> Tensor:
    """Rung 2: one dense decomposition for each vector left out."""
    n = len(A)
    W = torch.stack([seeds.signs(n, seed, xdiag.PURPOSE, i, dtype=A.dtype) for i in range(k)], 1)
    rows = []
    for i in range(k):
        U, sizes, _ = torch.linalg.svd(A @ W[:, [j for j in range(k) if j != i]])
        Q = U[:, : int((sizes > 1e-10 * A.norm()).sum())]
        P = torch.eye(n, dtype=A.dtype) - Q @ Q.T
        rows.append((A - P @ A @ P).diagonal() + W[:, i] * (P @ A @ P @ W[:, i]))
    return torch.stack(rows)


OUTLIERS = torch.cat([torch.tensor([100.0, -50.0, 20.0]), torch.linspace(-1, 1, 37)]).double()


def test_left_out_estimates_against_their_definition():
    A = rotated(OUTLIERS)
    assert (diagonals(A, 2, 7) - by_definition(A, 2, 7)).abs().max() < 1e-11  # rounding of terms of size 100


@pytest.mark.parametrize("spectrum", [[3.0, -2.0, 1.0, 0, 0, 0, 0], [3.0, -2.0, 1.0, 0.5, 0.3, 0.2, 0.1]])
def test_signs_that_depend_on_each_other(spectrum: list[float]):
    """On seven coordinates two of four sign vectors are often parallel, so that leaving out a third one matters and they do not."""
    A = rotated(torch.tensor(spectrum).double())
    for seed in range(30):
        assert (diagonals(A, seed, 4) - by_definition(A, seed, 4)).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_on_low_rank(dtype: torch.dtype):
    A = rotated(torch.cat([torch.tensor([5.0, -3.0, 1.0]), torch.zeros(47)]).to(dtype))
    found = XDiag(num_products=12).of_operator(Named(A), seed=0)
    bound = 200 * torch.finfo(dtype).eps  # norm 5, a few dozen operations
    assert (found.values["w"] - A.diagonal()).abs().max() < bound
    assert found.stderr["w"].max() < bound


def test_rank_one_and_zero():
    ones = XDiag(num_products=4).of_operator(Named(torch.ones(9, 9).double()), seed=0)
    assert (ones.values["w"] - 1.0).abs().max() < 1e-14
    assert ones.products == 3  # two vectors, and a range of one
    zero = XDiag(num_products=6).of_operator(Named(torch.zeros(9, 9).double()), seed=0)
    assert (zero.values["w"].tolist(), zero.stderr["w"].tolist(), zero.products) == ([0.0] * 9, [0.0] * 9, 3)
    assert (zero.samples, zero.sums and zero.sums.stderr.tolist()) == (3, [0.0])


def test_unbiased_and_sums():
    """Rung 5: the mean of 200 repeats, with the standard error of the repeats; 40 z-scores of standard normal variables."""
    A = rotated(OUTLIERS)
    runs = [XDiag(num_products=10).of_operator(Named(A), seed=seed) for seed in range(200)]
    drawn = torch.stack([run.values["w"] for run in runs])
    z = (drawn.mean(0) - A.diagonal()) / (drawn.std(0) / math.sqrt(200))
    assert z.abs().max() < 4.5
    assert 0.4 < z.square().mean() < 2.0
    first = runs[0]
    assert first.sums is not None
    assert first.sums.values.item() == pytest.approx(first.values["w"].sum().item(), rel=1e-12)
    assert first.sums.stderr.item() > 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spectrum", "low", "high"),
    [
        (torch.cat([torch.linspace(20, 100, 8), torch.linspace(-1, 1, 192)]), 0.93, 0.98),
        (1.0 / torch.arange(1, 201), 0.93, 0.98),
        (torch.linspace(0.5, 1.5, 200), 0.85, 0.93),
    ],
    ids=["outliers", "decaying", "flat and positive"],
)
def test_what_the_standard_error_covers(spectrum: Tensor, low: float, high: float):
    """Rung 5: 95 % intervals by 15 and 30 vectors; heuristic, and too narrow where the spectrum is flat."""
    A = rotated(spectrum.double())
    for k in (15, 30):
        hits = []
        for seed in range(40):
            found = XDiag(num_products=2 * k).of_operator(Named(A), seed=seed)
            hits.append(
                ((found.values["w"] - A.diagonal()).abs() < quantile(k - 1) * found.stderr["w"]).double().mean()
            )
        assert low < torch.stack(hits).mean() < high


def test_network():
    objective, H = network()
    before = surroundings(objective.model)
    found = XDiag(num_products=31).estimate(objective, seed=3)
    assert surroundings(objective.model) == before
    assert (found.matrix, found.estimator, found.samples, found.seed) == ("hessian", "XDiag(num_products=31)", 15, 3)
    assert found.cost.products == 30
    assert 60.0 < found.cost.gradients < 70.0  # two each, and the making of the operator
    assert list(found.values) == list(objective.parameters.names)
    [note] = found.notes
    assert note.startswith("standard errors are heuristic: the 15 estimates share their vectors")
    runs = torch.stack([flat(XDiag(num_products=8).estimate(objective, seed=seed).values) for seed in range(30)])
    z = (runs.mean(0) - H.diagonal()) / (runs.std(0) / math.sqrt(30))
    assert z.abs().max() < 5.5  # of 57, Student's with 29 degrees


def test_as_many_products_as_parameters_are_exact():
    objective, H = network()
    found = XDiag(num_products=500).estimate(objective, seed=0)
    assert (flat(found.values) - H.diagonal()).abs().max() < 1e-12
    assert (found.stderr, found.samples, found.cost.products) == (None, 0, 57)
    assert found.notes == ("57 products with the unit vectors give the diagonal exactly",)
    assert all(layer.stderr == 0.0 for layer in found.layers)


def test_same_seed_same_bits():
    objective, _ = network()
    a, b, c = (flat(XDiag(num_products=8).estimate(objective, seed=seed).values) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_states_stay_as_they_are():
    """An earlier state gives the same estimates after later ones were made."""
    A = DenseMap(rotated(OUTLIERS))
    states = list(xdiag.steps(A, seed=1, most=6))
    assert [state.products for state in states] == [2, 4, 6, 8, 10, 12]
    assert [state.num_vectors for state in states] == [1, 2, 3, 4, 5, 6]
    *_, third = xdiag.steps(A, seed=1, most=3)
    for early, late in zip(third.diagonals(), states[2].diagonals(), strict=True):
        assert torch.equal(early, late)


def test_residual_of_a_network():
    """H - G of linear regression is zero."""
    x = normal(8, 40)
    objective = Objective(nn.Linear(40, 1, bias=False).double(), F.mse_loss, [(x, x[:, :1])])
    found = XDiag(num_products=8).estimate_residual(objective, seed=0)
    assert found.matrix == "hessian - ggn"
    assert found.values["weight"].abs().max() < 1e-12


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_products", [3, 0, -2, 4.0, True, None])
def test_options_are_checked(num_products: Any):
    with pytest.raises(InvalidArgument, match=r"XDiag: num_products=.* must be an integer >= 4: two for each vector"):
        XDiag(num_products=num_products)


def test_asymmetric_products_are_refused():
    M = torch.triu(torch.ones(20, 20).double())
    with pytest.raises(CurvkitError, match="diagonal: the products are not those of a symmetric matrix .u'Av and v'Au"):
        list(xdiag.steps(FunctionMap(20, lambda v: M @ v, dtype=torch.float64), seed=0, most=5))


@pytest.mark.parametrize("scale", [math.nan, 1e300])
def test_products_that_are_not_finite_are_refused(scale: float):
    with pytest.raises(CurvkitError, match="diagonal: the product with .* has NaN or infinite entries"):
        list(xdiag.steps(FunctionMap(20, lambda v: v * scale * 1e200, dtype=torch.float64), seed=0, most=3))


def test_unit_vectors_that_are_not_finite_are_refused():
    class Overflowing(Named):
        def matvec(self, v: Tensor) -> Tensor:
            return v / 0.0

    with pytest.raises(CurvkitError, match="XDiag: the .* of w has NaN or infinite entries"):
        XDiag().of_operator(Overflowing(torch.eye(3)), seed=0)


def test_too_large_is_refused_before_anything_is_allocated():
    model = nn.Linear(100_000, 1, bias=False)
    objective = Objective(model, F.mse_loss, [(torch.ones(1, 100_000), torch.ones(1, 1))])
    expected = XDiag(num_products=90_000_000).expected(objective)
    assert expected.copies > 1e8
    with pytest.raises(
        UnsupportedModel, match=r"XDiag: needs about .* MiB .* Take fewer products, leave parameters out"
    ):
        XDiag(num_products=90_000_000).estimate(objective)
