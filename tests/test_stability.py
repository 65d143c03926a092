"""Stability of an optimizer at its own state: against dense matrices, for every kind of answer, and what is not said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimizer_samples import state_of
from oracles import classes, cut, dense, normal, seeded, surroundings
from torch import Tensor, nn

from curvkit.checkpoints import read, save
from curvkit.checkpoints.learning_rates import Rate
from curvkit.checkpoints.optimizer_state import OptimizerState, optimizer_state
from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.linalg import lanczos
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.measures.limit_verdict import verdict
from curvkit.measures.stabilities import stability, stability_steps
from curvkit.measures.stability_result import largest_stable
from curvkit.models import MLP
from curvkit.objectives import Objective

X, Y = normal(30, 4, seed=1), classes(30, num=3, seed=2)
FINE = SharpnessSettings(search=lanczos.Settings(tolerance=1e-8))


def trained(make: Any, steps: int = 40, **options: Any) -> tuple[Objective, torch.optim.Optimizer]:
    """A small network after some steps of full-batch training, the biases in a group of their own if there are two sets of options."""
    with seeded():
        model = MLP([4, 6, 3], "tanh").double()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    groups = options.pop("groups", None)
    every: Any = model.parameters()
    given = every if groups is None else [{"params": p, **o} for p, o in zip((biases, weights), groups, strict=True)]
    optimizer = make(given, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Objective(model, F.cross_entropy, cut([20, 10], X, Y)), optimizer


def hessian(objective: Objective) -> Tensor:
    model = objective.model
    return dense(model, lambda call: F.cross_entropy(call(X), Y)).hessian


def second_moment(objective: Objective, optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in objective.model.parameters()])


def test_the_eigenvalue_is_that_of_the_dense_matrix():
    """Dense: D^1/2 (H) D^1/2 + W written out for AdamW with two groups, which differ in lr, decay and betas."""
    groups = [
        {"lr": 0.01, "weight_decay": 0.0, "betas": (0.8, 0.99)},
        {"lr": 0.03, "weight_decay": 0.2, "betas": (0.9, 0.999)},
    ]
    objective, optimizer = trained(torch.optim.AdamW, groups=groups)
    result = stability(objective, state_of(objective.model, optimizer), seed=0, settings=FINE)
    names, v = list(objective.parameters.names), second_moment(objective, optimizer)
    sizes = [entry.numel for entry in objective.parameters.entries]
    of = torch.cat([torch.full((s,), int(n.endswith("weight"))) for n, s in zip(names, sizes, strict=True)])
    lr, decay = torch.tensor([0.01, 0.03], dtype=torch.float64)[of], torch.tensor([0.0, 0.2], dtype=torch.float64)[of]
    b1, b2 = torch.tensor([0.8, 0.9], dtype=torch.float64)[of], torch.tensor([0.99, 0.999], dtype=torch.float64)[of]
    f = lr * (1 - b1) / (1 + b1) / ((1 - b1**40) * ((v / (1 - b2**40)).sqrt() + 1e-8))
    K = torch.outer(f.sqrt(), f.sqrt()) * hessian(objective) + torch.diag(lr * decay)
    truth = torch.linalg.eigvalsh(K)[-1].item()
    assert result.folded == pytest.approx(truth, rel=1e-9)
    assert result.folded_interval is not None
    assert result.folded_interval[0] <= truth <= result.folded_interval[1]
    assert result.converged
    assert (result.quantity, result.number, result.lr) == ("lambda_max(F H + W)", 2.0, 0.03)
    assert result.ratio == pytest.approx(truth / 2, rel=1e-9)
    assert result.largest_stable_lr == pytest.approx(0.03 * 2 / truth, rel=1e-9)
    assert result.idle_mass == 0.0


def test_adam_is_told_in_the_numbers_of_the_paper():
    """lambda_max(P^-1 H) of dense `eigvals`, and 38 / lr."""
    objective, optimizer = trained(torch.optim.Adam, lr=0.02)
    result = stability(objective, state_of(objective.model, optimizer), seed=0, settings=FINE)
    P = (1 - 0.9**40) * ((second_moment(objective, optimizer) / (1 - 0.999**40)).sqrt() + 1e-8)
    truth = torch.linalg.eigvals(hessian(objective) / P[:, None]).real.max().item()
    assert result.value == pytest.approx(truth, rel=1e-9)
    assert result.number == pytest.approx(38.0)
    assert result.limit == pytest.approx(38.0 / 0.02)
    assert result.limit_text == "38 / lr"
    assert result.legend == "H = Hessian; P = the optimizer's divisor of the gradient, as of its last step"
    assert result.interval is not None
    assert result.interval[0] <= truth <= result.interval[1]


def test_float32_intervals_hold_the_value_of_float64():
    objective, optimizer = trained(torch.optim.Adam, lr=0.02, weight_decay=0.1)
    exact = stability(objective, state_of(objective.model, optimizer), seed=0, settings=FINE)
    single = objective.converted(dtype=torch.float32)
    result = stability(single, state_of(objective.model, optimizer), seed=0)
    assert result.eigenpairs is not None
    assert result.eigenpairs.vectors is not None
    assert result.eigenpairs.vectors.dtype == torch.float32
    assert result.eigenpairs.residual_dtype == "float64"
    assert result.folded_interval is not None
    assert exact.folded is not None
    assert result.folded_interval[0] <= exact.folded <= result.folded_interval[1]
    by_rounding = stability(
        single, state_of(objective.model, optimizer), seed=0, settings=SharpnessSettings(rounding="perturbation")
    )
    assert by_rounding.folded_interval is not None
    assert by_rounding.folded_interval[0] <= exact.folded <= by_rounding.folded_interval[1]


def test_differences_of_gradients_give_the_same():
    objective, optimizer = trained(torch.optim.Adam, lr=0.02)
    state = state_of(objective.model, optimizer)
    settings = SharpnessSettings(rule="difference", search=lanczos.Settings(tolerance=1e-6))
    result, exact = stability(objective, state, seed=0, settings=settings), stability(objective, state, seed=0)
    assert result.value == pytest.approx(exact.value, rel=1e-3)


def test_plain_sgd_needs_no_search_of_its_own():
    """Law: f (lambda + c) of the sharpness that is known; the same number if it is searched anew."""
    objective, optimizer = trained(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.01)
    state, known = state_of(objective.model, optimizer), sharpness(objective, 2, seed=0, tolerance=1e-8)
    result = stability(objective, state, seed=0, known=known)
    assert result.products == 0
    assert result.value == pytest.approx(known.eigenpairs.values[0].item() + 0.01, rel=1e-12)
    assert result.value == pytest.approx(torch.linalg.eigvalsh(hessian(objective))[-1].item() + 0.01, rel=1e-8)
    assert (result.quantity, result.number) == ("lambda_max(H + C)", pytest.approx(3.8))
    assert result.definition is known.definition
    anew = stability(objective, state, seed=0, settings=FINE)
    assert anew.products > 0
    assert anew.value == pytest.approx(result.value, rel=1e-9)
    smallest = sharpness(objective, which="smallest", seed=0)
    assert stability(objective, state, seed=0, known=smallest).products > 0, "lambda_max is not among those"


def test_a_known_sharpness_does_not_do_for_a_preconditioner():
    objective, optimizer = trained(torch.optim.Adam, lr=0.02)
    state, known = state_of(objective.model, optimizer), sharpness(objective, seed=0)
    result = stability(objective, state, seed=0, known=known)
    assert result.products > 0
    assert result.folded == pytest.approx(stability(objective, state, seed=0).folded, rel=1e-9)


# ---- learning rates -------------------------------------------------------------------------------------------------


def with_rates(state: OptimizerState, *rates: Rate) -> OptimizerState:
    groups = tuple({**group, "lr": lr} for group, lr in zip(state.groups, rates[0].values, strict=True))
    return replace(state, groups=groups, rates=rates)


@pytest.fixture(scope="module")
def sgd() -> tuple[Objective, OptimizerState, float]:
    objective, optimizer = trained(torch.optim.SGD, lr=0.5)
    return objective, state_of(objective.model, optimizer), torch.linalg.eigvalsh(hessian(objective))[-1].item()


def test_each_rate_has_its_ratio(sgd: tuple[Objective, OptimizerState, float]):
    objective, state, lam = sgd
    rates = (Rate("current", (0.1,), "a"), Rate("initial_lr", (0.5,), "b"), Rate("peak", (0.9,), "c"))
    result = stability(objective, with_rates(state, *rates), seed=0, settings=FINE)
    assert result.reference == "current"
    assert [(r.label, r.lr, r.source) for r in result.rates] == [
        ("current", 0.1, "a"),
        ("initial_lr", 0.5, "b"),
        ("peak", 0.9, "c"),
    ]
    for row in result.rates:
        assert row.ratio == pytest.approx(row.lr * lam / 2, rel=1e-9)
        assert row.interval is not None
        assert row.interval[0] <= row.lr * lam / 2 <= row.interval[1]


def test_what_if(sgd: tuple[Objective, OptimizerState, float]):
    objective, state, lam = sgd
    result = stability(objective, state, seed=0, settings=FINE, lr=2.0 / lam)
    assert result.reference == "given"
    assert result.lr == pytest.approx(2.0 / lam)
    assert result.ratio == pytest.approx(1.0, rel=1e-9)
    assert result.verdict == "at the full-batch limit"
    assert [row.label for row in result.rates] == ["current", "given"]
    assert result.rates[0].ratio == pytest.approx(0.5 * lam / 2, rel=1e-9)


def test_what_if_scales_all_groups():
    objective, optimizer = trained(torch.optim.SGD, groups=[{"lr": 0.01}, {"lr": 0.05}])
    state = state_of(objective.model, optimizer)
    one, ten = (
        stability(objective, state, seed=0, settings=FINE),
        stability(objective, state, seed=0, settings=FINE, lr=0.5),
    )
    assert one.quantity == "lambda_max(R H)"
    assert ten.folded == pytest.approx(10 * one.folded, rel=1e-8)
    assert ten.value == pytest.approx(one.value, rel=1e-8)
    assert ten.largest_stable_lr == pytest.approx(one.largest_stable_lr, rel=1e-8)


@pytest.mark.parametrize("current", [0.0, 1e-3])
def test_a_decayed_rate_has_no_verdict(sgd: tuple[Objective, OptimizerState, float], current: float):
    objective, state, lam = sgd
    rates = (Rate("current", (current,), "a"), Rate("initial_lr", (0.2,), "b"))
    result = stability(objective, with_rates(state, *rates), seed=0, settings=FINE)
    assert result.verdict is None
    assert (
        result.reason
        == f"the learning rate is {current:g}, far below its highest; the figures are of its initial value"
    )
    assert (result.reference, result.lr) == ("initial_lr", 0.2)
    assert result.ratio == pytest.approx(0.2 * lam / 2, rel=1e-9)
    assert result.rates[0].ratio == (None if current == 0.0 else pytest.approx(1e-3 * lam / 2, rel=1e-9))
    asked = stability(objective, with_rates(state, *rates), seed=0, settings=FINE, lr=0.1)
    assert asked.verdict is not None


def test_warming_up_is_not_called_decay(sgd: tuple[Objective, OptimizerState, float]):
    objective, state, _ = sgd
    rates = (Rate("current", (1e-4,), "a"), Rate("initial_lr", (1e-4,), "b"), Rate("peak", (0.2,), "c"))
    result = stability(objective, with_rates(state, *rates), seed=0, settings=FINE)
    assert result.reason == "the learning rate is 0.0001, far below its highest; the figures are of its peak"


def cycled(make: Any, done: int, **options: Any) -> tuple[Objective, torch.optim.Optimizer]:
    """A network in the middle of a OneCycleLR of 100 steps, or at its end."""
    schedules: list[torch.optim.lr_scheduler.OneCycleLR] = []

    def made(parameters: Any, **given: Any) -> torch.optim.Optimizer:
        optimizer = make(parameters, lr=0.1, **given)
        schedules.append(
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.1, total_steps=100, pct_start=0.5, base_momentum=0.5, max_momentum=0.95
            )
        )
        optimizer.register_step_post_hook(lambda *_: schedules[0].step())
        return optimizer

    return trained(made, steps=done, **options)


def test_momentum_that_moves_with_the_rate(tmp_path: Path):
    """At the peak of OneCycleLR it is base_momentum, at the start max_momentum; each has its own limit, 2 (1 + b) / lr."""
    objective, optimizer = cycled(torch.optim.SGD, 20, momentum=0.9)
    lam = torch.linalg.eigvalsh(hessian(objective))[-1].item()
    path = save(tmp_path / "ckpt.pt", model=objective.model, optimizer=optimizer)
    state = optimizer_state(read(path), {name: p.shape for name, p in objective.model.named_parameters()})
    assert isinstance(state, OptimizerState)
    now = optimizer.param_groups[0]
    assert 0.5 < now["momentum"] < 0.95
    result = stability(objective, state, seed=0, settings=FINE)
    assert result.ratio == pytest.approx(now["lr"] * lam / (2 * (1 + now["momentum"])), rel=1e-8)
    assert [(row.label, row.ratio is None, row.source) for row in result.rates] == [
        ("current", False, "lr of the groups"),
        ("initial_lr", True, "initial_lr of the groups; the momentum is another one there, 0.95"),
        ("peak", True, "max_lr of OneCycleLR; the momentum is another one there, 0.5"),
    ]
    given = stability(objective, state, seed=0, settings=FINE, lr=0.1)
    assert given.ratio == pytest.approx(0.1 * lam / (2 * (1 + now["momentum"])), rel=1e-8)
    assert given.rates[2].ratio is None


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_the_figures_of_a_peak_are_at_its_momentum(make: Any):
    objective, optimizer = cycled(make, 99, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    [group] = optimizer.param_groups
    rates = (Rate("current", (group["lr"],), "a"), Rate("initial_lr", (0.004,), "b"), Rate("peak", (0.1,), "c"))
    state = replace(state_of(objective.model, optimizer), rates=rates)
    assert group["lr"] < 1e-6
    result = stability(objective, state, seed=0, settings=FINE)
    assert (result.reference, result.lr) == ("peak", 0.1)
    assert (
        "at the learning rate 0.1 the momentum is 0.5, which the figures are of; at present it is 0.95" in result.notes
    )
    if make is torch.optim.SGD:
        assert group["momentum"] == pytest.approx(0.95)
        truth = 0.1 * torch.linalg.eigvalsh(hessian(objective))[-1].item() / (2 * 1.5)
    else:
        assert group["betas"][0] == pytest.approx(0.95)
        P = (1 - 0.5**99) * ((second_moment(objective, optimizer) / (1 - 0.999**99)).sqrt() + 1e-8)
        truth = 0.1 * torch.linalg.eigvals(hessian(objective) / P[:, None]).real.max().item() * 0.5 / (2 * 1.5)
    assert result.ratio == pytest.approx(truth, rel=1e-8)
    assert [row.ratio is None for row in result.rates] == [True, True, False]


def test_a_rate_in_other_proportions_has_no_ratio():
    objective, optimizer = trained(torch.optim.SGD, groups=[{"lr": 0.1}, {"lr": 0.05}])
    state = state_of(objective.model, optimizer)
    rates = (Rate("current", (0.1, 0.05), "a"), Rate("initial_lr", (0.4, 0.2), "b"), Rate("peak", (0.4, 0.1), "c"))
    result = stability(objective, with_rates(state, *rates), seed=0)
    assert [row.ratio is None for row in result.rates] == [False, False, True]
    assert result.rates[2].source == "c; its groups stand in other proportions"


def test_a_rate_of_zero_and_no_other_has_no_limit(sgd: tuple[Objective, OptimizerState, float]):
    objective, state, _ = sgd
    zero = with_rates(state, Rate("current", (0.0,), "a"))
    result = stability(objective, zero, seed=0)
    assert result.reason == "the optimizer's learning rate is 0"
    assert result.value is None
    assert stability(objective, zero, seed=0, lr=0.1).value is not None


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(sgd: tuple[Objective, OptimizerState, float], lr: float):
    objective, state, _ = sgd
    with pytest.raises(
        InvalidArgument, match=r"stability: lr=.* must be positive and finite\. Pass the largest learning rate"
    ):
        stability(objective, state, lr=lr)


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "converged", "said", "reason"),
    [
        ((0.3, 0.4), True, "below the full-batch limit", None),
        ((0.8, 1.2), True, "at the full-batch limit", None),
        ((1.3, 1.4), True, "above the full-batch limit", None),
        ((1.3, 1.4), False, "above the full-batch limit", None),
        ((0.3, 0.4), False, None, "the eigenvalue has not converged: it may be larger"),
        ((0.9, 1.0), False, None, "the eigenvalue has not converged: it may be larger"),
        ((0.7, 0.9), True, None, "the interval of the ratio, 0.7 to 0.9, lies on both sides of 0.8"),
        ((1.1, 1.3), True, None, "the interval of the ratio, 1.1 to 1.3, lies on both sides of 1.2"),
        ((0.5, 1.5), True, None, "the interval of the ratio, 0.5 to 1.5, lies on both sides of 0.8"),
    ],
)
def test_verdicts(interval: tuple[float, float], converged: bool, said: str | None, reason: str | None):
    assert verdict(interval, converged=converged) == (said, reason)


def test_no_positive_curvature_has_no_largest_rate():
    assert largest_stable(0.1, -1.0) == largest_stable(0.1, 0.0) == float("inf")


def test_too_few_products_give_no_verdict():
    objective, optimizer = trained(torch.optim.Adam, lr=1e-5)
    few = SharpnessSettings(search=lanczos.Settings(tolerance=1e-6, max_products=4))
    result = stability(objective, state_of(objective.model, optimizer), seed=0, settings=few)
    assert not result.converged
    assert result.verdict is None
    assert result.reason == "the eigenvalue has not converged: it may be larger"


class Words(nn.Module):
    """An embedding, of which some rows occur only in the data that is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.embedding(x).tanh())


@pytest.mark.parametrize(("seen", "idle"), [(5, True), (10, False)])
def test_rows_that_were_never_trained_take_the_verdict(seen: int, idle: bool):
    """Their second moment is zero, the divisor eps: the eigenvalue is one of these rows, and no more than a number."""
    with seeded():
        model = Words().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(30):
        optimizer.zero_grad()
        x = classes(40, num=seen, seed=step)
        F.cross_entropy(model(x), x % 2).backward()
        optimizer.step()
    x = torch.arange(10)
    result = stability(Objective(model, F.cross_entropy, [(x, x % 2)]), state_of(model, optimizer), seed=0)
    assert result.idle_mass is not None
    assert result.ratio is not None
    if idle:
        assert result.idle_mass > 0.9
        assert result.ratio > 10.0, "nonsense, of which nothing is said"
        assert result.verdict is None
        assert result.reason is not None
        assert result.reason.startswith(
            "100% of the leading eigenvector lie on coordinates whose second moment is next to nothing"
        )
    else:
        assert result.idle_mass == 0.0
        assert result.verdict == "below the full-batch limit"


def test_the_mass_that_is_allowed_changes_the_value_by_less_than_a_verdict():
    """The bound behind the threshold, (1 - 2 m) / (1 - m), on random matrices that are positive semidefinite."""
    for seed in range(200):
        root = normal(6, 6, seed=seed)
        K = root @ root.T
        values, vectors = torch.linalg.eigh(K)
        mass = vectors[4:, -1].square().sum().item()
        left = torch.linalg.eigvalsh(K[:4, :4])[-1].item()
        assert left >= values[-1].item() * (1 - 2 * mass) / (1 - mass) - 1e-9


def test_an_optimizer_without_a_limit_is_answered_at_once():
    objective, optimizer = trained(torch.optim.SGD, lr=0.1)
    state = replace(state_of(objective.model, optimizer), name="Muon")
    [result] = stability_steps(objective, state, seed=0)
    assert result.stage == "complete"
    assert (
        result.reason
        == "the optimizer is Muon, which orthogonalises its steps, so that their length does not fall with the gradient"
    )
    numbers = (result.value, result.limit, result.ratio, result.largest_stable_lr, result.verdict, result.interval)
    assert numbers == (None,) * 6
    assert repr(result) == f"Stability(Muon: {result.reason})"
    assert json.loads(json.dumps(result.to_dict()))["reason"] == result.reason


def test_what_is_printed_and_recorded(sgd: tuple[Objective, OptimizerState, float]):
    objective, state, lam = sgd
    result = stability(objective, state, seed=3, settings=FINE)
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["optimizer"] == "SGD"
    assert record["quantity"] == "lambda_max(H)"
    assert record["value"] == pytest.approx(lam, rel=1e-9)
    assert (record["limit_times_lr"], record["limit"], record["lr_label"], record["seed"]) == (2.0, 4.0, "current", 3)
    assert record["value"] / record["limit"] == pytest.approx(record["ratio"])
    assert record["interval"][0] <= record["value"] <= record["interval"][1]
    assert (
        record["largest_stable_lr_interval"][0]
        <= record["largest_stable_lr"]
        <= record["largest_stable_lr_interval"][1]
    )
    assert "heuristic for mini-batches" in record["caveat"]
    assert repr(result) == f"Stability(SGD: lambda_max(H) = {lam:.4g}, limit 2 / lr = 4; {result.verdict})"


# ---- the way there --------------------------------------------------------------------------------------------------


def test_steps_get_better_and_nothing_is_disturbed():
    objective, optimizer = trained(torch.optim.Adam, lr=0.02)
    before = surroundings(objective.model)
    results = list(stability_steps(objective, state_of(objective.model, optimizer), seed=0))
    assert surroundings(objective.model) == before
    assert [result.stage for result in results[:-1]] == ["searching"] * (len(results) - 1)
    assert results[-1].stage == "complete"
    assert len(results) > 4
    products = [result.products for result in results]
    assert products == sorted(products)
    assert not results[0].converged
    assert results[0].verdict is None
    assert results[-1].converged
    again = stability(objective, state_of(objective.model, optimizer), seed=0)
    assert again.folded == results[-1].folded


def test_products_that_are_not_symmetric_are_refused():
    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x**2 * g

    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](Cubed.apply(self[0](x)))

    with seeded():
        model = Model(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = SharpnessSettings(preflight=False)
    with pytest.raises(UnsupportedModel, match="stability: the products are not those of a symmetric matrix"):
        stability(Objective(model, F.cross_entropy, [(X, Y)]), state_of(model, optimizer), seed=0, settings=settings)


def test_from_a_checkpoint(tmp_path: Path):
    """Saved, read and assigned by name: the same as from the optimizer itself."""
    objective, optimizer = trained(torch.optim.AdamW, groups=[{"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.01}])
    path = save(tmp_path / "ckpt.pt", model=objective.model, optimizer=optimizer)
    state = optimizer_state(read(path), {name: p.shape for name, p in objective.model.named_parameters()})
    assert isinstance(state, OptimizerState)
    result, own = (stability(objective, it, seed=0) for it in (state, state_of(objective.model, optimizer)))
    assert result.optimizer == "AdamW"
    assert result.folded == own.folded
    assert result.quantity == "lambda_max(P^-1 H + W)"
    assert result.legend is not None
    assert result.legend.endswith("W = 19 times decoupled weight decay")
