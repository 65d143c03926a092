"""The Hessian without the GGN, its diagonal from products, and the GGN as control variate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import dense, fill_gradients, normal, relative, seeded, surroundings
from test_estimators import CASES as SHARED
from test_estimators import LABELS, Case, N, check_unbiased, flat, hessian_diagonal, z_scores
from test_ggn import dense_ggn
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import CurvkitError, InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.estimators import Controlled, EmpiricalFisher, Exact, ExampleHutchinson, Fisher, Hutchinson
from curvkit.estimators.products import ProductEstimator
from curvkit.operators import GGN, Hessian, Residual
from curvkit.testing import check_operator

EXACT = 1e-12
"""float64 rounding, 2.2e-16, of sums of some thousand terms."""


def deep() -> nn.Module:
    """Three layers: with two, signs at the activations give the diagonal of H - G without an error."""
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


CASES = {
    **SHARED,
    "deep": Case(deep, F.cross_entropy, normal(N, 5), LABELS),
}


def residual(name: str) -> Tensor:
    """H - G, dense."""
    case = CASES[name]
    model = case.objective().model
    H = dense(model, lambda call: case.loss(call(case.x), case.y)).hessian
    return H - dense_ggn(model, case.loss, [(case.x, case.y)])


# ---- the operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("name", ["deep", "tied", "attention", "squared error"])
def test_products_are_those_of_the_dense_difference(name: str, residency: Any):
    """Rung 2; relative to H, since the difference may be small."""
    objective = CASES[name].objective((2, 4))
    fill_gradients(objective.model)
    before = surroundings(objective.model)
    A = Residual(objective, residency=residency)
    truth = residual(name)
    V = normal(A.n, 3, seed=9)
    assert (A.matmat(V) - truth @ V).norm() <= EXACT * (dense_norm(name) * V.norm())
    assert A.loss == pytest.approx(objective.value(), rel=EXACT)
    assert relative(A.gradient, objective.gradient()) <= EXACT
    assert surroundings(objective.model) == before


def dense_norm(name: str) -> float:
    case = CASES[name]
    return dense(case.objective().model, lambda call: case.loss(call(case.x), case.y)).hessian.norm().item()


def test_the_operator_keeps_the_contract():
    objective = CASES["mlp"].objective((2, 4))
    check_operator(Residual(objective), objective=objective)


def test_a_model_that_is_linear_has_no_residual():
    x = normal(N, 5)
    A = Residual(Objective(nn.Linear(5, 3).double(), F.mse_loss, [(x, x[:, :3])]))
    assert bool((A.matvec(normal(A.n)) == 0).all())


def test_a_penalty_on_the_weights_is_no_part_of_it():
    model, x = nn.Linear(5, 1).double(), normal(N, 5)
    penalised = Objective(model, lambda z, y: F.mse_loss(z, y) + model.weight.square().sum(), [(x, x[:, :1])])
    with pytest.raises(
        UnknownObjective, match="depends on the parameter 'weight' not only through the model's outputs"
    ):
        Residual(penalised)
    hidden = BatchLoss(lambda model, batch: model(batch[0]).square().mean())
    with pytest.raises(UnknownObjective, match="needs the model's outputs apart from the loss"):
        Residual(Objective(model, hidden, [(x, x[:, :1])]))


def test_what_overflows_is_said():
    model, x = nn.Linear(5, 1).double(), normal(N, 5)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.raises(CurvkitError, match="Hessian - GGN: the parameter 'weight' has NaN or infinite entries"):
        Residual(Objective(model, F.mse_loss, [(x, x[:, :1])]))


# ---- Hutchinson's probes on any operator ----------------------------------------------------------------------------


def test_hutchinson_works_on_any_operator():
    """The formula, with the probes drawn again; the estimate of an objective is that of its operator."""
    objective = CASES["mlp"].objective((2, 4))
    estimator = Hutchinson(num_probes=3)
    assert isinstance(estimator, ProductEstimator)
    for make, estimate, matrix in (
        (Hessian, estimator.estimate, "hessian"),
        (Residual, estimator.estimate_residual, "hessian - ggn"),
    ):
        found, whole = estimator.of_operator(make(objective), seed=4), estimate(objective, seed=4)
        assert torch.equal(flat(found.values), flat(whole.values))
        assert torch.equal(flat(found.stderr), flat(whole.stderr))
        assert (whole.matrix, whole.samples, whole.cost.products, found.products) == (matrix, 3, 3, 3)
    G = estimator.of_operator(GGN(objective), seed=4)
    assert (G.samples, G.products, estimator.num_products) == (3, 3, 3)


@pytest.mark.parametrize("estimator", [Hutchinson(200), ExampleHutchinson(100)])
def test_residuals_are_unbiased(estimator: Any):
    """Rung 5."""
    found = estimator.estimate_residual(CASES["deep"].objective((2, 4)), seed=3)
    check_unbiased(found, residual("deep").diagonal())
    assert found.matrix == "hessian - ggn"


def test_the_cost_of_hutchinson_is_expected():
    objective = CASES["mlp"].objective((2, 4))
    expected, found = Hutchinson(5).expected(objective), Hutchinson(5).estimate(objective, seed=0)
    assert found.cost.gradients == expected.gradients == pytest.approx(5 * 2.0 + 1.3 + 5.0 / 2)
    assert found.cost.peak_bytes == expected.peak_bytes(objective)


def test_memory_is_looked_at_beforehand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("curvkit.estimators.expected.free_memory", lambda device: 1000)
    with pytest.raises(
        UnsupportedModel, match="Hutchinson: needs about .* are free on cpu. Use Fisher, which needs no second"
    ):
        Hutchinson().estimate(CASES["mlp"].objective(), seed=0)


# ---- the combination ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["deep", *(pytest.param(name, marks=pytest.mark.slow) for name in ("time first", "attention"))]
)
@pytest.mark.parametrize("inner", [Hutchinson(200), ExampleHutchinson(100)])
def test_it_is_unbiased_for_the_hessian(name: str, inner: Any):
    """Rung 5."""
    objective = CASES[name].objective((2, 4))
    before = surroundings(objective.model)
    found = Controlled(inner).estimate(objective, seed=8)
    assert surroundings(objective.model) == before
    check_unbiased(found, hessian_diagonal(CASES[name]))
    assert (found.matrix, found.estimator, found.seed) == ("hessian", repr(Controlled(inner)), 8)
    assert (found.samples, found.cost.products) == (inner.num_probes, inner.num_probes)


def test_errors_are_those_of_the_residual():
    objective = CASES["mlp"].objective((2, 4))
    found = Controlled(Hutchinson(4)).estimate(objective, seed=2)
    R, G = Hutchinson(4).estimate_residual(objective, seed=2), Exact("ggn").estimate(objective)
    assert found.stderr is not None
    assert R.stderr is not None
    assert torch.equal(flat(found.stderr), flat(R.stderr))
    assert (flat(found.values) - flat(R.values) - flat(G.values)).abs().max() <= EXACT
    assert sum(layer.sum for layer in found.layers) == pytest.approx(found.trace, rel=EXACT)
    assert found.sums is not None
    assert found.sums.values.tolist() == pytest.approx([layer.sum for layer in found.layers], rel=1e-9)
    assert found.cost.gradients == pytest.approx(R.cost.gradients + G.cost.gradients)
    assert [note.partition(":")[0] for note in found.notes] == ["GGN"]


def test_one_probe_has_an_unknown_error():
    found = Controlled(Hutchinson(1)).estimate(CASES["mlp"].objective(), seed=0)
    assert found.stderr is not None
    assert bool(flat(found.stderr).isnan().all())
    assert all(math.isnan(layer.stderr) for layer in found.layers)


def test_a_control_that_samples_adds_its_errors_in_squares():
    """Rung 5: the Fisher of 60 samples in place of the GGN."""
    objective = CASES["mlp"].objective((2, 4))
    found = Controlled(Hutchinson(100), by=Fisher(60)).estimate(objective, seed=5)
    check_unbiased(found, hessian_diagonal(CASES["mlp"]))
    R, G = Hutchinson(100).estimate_residual(objective, seed=5), Fisher(60).estimate(objective, seed=5)
    assert found.stderr is not None
    assert R.stderr is not None
    assert G.stderr is not None
    assert torch.allclose(flat(found.stderr).square(), flat(R.stderr).square() + flat(G.stderr).square())
    assert (found.samples, found.sums) == (60, None)
    paired = Controlled(Hutchinson(60), by=Fisher(60)).estimate(objective, seed=5)
    assert paired.sums is not None
    assert paired.sums.values.sum().item() == pytest.approx(paired.trace, rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_fisher_is_the_control_under_smoothing_too(smoothing: float):
    """Rung 5: smoothing moves u = dL/dz and leaves the second derivative of cross-entropy in the outputs as it is."""
    case = CASES["mlp"]
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    model = case.objective().model
    truth = dense(model, lambda call: loss(call(case.x), case.y)).hessian.diagonal()
    found = Controlled(Hutchinson(100), by=Fisher(100)).estimate(Objective(model, loss, [(case.x, case.y)]), seed=1)
    check_unbiased(found, truth)


def trained_on_clusters() -> Objective:
    """A rectified perceptron with 2,922 weights after some steps on ten clusters, whose inputs have a mean as images have."""
    with seeded(0):
        layers = nn.Linear(64, 28), nn.ReLU(), nn.Linear(28, 28), nn.ReLU(), nn.Linear(28, 10)
        model = nn.Sequential(*layers).double()
    y = torch.arange(256) % 10
    x = 1.0 + normal(10, 64, seed=1)[y] + 0.8 * normal(256, 64, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Objective(model, F.cross_entropy, [(x, y)])


def frobenius(estimator: Any, objective: Objective, truth: Tensor, repeats: int) -> float:
    """Root of the mean square of the relative error of the diagonal."""
    runs = [flat(estimator.estimate(objective, seed=seed).values) - truth for seed in range(repeats)]
    return math.sqrt(sum((run.norm() / truth.norm()).item() ** 2 for run in runs) / repeats)


@pytest.mark.slow
def test_twelve_products_on_a_rectified_network():
    """Plain Hutchinson is off by more than the diagonal itself; with the control the same products are off by some hundredths.

    diag(H - G) is zero here, and so is each diagonal block, but not the rest of its rows: what is left is noise from other layers.
    """
    objective = trained_on_clusters()
    truth = flat(Exact().estimate(objective).values)
    plain, controlled = (
        frobenius(estimator, objective, truth, 8) for estimator in (Hutchinson(12), Controlled(Hutchinson(12)))
    )
    assert plain > 1.5  # 2.1
    assert controlled < 0.15  # 0.09
    blocks = residual_blocks(objective)
    assert max(block.abs().max().item() for block in blocks) <= EXACT


def residual_blocks(objective: Objective) -> list[Tensor]:
    """The diagonal blocks of H - G by parameter tensors."""
    A = Residual(objective)
    found = []
    for entry in A.space.entries:
        E = torch.zeros(A.n, min(entry.numel, 40), dtype=A.dtype)
        E[entry.offset + torch.arange(E.shape[1]), torch.arange(E.shape[1])] = 1.0
        found.append(A.matmat(E)[entry.offset : entry.offset + entry.numel])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("inner", [Hutchinson(1), ExampleHutchinson(1)])
def test_z_scores_of_200_repeats(inner: Any):
    """Rung 5: the mean of 200 independent estimates from one probe each, over its standard error, entry by entry."""
    objective, truth = CASES["deep"].objective((2, 4)), hessian_diagonal(CASES["deep"])
    for estimator in (inner, Controlled(inner)):
        drawn = torch.stack([flat(estimator.estimate(objective, seed=seed).values) for seed in range(200)])
        stderr = drawn.std(0) / 200**0.5
        z = ((drawn.mean(0) - truth) / stderr)[stderr > 1e-12]
        assert z.abs().max() < 4.5
        assert 0.3 < z.square().mean() < 2.0  # 59 correlated entries


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [Hutchinson(30), Controlled(Hutchinson(30)), Controlled(ExampleHutchinson(30))])
def test_standard_errors_are_true(estimator: Any):
    """95 % intervals of entries from 30 probes, Student's t; 40 runs of 59 correlated entries."""
    objective, truth = CASES["deep"].objective((2, 4)), hessian_diagonal(CASES["deep"])
    hits = [
        (z_scores(estimator.estimate(objective, seed=seed), truth).abs() < 2.045).double().mean() for seed in range(40)
    ]
    assert 0.92 <= torch.stack(hits).mean() <= 0.97


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_options_are_checked():
    with pytest.raises(
        InvalidArgument,
        match=r"Controlled: inner=Fisher\(.*\) cannot estimate what the GGN leaves .* no estimate_residual",
    ):
        Controlled(Fisher())  # pyright: ignore
    for by, matrix in ((Exact("hessian"), "hessian"), (EmpiricalFisher(), "empirical_fisher"), (3, "no diagonal")):
        with pytest.raises(
            InvalidArgument, match=f"Controlled: by=.* estimates {matrix}; the control must be the diagonal"
        ):
            Controlled(by=by)  # pyright: ignore


def test_soft_targets_that_are_no_probabilities():
    case = CASES["mlp"]
    soft = normal(N, 3, seed=4).softmax(1)
    for scale, fits in ((1.0, True), (1.5, False)):
        objective = Objective(case.objective().model, F.cross_entropy, [(case.x, scale * soft)])
        if fits:
            Controlled(Hutchinson(2), by=Fisher(2)).estimate(objective, seed=0)
            continue
        with pytest.raises(
            UnsupportedModel, match="the targets are probabilities whose sums differ from 1 by up to 0.5"
        ):
            Controlled(Hutchinson(2), by=Fisher(2)).estimate(objective, seed=0)
        truth = dense(objective.model, lambda call: F.cross_entropy(call(case.x), 1.5 * soft)).hessian.diagonal()
        check_unbiased(Controlled(Hutchinson(200)).estimate(objective, seed=0), truth)


def test_the_fisher_of_a_weighted_loss_is_no_control():
    case = CASES["mlp"]
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double())
    objective = Objective(case.objective().model, weighted, [(case.x, case.y)])
    with pytest.raises(
        UnsupportedModel, match="Controlled: the loss cross_entropy.* has weight, so that it is no likelihood"
    ):
        Controlled(by=Fisher()).estimate(objective, seed=0)
    truth = dense(objective.model, lambda call: weighted(call(case.x), case.y)).hessian.diagonal()
    check_unbiased(Controlled(Hutchinson(200)).estimate(objective, seed=0), truth)


def test_what_is_expected():
    objective = CASES["mlp"].objective((2, 4))
    expected = Controlled(Hutchinson(7)).expected(objective)
    parts = Exact("ggn").expected(objective), Hutchinson(7).expected(objective)
    assert expected.gradients == sum(part.gradients for part in parts)
    assert expected.copies == max(part.copies for part in parts) + 3

    class Silent:
        matrix = "ggn"

        def estimate(self, objective: Objective, *, seed: int | None = None) -> Any:
            return Exact("ggn").estimate(objective)

    with pytest.raises(InvalidArgument, match="Controlled: .*Silent.* does not say its cost: it has no expected"):
        Controlled(by=Silent()).expected(objective)
    found = Controlled(by=Silent()).estimate(objective, seed=1)
    assert torch.equal(flat(found.values), flat(Controlled().estimate(objective, seed=1).values))
