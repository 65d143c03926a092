"""The Lanczos estimator against dense spectra: eigenpairs, the diagonal of the top part, the whole with a remainder."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, dense, normal, relative, seeded, surroundings
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.estimators import Deflated, ExampleHutchinson, Hutchinson, Lanczos, XDiag
from curvkit.results.diagonal_estimate import Cost, DiagonalEstimate
from curvkit.results.eigen_diagonal import EigenDiagonal


def network(dtype: torch.dtype = torch.float64) -> tuple[Objective, Tensor]:
    """An objective with negative curvature, and its Hessian in float64."""
    with seeded(1):
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = normal(8, 5), classes(8, num=3, seed=2)
    H = dense(model, lambda call: F.cross_entropy(call(x), y)).hessian
    return Objective(model.to(dtype), F.cross_entropy, [(x[:3].to(dtype), y[:3]), (x[3:].to(dtype), y[3:])]), H


def flat(values: Any) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def top(H: Tensor, rank: int, *, magnitude: bool) -> tuple[Tensor, Tensor]:
    """The wanted eigenvalues, descending, and the diagonal of their part."""
    theta, V = torch.linalg.eigh(H)
    order = (theta.abs() if magnitude else theta).argsort(descending=True)[:rank]
    return theta[order].sort(descending=True).values, (V[:, order].square() * theta[order]).sum(1)


@pytest.mark.parametrize("which", ["magnitude", "largest"])
def test_the_top_part(which: Any):
    """Rung 2: dense eigenvalues; a residual r moves an eigenvector by r / gap at most."""
    objective, H = network()
    before = surroundings(objective.model)
    found = Lanczos(rank=4, which=which, tolerance=1e-6).estimate(objective, seed=0)
    assert surroundings(objective.model) == before
    values, diagonal = top(H, 4, magnitude=which == "magnitude")
    pairs = found.eigenpairs
    assert pairs is not None
    assert pairs.all_converged
    assert (pairs.values - values).abs().max() < 1e-9
    assert pairs.space is not None
    assert pairs.space.names == objective.parameters.names
    assert relative(flat(found.values), diagonal) < 1e-4
    assert pairs.vectors is not None
    assert ((H @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0) - pairs.residuals).abs().max() < 1e-10


def test_alone_it_says_that_it_is_not_the_whole():
    objective, _ = network()
    found = Lanczos(rank=4).estimate(objective, seed=7)
    assert Lanczos(rank=4).matrix == found.matrix == Lanczos.matrix == "hessian_top"
    assert found.notes == ("the top 4 eigenpairs alone: the rest of the diagonal of the Hessian is not in it",)
    assert (found.stderr, found.samples, found.seed) == (None, 0, 7)
    assert (found.explained, found.explained_stderr) == (None, None)
    assert found.estimator == "Lanczos(rank=4, remainder=None, which='magnitude', tolerance=0.001, max_products=500)"
    assert found.eigenpairs is not None
    assert found.cost.products == found.eigenpairs.products
    assert 0.0 < found.cost.gradients - 2.0 * found.cost.products < 10.0  # two each, and the making of the operator


def test_the_whole_with_a_remainder():
    """Rung 5, and the share of the trace."""
    objective, H = network()
    estimator = Lanczos(rank=6, remainder=Hutchinson(num_probes=30))
    found = estimator.estimate(objective, seed=3)
    assert estimator.matrix == found.matrix == "hessian"
    assert found.notes == ()
    assert found.stderr is not None
    assert ((flat(found.values) - H.diagonal()) / flat(found.stderr)).abs().max() < 4.5
    assert found.samples == 30
    assert found.eigenpairs is not None
    assert found.cost.products == found.eigenpairs.products + 6 + 30
    share = found.eigenpairs.values.sum().item() / H.trace().item()
    assert found.explained is not None
    assert found.explained_stderr is not None
    assert abs(found.explained - share) < 4 * found.explained_stderr
    assert found.sums is not None
    relative_error = found.sums.merged([4]).stderr.item() / abs(found.trace)
    assert found.explained_stderr == pytest.approx(abs(found.explained) * relative_error)


def test_unbiased_though_nothing_has_converged():
    """Rung 5: two products beside the certificate; the mean of 40 repeats, 57 z-scores."""
    objective, H = network()
    estimator = Lanczos(rank=3, remainder=Hutchinson(num_probes=3), max_products=6)
    runs = [estimator.estimate(objective, seed=seed) for seed in range(40)]
    first = runs[0].eigenpairs
    assert first is not None
    assert not first.all_converged
    assert runs[0].notes[0].startswith("3 of 3 eigenpairs have not converged to 0.001: relative residuals up to")
    drawn = torch.stack([flat(run.values) for run in runs])
    z = (drawn.mean(0) - H.diagonal()) / (drawn.std(0) / math.sqrt(40))
    assert z.abs().max() < 5.0
    assert 0.4 < z.square().mean() < 2.0


def test_fewer_eigenpairs_than_asked_for_are_said():
    objective, _ = network()
    found = Lanczos(rank=9, max_products=10).estimate(objective, seed=0)
    assert found.eigenpairs is not None
    assert len(found.eigenpairs.values) < 9
    assert found.notes[0] == f"{len(found.eigenpairs.values)} of 9 eigenpairs were found within the budget of products"
    whole = Lanczos(rank=9, max_products=10, remainder=XDiag(num_products=60)).estimate(objective, seed=0)
    assert (flat(whole.values) - network()[1].diagonal()).abs().max() < 1e-12
    assert whole.stderr is None


def test_as_many_as_parameters():
    objective, H = network()
    found = Lanczos(rank=57).estimate(objective, seed=0)
    assert relative(flat(found.values), H.diagonal()) < 1e-9


def test_a_hessian_of_zero():
    """A loss that is linear: every estimate is zero, and no share of nothing is claimed."""
    objective = Objective(
        nn.Linear(6, 3).double(), BatchLoss(lambda model, batch: model(batch[0]).mean()), [(normal(8, 6),)]
    )
    found = Lanczos(rank=3, remainder=Hutchinson(num_probes=2)).estimate(objective, seed=0)
    assert (flat(found.values) == 0.0).all()
    assert math.isnan(found.explained or 0.0)
    for estimator in (Lanczos(rank=3), Deflated(Hutchinson(num_probes=2), rank=21), XDiag(num_products=8)):
        assert (flat(estimator.estimate(objective, seed=0).values) == 0.0).all()


def test_half_precision_is_computed_in_float32():
    objective, H = network(torch.bfloat16)
    found = Lanczos(rank=2).estimate(objective, seed=0)
    assert found.values["0.weight"].dtype == torch.float32
    assert (
        relative(flat(found.values).double(), top(H, 2, magnitude=True)[1]) < 0.2
    )  # the weights are rounded to 8 bits
    assert objective.model[0].weight.dtype == torch.bfloat16  # pyright: ignore


def test_same_seed_same_bits():
    objective, _ = network()
    estimator = Lanczos(rank=3, remainder=Hutchinson(num_probes=2))
    a, b, c = (flat(estimator.estimate(objective, seed=seed).values) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_progress_and_interruption():
    """One partial result per product; the caller stops when it wants to, and nothing was disturbed."""
    objective, _ = network()
    before = surroundings(objective.model)
    seen = list(itertools.islice(Lanczos(rank=3).search(objective, seed=0), 5))
    assert [pairs.products for pairs in seen] == [1, 2, 3, 4, 5]
    assert all(pairs.vectors is None for pairs in seen)

    def interrupted() -> None:
        for pairs in Lanczos(rank=3).search(objective, seed=0):
            if pairs.products == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert surroundings(objective.model) == before
    *_, last = Lanczos(rank=3).search(objective, seed=0)
    alone = Lanczos(rank=3).eigenpairs(objective, seed=0)
    assert last.vectors is not None
    assert alone.vectors is not None
    assert torch.equal(last.vectors, alone.vectors)


def test_saved_and_loaded(tmp_path: Path):
    objective, _ = network()
    found = Lanczos(rank=3, remainder=Hutchinson(num_probes=2)).estimate(objective, seed=0)
    again = EigenDiagonal.load(found.save(tmp_path / "d.safetensors"))
    assert isinstance(again, EigenDiagonal)
    assert torch.equal(flat(again.values), flat(found.values))
    assert (again.matrix, again.eigenpairs, again.explained) == ("hessian", None, None)
    assert DiagonalEstimate.load(tmp_path / "d.safetensors").cost == found.cost


def test_shares_that_nobody_knows():
    objective, _ = network()
    pairs = Lanczos(rank=1).eigenpairs(objective, seed=0)
    cost = Cost(1.0, 0.1)
    zero = EigenDiagonal({"w": torch.zeros(2)}, None, "hessian", "Lanczos", cost, eigenpairs=pairs)
    assert math.isnan(zero.explained or 0.0)
    assert math.isnan(zero.explained_stderr or 0.0)
    unsaid = EigenDiagonal({"w": torch.ones(2)}, None, "hessian", "Lanczos", cost, eigenpairs=pairs)
    assert unsaid.explained == pytest.approx(pairs.values.sum().item() / 2)
    assert math.isnan(unsaid.explained_stderr or 0.0)


def test_expected_is_what_it_took():
    """Copies are an upper bound; products are typical."""
    objective, _ = network()
    for estimator in (Lanczos(rank=2), Lanczos(rank=4, remainder=Deflated(Hutchinson(num_probes=3), rank=2))):
        expected, found = estimator.expected(objective), estimator.estimate(objective, seed=0)
        assert found.cost.peak_bytes == expected.peak_bytes(objective)
        assert 0.3 < found.cost.gradients / expected.gradients < 3.0


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "Lanczos: rank=0 must be an integer >= 1. The default is 10"),
        ({"rank": -3}, "Lanczos: rank=-3 must be"),
        ({"rank": True}, "Lanczos: rank=True must be"),
        ({"which": "top"}, "Lanczos: which='top' is not one of magnitude, largest. Use 'magnitude'"),
        ({"tolerance": 0.0}, r"Lanczos: tolerance=0.0 must lie in \(0, 1\). It is relative"),
        ({"tolerance": math.nan}, r"Lanczos: tolerance=nan must lie in \(0, 1\)"),
        ({"tolerance": "1e-3"}, r"Lanczos: tolerance='1e-3' must lie in \(0, 1\)"),
        (
            {"rank": 5, "max_products": 5},
            "Lanczos: max_products=5 must be an integer >= 6: the residuals of 5 eigenpairs",
        ),
        ({"max_products": 30.0}, "Lanczos: max_products=30.0 must be an integer >= 11"),
        ({"remainder": ExampleHutchinson()}, "Lanczos: remainder=ExampleHutchinson.* does not work on products alone"),
        ({"remainder": Hutchinson}, r"Lanczos: remainder=Hutchinson is a class. Pass an instance: Hutchinson\(\)"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(InvalidArgument, match=message):
        Lanczos(**options)


def test_a_rank_above_the_number_of_parameters():
    objective, _ = network()
    with pytest.raises(
        InvalidArgument, match="Lanczos: rank=58 exceeds the number of parameters, 57. Take a smaller rank"
    ):
        Lanczos(rank=58).estimate(objective)
    with pytest.raises(InvalidArgument, match="Lanczos: rank=58 exceeds the number of parameters, 57"):
        Lanczos(rank=58).eigenpairs(objective)


def test_a_tolerance_below_rounding():
    objective, _ = network(torch.float32)
    with pytest.raises(
        InvalidArgument, match="lanczos: tolerance=1e-08 is below .* the rounding of products in torch.float32"
    ):
        Lanczos(rank=2, tolerance=1e-8).estimate(objective, seed=0)


class Squared(torch.autograd.Function):
    """Squares, with a backward pass that leaves a part of its derivative out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors
        return g.detach() * 2 * x


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Squared.apply(self.a(x)))  # pyright: ignore


def test_a_wrong_second_derivative_is_refused():
    x, y = normal(8, 5), classes(8, num=3)
    with seeded(1):
        objective = Objective(Wrong().double(), F.cross_entropy, [(x, y)])
    before = surroundings(objective.model)
    for estimator in (Lanczos(rank=3), Deflated(rank=8), XDiag(num_products=12)):
        with pytest.raises(CurvkitError, match="diagonal: the products are not those of a symmetric matrix"):
            estimator.estimate(objective, seed=0)
    assert surroundings(objective.model) == before


def test_what_is_not_finite_is_refused():
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).mul(0.0).abs().sqrt()

    objective = Objective(Rooted().double(), F.cross_entropy, [(normal(4, 5), classes(4, num=3))])
    before = surroundings(objective.model)
    for estimator in (
        Lanczos(rank=2),
        Lanczos(rank=2, remainder=Hutchinson()),
        Deflated(rank=2),
        XDiag(num_products=6),
    ):
        with pytest.raises(CurvkitError, match="NaN or infinite entries"):
            estimator.estimate(objective, seed=0)
    assert surroundings(objective.model) == before


def test_too_large_is_refused_before_anything_is_allocated():
    model = nn.Linear(100_000, 1, bias=False)
    objective = Objective(model, F.mse_loss, [(torch.ones(1, 100_000), torch.ones(1, 1))])
    with pytest.raises(
        UnsupportedModel, match=r"Lanczos: needs about .* MiB .* Take a smaller rank, leave parameters out"
    ):
        Lanczos(rank=100_000, max_products=200_000).estimate(objective)
    with pytest.raises(UnsupportedModel, match=r"Lanczos: needs about .* MiB"):
        Lanczos(rank=100_000, max_products=200_000).eigenpairs(objective)
