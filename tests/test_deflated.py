"""Deflation: the identity for any subspace against dense projections, unbiasedness, and the gain on a ReLU network."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import classes, dense, normal, relative, rotated, seeded, surroundings
from torch import Tensor, nn

from curvkit import Objective
from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.estimators import Deflated, ExampleHutchinson, Fisher, Hutchinson, Lanczos, XDiag
from curvkit.estimators.deflated_operator import Remaining, completed
from curvkit.linalg import DenseMap, FunctionMap
from curvkit.linalg.basis import Basis
from curvkit.linalg.complement import Complement, known_diagonal
from curvkit.linalg.deflation import KrylovSubspace, krylov
from curvkit.linalg.student import quantile
from curvkit.operators import GGN, Hessian
from curvkit.parameters import Entry, ParameterSpace


class Named(DenseMap):
    """A dense matrix on one parameter; `gradient` starts half of the Krylov space."""

    def __init__(self, matrix: Tensor, gradient: Tensor | None = None) -> None:
        super().__init__((matrix + matrix.T) / 2)
        self.space, self.gradient = ParameterSpace((Entry("w", (len(matrix),), 0),)), gradient


def trained(activation: type[nn.Module], widths: tuple[int, ...], *, examples: int) -> Objective:
    """A classifier of blobs after 60 steps, in float64."""
    centres, y = normal(widths[-1], widths[0], seed=1), torch.arange(examples) % widths[-1]
    x = centres[y] + 0.7 * normal(examples, widths[0], seed=2)
    with seeded(0):
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), activation())]
        model = nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Objective(model, F.cross_entropy, [(x, y)])


def network() -> tuple[Objective, Tensor]:
    """An objective in float64, and its Hessian."""
    with seeded(1):
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = normal(8, 5), classes(8, num=3, seed=2)
    return Objective(model, F.cross_entropy, [(x, y)]), dense(model, lambda call: F.cross_entropy(call(x), y)).hessian


def flat(values: Any) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def rows(Q: Tensor) -> Basis:
    basis = Basis(Q.shape[1], Q.dtype, Q.device, capacity=len(Q))
    for row in Q:
        basis.append(row)
    return basis


OUTLIERS = torch.cat([torch.tensor([100.0, -50.0, 20.0]), torch.linspace(-1, 1, 37)]).double()


def test_the_identity_for_any_subspace():
    """Rung 2: rows that have nothing to do with the matrix."""
    A = rotated(OUTLIERS)
    Q = torch.linalg.qr(normal(40, 5, seed=3))[0].T.contiguous()
    P = torch.eye(40, dtype=torch.float64) - Q.T @ Q
    basis, V = rows(Q), normal(40, 3, seed=4)
    left = Complement(DenseMap(A), basis)
    assert (known_diagonal(DenseMap(A), basis) - (A - P @ A @ P).diagonal()).abs().max() < 1e-12
    assert (left.matmat(V) - P @ A @ P @ V).abs().max() < 1e-11
    assert (left.matvec(V[:, 0]) - P @ A @ P @ V[:, 0]).abs().max() < 1e-11
    assert (known_diagonal(DenseMap(A), rows(Q[:0])) == 0.0).all()


@pytest.mark.parametrize("rank", [1, 6, 40])
def test_the_diagonal_of_a_krylov_subspace(rank: int):
    """Rung 2, and against its sums."""
    A = rotated(OUTLIERS)
    building = krylov(DenseMap(A), rank, lengths=[15, 25], seed=0, start=normal(40, seed=5))
    while True:
        try:
            next(building)
        except StopIteration as done:
            space: KrylovSubspace = done.value
            break
    Q = space.basis.combine(torch.eye(rank, dtype=torch.float64))
    P = torch.eye(40, dtype=torch.float64) - Q.T @ Q
    found = space.diagonal()
    assert (found - (A - P @ A @ P).diagonal()).abs().max() < 1e-11
    assert space.known.tolist() == pytest.approx([found[:15].sum().item(), found[15:].sum().item()], abs=1e-11)
    assert space.asymmetry < 1e-11
    assert space.scale <= 100.0 + 1e-9


def test_unbiased_on_a_subspace_that_does_not_fit():
    """Rung 5: rows at random; the mean of 200 repeats, 40 z-scores."""
    A = Named(rotated(OUTLIERS))
    basis = rows(torch.linalg.qr(normal(40, 5, seed=3))[0].T.contiguous())
    known = known_diagonal(A, basis)
    for inner in (Hutchinson(num_probes=4), XDiag(num_products=6)):
        drawn = torch.stack([completed(A, basis, known, inner, seed=seed).values["w"] for seed in range(200)])
        z = (drawn.mean(0) - rotated(OUTLIERS).diagonal()) / (drawn.std(0) / math.sqrt(200))
        assert z.abs().max() < 4.5
        assert 0.4 < z.square().mean() < 2.0


def test_unbiased_with_a_krylov_subspace():
    """Rung 5: two steps are far from convergence."""
    A = rotated(OUTLIERS)
    estimator = Deflated(Hutchinson(num_probes=4), rank=2)
    drawn = torch.stack([estimator.of_operator(Named(A), seed=seed).values["w"] for seed in range(200)])
    z = (drawn.mean(0) - A.diagonal()) / (drawn.std(0) / math.sqrt(200))
    assert z.abs().max() < 4.5
    assert 0.4 < z.square().mean() < 2.0


def test_standard_errors_are_true():
    """Rung 5: Student's 95 % intervals from 30 probes, 20 runs of 40 entries, and of the sum."""
    A = rotated(OUTLIERS)
    hits, sums = [], []
    for seed in range(40):
        found = Deflated(Hutchinson(num_probes=30), rank=4).of_operator(Named(A), seed=seed)
        hits.append(((found.values["w"] - A.diagonal()).abs() < quantile(29) * found.stderr["w"]).double().mean())
        assert found.sums is not None
        assert found.sums.values.item() == pytest.approx(found.values["w"].sum().item(), rel=1e-10)
        sums.append(abs(found.sums.values.item() - A.trace().item()) < quantile(29) * found.sums.stderr.item())
    assert 0.92 <= torch.stack(hits).mean() <= 0.97
    assert sum(sums) >= 33  # of 40; 38 expected, standard deviation 1.4


def test_exact_where_the_rank_is_covered():
    A = rotated(torch.cat([torch.tensor([5.0, -3.0, 1.0]), torch.zeros(27)]).double())
    for rank in (4, 6, 30):  # one step more than the rank: the start vector is none of the range
        found = Deflated(Hutchinson(num_probes=2), rank=rank).of_operator(Named(A), seed=0)
        assert (found.values["w"] - A.diagonal()).abs().max() < 1e-13
        assert found.stderr["w"].max() < 1e-13
        assert (found.products, found.samples) == (rank + 2, 2)


def test_outliers_are_taken_away():
    A = rotated(OUTLIERS)
    plain = Hutchinson(num_probes=20).of_operator(Named(A), seed=0)
    deflated = Deflated(Hutchinson(num_probes=12), rank=8).of_operator(Named(A), seed=0)
    assert deflated.products == plain.samples
    assert deflated.stderr["w"].norm() < plain.stderr["w"].norm() / 20


def test_network():
    objective, H = network()
    before = surroundings(objective.model)
    found = Deflated(Hutchinson(num_probes=30), rank=12).estimate(objective, seed=3)
    assert surroundings(objective.model) == before
    assert (found.matrix, found.samples, found.seed, found.cost.products) == ("hessian", 30, 3, 42)
    assert found.estimator == "Deflated(inner=Hutchinson(num_probes=30), rank=12)"
    assert 84.0 < found.cost.gradients < 94.0  # two each, and the making of the operator
    assert list(found.values) == list(objective.parameters.names)
    assert found.stderr is not None
    z = (flat(found.values) - H.diagonal()) / flat(found.stderr)
    assert z.abs().max() < 4.5
    assert sum(layer.sum for layer in found.layers) == pytest.approx(found.trace)
    again = Deflated(Hutchinson(num_probes=30), rank=12).estimate(objective, seed=3)
    assert torch.equal(flat(again.values), flat(found.values))
    other = Deflated(Hutchinson(num_probes=30), rank=12).estimate(objective, seed=4)
    assert not torch.equal(flat(other.values), flat(found.values))


def test_notes_of_the_inner_estimator_are_kept():
    objective, H = network()
    sampled = Deflated(XDiag(num_products=6), rank=3).estimate(objective, seed=0)
    assert sampled.notes[-1].startswith("standard errors are heuristic: the 3 estimates")
    exact = Deflated(XDiag(num_products=100), rank=3).estimate(objective, seed=0)
    assert exact.stderr is None
    assert (flat(exact.values) - H.diagonal()).abs().max() < 1e-12
    assert exact.cost.products == 3 + 57


def test_residual_of_a_network():
    """Rung 5 against dense H - G; and within itself."""
    objective, H = network()
    G = GGN(objective)
    truth = (H - G.matmat(torch.eye(57).double())).diagonal()
    estimator = Deflated(Deflated(Hutchinson(num_probes=20), rank=3), rank=4)
    found = estimator.estimate_residual(objective, seed=0)
    assert (found.matrix, found.cost.products) == ("hessian - ggn", 27)
    assert found.stderr is not None
    assert ((flat(found.values) - truth) / flat(found.stderr)).abs().max() < 4.5


def test_an_operator_with_names():
    objective, H = network()
    basis = rows(torch.linalg.qr(normal(57, 2))[0].T.contiguous())
    left = Remaining(Hessian(objective), basis)
    assert left.space.names == objective.parameters.names
    v = normal(57, seed=2)
    P = torch.eye(57).double() - basis.combine(torch.eye(2)).T @ basis.combine(torch.eye(2))
    assert relative(left.matvec(v), P @ H @ P @ v) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_gain_at_equal_products(activation: type[nn.Module]):
    """Relative errors of the diagonal on small networks: Hutchinson .65, XDiag .11 and Deflated .10 at 30 products on ReLU, .45 on tanh."""
    objective = trained(activation, (32, 16, 16, 10), examples=512)
    x, y = objective.batches[0]
    H = dense(objective.model, lambda call: F.cross_entropy(call(x), y)).hessian
    A = Named(H, Hessian(objective).gradient)

    def error(estimator: Any) -> float:
        runs = [relative(estimator.of_operator(A, seed=seed).values["w"], H.diagonal()) for seed in range(12)]
        return sum(runs) / len(runs)

    plain, exchangeable = error(Hutchinson(num_probes=30)), error(XDiag(num_products=30))
    deflated = error(Deflated(Hutchinson(num_probes=15), rank=15))
    if activation is nn.ReLU:
        assert 0.4 < plain < 1.0
        assert 0.05 < exchangeable < 0.2
        assert 0.05 < deflated < 0.2
    else:
        assert max(plain, exchangeable, deflated) < 0.65
    alone = Lanczos(rank=10).estimate(objective, seed=0)
    assert relative(flat(alone.values), H.diagonal()) < (0.15 if activation is nn.ReLU else 1.0)
    many = error(Deflated(Hutchinson(num_probes=60), rank=60))
    assert many < error(Hutchinson(num_probes=120)) / (10 if activation is nn.ReLU else 1.3)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Fisher(), Lanczos(rank=2), None, 3])
def test_inner_estimators_that_do_not_work_on_products_are_refused(inner: Any):
    with pytest.raises(
        InvalidArgument, match=r"Deflated: inner=.* does not work on products alone.* Pass Hutchinson\(\), XDiag"
    ):
        Deflated(inner)


def test_probes_per_example_are_refused_with_what_to_use():
    with pytest.raises(
        InvalidArgument, match=r"does not work on products.* use Controlled\(inner=ExampleHutchinson\(num_probes=2\)\)"
    ):
        Deflated(ExampleHutchinson(num_probes=2))  # pyright: ignore


def test_a_class_is_refused():
    with pytest.raises(
        InvalidArgument, match=r"Deflated: inner=Hutchinson is a class. Pass an instance: Hutchinson\(\)"
    ):
        Deflated(Hutchinson)  # pyright: ignore


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_ranks_are_checked(rank: Any):
    with pytest.raises(InvalidArgument, match=r"Deflated: rank=.* must be an integer >= 1. The default is 10"):
        Deflated(Hutchinson(), rank=rank)


def test_a_rank_above_the_number_of_parameters():
    objective, _ = network()
    message = "Deflated: rank=58 exceeds the number of parameters, 57. Take a smaller rank, or Exact"
    for run in (Deflated(rank=58).estimate, Deflated(rank=58).estimate_residual):
        with pytest.raises(InvalidArgument, match=message):
            run(objective)
    with pytest.raises(InvalidArgument, match="Deflated: rank=41 exceeds"):
        Deflated(rank=41).of_operator(Named(rotated(OUTLIERS)), seed=0)


class Function(FunctionMap):
    """A function on one parameter."""

    def __init__(self, n: int, multiply: Any) -> None:
        super().__init__(n, multiply, dtype=torch.float64)
        self.space = ParameterSpace((Entry("w", (n,), 0),))


def test_asymmetric_products_are_refused():
    M = torch.triu(torch.ones(20, 20).double())
    A = Function(20, lambda v: M @ v)
    with pytest.raises(CurvkitError, match="diagonal: the products are not those of a symmetric matrix"):
        Deflated(rank=5).of_operator(A, seed=0)
    with pytest.raises(CurvkitError, match="diagonal: the products are not those of a symmetric matrix"):
        known_diagonal(A, rows(torch.linalg.qr(normal(20, 5))[0].T.contiguous()))


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(CurvkitError, match="diagonal: the product of deflation step 1 has NaN or infinite entries"):
        Deflated(rank=3).of_operator(Function(9, lambda v: v * math.nan), seed=0)
    with pytest.raises(CurvkitError, match="diagonal: the product with basis vector 1 has NaN or infinite entries"):
        known_diagonal(Function(9, lambda v: v * math.inf), rows(torch.eye(9).double()))


def test_too_large_is_refused_before_anything_is_allocated():
    model = nn.Linear(100_000, 1, bias=False)
    objective = Objective(model, F.mse_loss, [(torch.ones(1, 100_000), torch.ones(1, 1))])
    before = surroundings(model)
    with pytest.raises(UnsupportedModel, match=r"Deflated: needs about .* \(10\d\d\d\d copies .* Take a smaller rank"):
        Deflated(rank=100_000, inner=Hutchinson(num_probes=2)).estimate(objective)
    assert surroundings(model) == before


def test_interrupted_in_the_middle():
    """What the caller raises comes out as it is."""
    made = 0

    def multiply(v: Tensor) -> Tensor:
        nonlocal made
        made += 1
        if made == 7:
            raise KeyboardInterrupt
        return 2 * v

    with pytest.raises(KeyboardInterrupt):
        Deflated(rank=5).of_operator(Function(9, multiply), seed=0)
