"""The limit of stability of every optimizer: dense spectral radii, and the optimizers of torch themselves on a quadratic."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from optimizer_samples import Vector, state_of, warmed
from oracles import normal, rotated
from torch import Tensor

from curvkit.errors import InvalidArgument
from curvkit.linalg import DenseMap
from curvkit.measures.frozen_state import NoLimit
from curvkit.measures.updates import Update
from curvkit.parameters import ParameterSpace

N = 20
H = rotated(torch.linspace(0.05, 3.0, N, dtype=torch.float64), seed=1)
LR = [0.03, 0.01, 0.02]  # one per group


def fold(update: Update, h: Tensor = H) -> Tensor:
    """K entry by entry."""
    f, c, w = (
        torch.as_tensor(d, dtype=torch.float64).expand(len(h)) for d in (update.steps, update.coupled, update.decay)
    )
    return torch.outer(f.sqrt(), f.sqrt()) * (h + torch.diag(c)) + torch.diag(w)


def largest(update: Update, h: Tensor = H) -> float:
    return torch.linalg.eigvalsh(fold(update, h))[-1].item()


def folded(model: Vector, optimizer: torch.optim.Optimizer) -> Update:
    space = ParameterSpace.of(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    update = Update.of(state_of(model, optimizer), space, rates, dtype=torch.float64)
    assert isinstance(update, Update)
    return update


# ---- dense companion matrices ---------------------------------------------------------------------------------------


def companion(family: str, A: Tensor, d: Tensor, w: Tensor, beta: Tensor) -> numpy.ndarray:
    """(x, y) -> (x', y') written out for each family, with diagonals d, w and beta."""
    one, zero = torch.eye(len(A), dtype=torch.float64), torch.zeros_like(A)
    D, W, B = torch.diag(d), torch.diag(w), torch.diag(beta)
    if family == "gradient descent":
        return (one - W - D @ A).numpy()
    into = {"Adam": one - B, "heavy ball": 0.7 * one, "Nesterov": one}[family]  # dampening 0.3
    y = torch.cat([into @ A, B], dim=1)  # [n, 2n]: y' in terms of x and y
    moved = torch.cat([A, zero], dim=1) + B @ y if family == "Nesterov" else y
    x = torch.cat([one - W, zero], dim=1) - D @ moved
    return torch.cat([x, y]).numpy()


def radius(matrix: numpy.ndarray) -> float:
    return float(numpy.abs(numpy.linalg.eigvals(matrix)).max())


GAINS = {
    "gradient descent": lambda beta: torch.ones_like(beta),
    "Adam": lambda beta: (1 - beta) / (1 + beta),
    "heavy ball": lambda beta: 0.7 / (1 + beta),
    "Nesterov": lambda beta: (1 + 2 * beta) / (1 + beta),
}


def several(*values: float, seed: int = 0) -> Tensor:
    """Groups in a random order of the coordinates."""
    order = torch.randint(len(values), (N,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values, dtype=torch.float64)[order]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", GAINS)
def test_the_spectral_radius_is_one_at_the_limit(family: str, seed: int):
    """Groups with other lr, beta and decay, a preconditioner over a factor of 100, coupled and decoupled decay, IRE with kappa 4.

    At the largest stable learning rate the dense radius is 1 up to rounding of eigvals, some 1e-10 for these 40 x 40 matrices; the
    stable side is stable and the other one not, by the margin that is asked.
    """
    lr, beta = several(0.03, 0.01, 0.002, seed=seed), several(0.0, 0.9, 0.6, 0.99, seed=seed + 10)
    c, decay = several(0.0, 0.3, seed=seed + 20), several(0.0, 0.5, 8.0, seed=seed + 30)
    p, flat = 0.02 + normal(N, seed=seed).square(), normal(N, seed=seed + 40) > 0
    base = Update("any", 0.03, lr / p * GAINS[family](beta), c, lr * decay)
    update = base.amplified(flat, 4.0)
    limit = 2.0 / largest(update)
    boost = 1.0 + 4.0 * flat.double()
    A = H + torch.diag(c)

    def dense(t: float) -> float:
        return radius(companion(family, A, t * boost * lr / p, t * boost * lr * decay, beta))

    assert abs(dense(limit) - 1.0) <= 1e-8
    assert dense(0.999 * limit) < 1.0 - 1e-7
    assert dense(1.001 * limit) > 1.0 + 1e-7
    assert dense(1e-3 * limit) < 1.0


@pytest.mark.parametrize("family", ["Adam", "heavy ball", "Nesterov"])
def test_no_complex_crossing_comes_first(family: str):
    """Law: from small steps up to the limit every dense matrix is stable; random problems with rank-deficient and indefinite parts."""
    for seed in range(20):
        h = rotated(torch.cat([torch.zeros(3).double(), normal(N - 3, seed=seed).abs().exp()]), seed=seed)
        beta = several(0.0, 0.5, 0.9, 0.99, 0.999, seed=seed)
        d, w = 10.0 ** normal(N, seed=seed + 50), several(1e-3, 0.1, 1.0, 1.8, seed=seed + 60)
        limit = 2.0 / largest(Update("any", 1.0, d * GAINS[family](beta), 0.0, w), h)
        for t in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
            assert radius(companion(family, h, t * limit * d, t * limit * w, beta)) < 1.0 + 1e-9
        assert radius(companion(family, h, 1.01 * limit * d, 1.01 * limit * w, beta)) > 1.0


def test_decay_that_is_part_of_no_amplification_stays():
    lr, flat = several(0.03, 0.01), normal(N) > 0
    base = Update("any", 0.03, lr, 0.0, 5.0 * lr)
    update = base.amplified(flat, 4.0, decay=False)
    limit = 2.0 / largest(update)
    dense = companion(
        "gradient descent", H, limit * (1 + 4 * flat.double()) * lr, limit * 5.0 * lr, torch.zeros(N).double()
    )
    assert abs(radius(dense) - 1.0) <= 1e-8
    assert largest(update) < largest(base.amplified(flat, 4.0))


# ---- the numbers that are shown -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "number", "matrix"),
    [
        (torch.optim.SGD, {}, 2.0, "H"),
        (torch.optim.SGD, {"momentum": 0.9}, 2 * 1.9, "H"),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.9}, 2 * 1.9 / 0.1, "H"),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2 * 1.9 / 2.8, "H"),
        (torch.optim.SGD, {"weight_decay": 5e-4}, 2.0, "H + C"),
        (torch.optim.Adam, {}, (2 + 2 * 0.9) / 0.1, "P^-1 H"),
        (torch.optim.Adam, {"weight_decay": 0.1}, 38.0, "P^-1 (H + C)"),
        (torch.optim.AdamW, {"weight_decay": 0.0}, 38.0, "P^-1 H"),
        (torch.optim.AdamW, {"weight_decay": 0.5, "lr": 0.01}, 38.0, "P^-1 H + W"),
        (torch.optim.AdamW, {"weight_decay": [0.5, 0.0, 0.5], "lr": 0.01}, 38.0, "P^-1 H + W"),
        (torch.optim.AdamW, {"weight_decay": 0.0, "lr": LR}, 38.0, "R P^-1 H"),
        (torch.optim.AdamW, {"weight_decay": 0.0, "betas": [(0.9, 0.99), (0.8, 0.99), (0.9, 0.99)]}, 2.0, "F H"),
        (torch.optim.RAdam, {"lr": 0.01}, 38.0, "P^-1 H"),
        (torch.optim.Adamax, {"lr": 0.01}, 38.0, "P^-1 H"),
        (torch.optim.RMSprop, {"momentum": 0.5}, 3.0, "P^-1 H"),
        (torch.optim.Adagrad, {}, 2.0, "P^-1 H"),
        (torch.optim.Adadelta, {}, 2.0, "P^-1 H"),
    ],
)
def test_limits_are_the_known_numbers(make: Any, options: dict[str, Any], number: float, matrix: str):
    """Closed forms: 2, 2 (1 + b), 2 (1 + b) / (1 + 2 b), (2 + 2 b1) / (1 - b1)."""
    model = Vector()
    update = folded(model, warmed(make, model, 12, **{"lr": 0.1, **options}))
    assert update.number == pytest.approx(number, rel=1e-12)
    assert update.matrix == matrix
    lam = largest(update)
    assert update.value(lam) / (update.number / update.lr) == pytest.approx(lam / 2.0, rel=1e-12)


def test_decoupled_decay_of_one_group_lowers_the_limit_by_its_share():
    """Closed form: at the largest stable lr, lambda_max(P^-1 H) = (1 + b1) (2 - lr wd) / ((1 - b1) lr)."""
    model = Vector()
    optimizer = warmed(torch.optim.AdamW, model, 12, lr=0.1, weight_decay=2.0)
    update = folded(model, optimizer)
    lr = 0.1 * 2.0 / largest(update)
    seen = update.value(largest(update)) - 2.0 / update.gain  # W = weight decay / gain
    assert lr * 2.0 > 1e-2, "the decay matters here"
    assert seen == pytest.approx(1.9 * (2.0 - lr * 2.0) / (0.1 * lr), rel=1e-12)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    without = folded(model, optimizer)
    assert seen == pytest.approx(without.value(largest(without)), rel=1e-12)


def test_the_value_of_adam_is_that_of_the_preconditioned_matrix():
    """Dense `eigvals` of P^-1 H, P from the formula of the paper: (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps)."""
    model = Vector()
    optimizer = warmed(torch.optim.AdamW, model, 5, lr=0.01, weight_decay=0.0, betas=(0.8, 0.95), eps=1e-3)
    v = torch.cat([optimizer.state[p]["exp_avg_sq"] for p in model.parameters()])
    P = (1 - 0.8**5) * ((v / (1 - 0.95**5)).sqrt() + 1e-3)
    truth = torch.linalg.eigvals(H / P[:, None]).real.max().item()
    update = folded(model, optimizer)
    assert update.value(largest(update)) == pytest.approx(truth, rel=1e-10)


def test_nadam_in_the_long_run():
    """mu_t -> beta1 and its product -> 0: a = 1 - b, b = beta, so that the gain is (1 - b) (1 + 2 b) / (1 + b)."""
    model = Vector()
    optimizer = warmed(torch.optim.NAdam, model, 1, lr=0.01)
    for entry in optimizer.state.values():
        entry["step"].fill_(1e7)
        entry["mu_product"].fill_(0.0)
    assert folded(model, optimizer).gain == pytest.approx(0.1 * 2.8 / 1.9, rel=1e-12)


# ---- torch's own optimizers on a quadratic ---------------------------------------------------------------------------

REAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, groups": (torch.optim.SGD, {"momentum": [0.0, 0.9, 0.5], "weight_decay": [0.0, 0.2, 1.0]}),
    "SGD, dampening": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.4}),
    "SGD, Nesterov": (torch.optim.SGD, {"momentum": [0.9, 0.5, 0.9], "nesterov": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"betas": [(0.9, 0.99), (0.8, 0.9), (0.5, 0.999)], "weight_decay": 0.3}),
    "Adam, amsgrad": (torch.optim.Adam, {"amsgrad": True, "eps": 0.1}),
    "Adam, decoupled": (torch.optim.Adam, {"weight_decay": 2.0, "decoupled_weight_decay": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": [0.0, 3.0, 1.0], "betas": (0.9, 0.95)}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.2, "momentum_decay": 0.1}),
    "NAdam, decoupled": (torch.optim.NAdam, {"weight_decay": 1.0, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1, "betas": (0.9, 0.9), "eps": 0.1}),
    "RAdam, not yet rectified": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.2}),
    "RMSprop": (torch.optim.RMSprop, {"weight_decay": 0.1, "eps": 0.1}),
    "RMSprop, centered": (torch.optim.RMSprop, {"momentum": 0.7, "centered": True, "alpha": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.3, "weight_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1, "rho": 0.8, "eps": 1e-3}),
}
STEPS = {"RAdam, not yet rectified": 3, "NAdam": 2, "NAdam, decoupled": 2}


def freeze(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Write the state back before each step in such a way that the step itself brings it to what it was.

    A second moment decays by its beta in a step, so that v / beta is written; a count rises by one. Gradients are of size 1e-8 at
    most beside roots of second moments of 0.1 and more, so that they add less than 1e-14 of them.
    """
    kept = {
        p: {k: v.clone() for k, v in entry.items() if isinstance(v, Tensor)} for p, entry in optimizer.state.items()
    }
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}

    def restore() -> None:
        for p, entry in optimizer.state.items():
            was, group = kept[p], groups[p]
            keep = group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho", 1.0))
            for name in ("exp_avg_sq", "exp_inf", "square_avg", "grad_avg"):
                if name in entry:
                    entry[name].copy_(was[name] / keep)
            for name in ("acc_delta", "max_exp_avg_sq"):
                if name in entry:
                    entry[name].copy_(was[name])
            if "step" in entry:
                entry["step"].copy_(was["step"] - 1)
            if "mu_product" in entry:
                t = was["step"].item()
                mu = group["betas"][0] * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
                entry["mu_product"].copy_(was["mu_product"] / mu)
            if group.get("amsgrad"):
                entry["exp_avg_sq"].zero_()

    return restore


def growth(model: Vector, optimizer: torch.optim.Optimizer, factor: float, boost: Tensor | None = None) -> float:
    """||x|| after 800 steps over ||x|| after 200, or after as many as it takes to grow a millionfold; everything begins tiny."""
    parameters, restore = list(model.parameters()), freeze(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    sizes, earlier = [p.numel() for p in parameters], 0.0
    with torch.no_grad():
        for index, p in enumerate(parameters):
            p.copy_(1e-16 * normal(p.numel(), seed=index))
        for entry in optimizer.state.values():
            for name in ("exp_avg", "momentum_buffer"):
                if entry.get(name) is not None:
                    entry[name].zero_()
        for step in range(800):
            x = torch.cat(parameters)
            size = x.norm().item()
            if size > 1e-9:
                return size / 1e-16
            if step == 200:
                earlier = size
            for p, g in zip(parameters, (H @ x).split(sizes), strict=True):
                p.grad = g
            restore()
            optimizer.step()
            if boost is not None:
                longer = x + boost * (torch.cat(parameters) - x)
                for p, piece in zip(parameters, longer.split(sizes), strict=True):
                    p.copy_(piece)
    return size / earlier


def dense_step(
    model: Vector, optimizer: torch.optim.Optimizer, restore: Callable[[], None], boost: Tensor
) -> numpy.ndarray:
    """The linear map (x, momentum) -> (x', momentum') of torch's own step, column by column; entries of 1e-16, so that squares are none."""
    parameters, tiny = list(model.parameters()), 1e-16
    sizes, columns = [p.numel() for p in parameters], []
    names = [
        next((n for n in ("exp_avg", "momentum_buffer") if optimizer.state[p].get(n) is not None), "")
        for p in parameters
    ]
    for direction in tiny * torch.eye(2 * N, dtype=torch.float64):
        x, y = direction[:N], direction[N:]
        with torch.no_grad():
            for p, name, xi, yi, g in zip(parameters, names, *(v.split(sizes) for v in (x, y, H @ x)), strict=True):
                p.copy_(xi)
                p.grad = g
                if name:
                    optimizer.state[p][name].copy_(yi)
            restore()
            optimizer.step()
            moved = x + boost * (torch.cat(parameters) - x)
            kept = [optimizer.state[p][n] if n else 0.0 * p for p, n in zip(parameters, names, strict=True)]
            columns.append(torch.cat([moved, *kept]) / tiny)
    return torch.stack(columns, dim=1).numpy()


@pytest.mark.parametrize("kappa", [0.0, 4.0])
@pytest.mark.parametrize("name", REAL)
def test_the_step_of_torch_has_a_spectral_radius_of_one_at_the_limit(name: str, kappa: float):
    """To 1e-8, with IRE around it and without; rounding in the step's entries is some 1e-15, eigenvalues are conditioned like 1e3."""
    make, options = REAL[name]
    model, flat = Vector(), normal(N, seed=7) > -0.3
    optimizer = warmed(make, model, STEPS.get(name, 12), lr=LR, **options)
    update = folded(model, optimizer).amplified(flat, kappa)
    limit, lrs = 2.0 / largest(update), [group["lr"] for group in optimizer.param_groups]
    restore, radii = freeze(optimizer), []
    for factor in (0.99, 1.0, 1.01):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = factor * limit * lr
        radii.append(radius(dense_step(model, optimizer, restore, 1.0 + kappa * flat.double())))
    assert abs(radii[1] - 1.0) <= 1e-8
    assert radii[0] < 1.0 - 1e-6
    assert radii[2] > 1.0 + 1e-6


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("name", REAL)
def test_torch_diverges_just_above_the_limit_and_not_below(name: str, factor: float):
    """2 % below the largest stable learning rate a run shrinks or stands still, 2 % above it grows a millionfold."""
    make, options = REAL[name]
    model = Vector()
    optimizer = warmed(make, model, STEPS.get(name, 12), lr=LR, **options)
    update = folded(model, optimizer)
    grown = growth(model, optimizer, factor * 2.0 / largest(update))
    assert grown > 1e6 if factor > 1.0 else grown < 1.0


@pytest.mark.parametrize("factor", [0.98, 1.02])
@pytest.mark.parametrize("name", ["SGD, groups", "SGD, Nesterov", "AdamW", "RMSprop, centered"])
def test_ire_diverges_just_above_the_limit_and_not_below(name: str, factor: float):
    """x' = x + (1 + kappa n) (step of torch's optimizer), mask and preconditioner fixed."""
    make, options = REAL[name]
    model, flat = Vector(), normal(N, seed=7) > -0.3
    optimizer = warmed(make, model, 12, lr=LR, **options)
    update = folded(model, optimizer).amplified(flat, 4.0)
    grown = growth(model, optimizer, factor * 2.0 / largest(update), boost=1.0 + 4.0 * flat.double())
    assert grown > 1e6 if factor > 1.0 else grown < 1.0


def test_scaling_all_rates_scales_the_fold():
    model = Vector()
    optimizer = warmed(torch.optim.AdamW, model, 5, lr=LR, weight_decay=[0.0, 3.0, 1.0])
    update = folded(model, optimizer)
    assert largest(update.scaled(0.3)) == pytest.approx(10 * largest(update), rel=1e-12)
    for group in optimizer.param_groups:
        group["lr"] *= 10
    assert torch.allclose(fold(folded(model, optimizer)), fold(update.scaled(0.3)), rtol=1e-12)


def test_the_operator_is_the_dense_fold():
    class Dense(DenseMap):
        space = ParameterSpace.of(Vector())

    model = Vector()
    for options in ({"weight_decay": [0.0, 3.0, 1.0]}, {"weight_decay": 0.5}):
        update = folded(model, warmed(torch.optim.AdamW, model, 5, lr=LR, **options))
        products = update.operator(Dense(H)).matmat(torch.eye(N, dtype=torch.float64))
        assert torch.allclose(products, fold(update), rtol=1e-12, atol=1e-14)


# ---- what is held fixed, and what has no limit -----------------------------------------------------------------------


def test_a_parameter_that_is_not_the_optimizers_is_held_fixed():
    """Dense: the limit is that of the rows and columns that move."""
    model = Vector()
    own = torch.optim.SGD([model.pieces[0], model.pieces[2]], lr=0.1, momentum=0.5)
    update = folded(model, own)
    moved = [*range(7), *range(15, 20)]
    assert largest(update) == pytest.approx(0.1 / 1.5 * torch.linalg.eigvalsh(H[moved][:, moved])[-1].item(), rel=1e-12)
    assert update.notes == ("held fixed, because the optimizer has no state of them: pieces.1",)
    assert not update.constant


def test_one_rule_for_all_parameters_is_a_number():
    model = Vector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.3)
    update = folded(model, optimizer)
    assert update.constant
    assert (update.steps, update.coupled, update.decay) == (pytest.approx(0.1 / 1.5), 0.3, 0.0)
    assert largest(update) == pytest.approx(0.1 / 1.5 * (3.0 + 0.3), rel=1e-12)


def test_moments_that_were_assigned_by_order_are_said_to_be():
    model = Vector()
    state = state_of(model, warmed(torch.optim.Adam, model, 2, lr=0.1), certain=False, source="order of the module")
    update = Update.of(state, ParameterSpace.of(model), [0.1] * 3)
    assert isinstance(update, Update)
    assert update.notes == ("the moments were assigned to parameters by their order alone (order of the module)",)


def test_idle_coordinates_are_those_without_a_second_moment():
    model = Vector()
    optimizer = warmed(torch.optim.Adam, model, 3, lr=0.1)
    with torch.no_grad():
        optimizer.state[model.pieces[1]]["exp_avg_sq"][2:4] = 0.0
        optimizer.state[model.pieces[1]]["exp_avg_sq"][4] = 1e-20
    idle = folded(model, optimizer).idle
    assert idle is not None
    assert idle.nonzero().flatten().tolist() == [9, 10, 11]
    optimizer = warmed(torch.optim.Adamax, model, 3, lr=0.1)
    with torch.no_grad():
        optimizer.state[model.pieces[0]]["exp_inf"][0] = 1e-8  # what eps makes of no gradient at all
    idle = folded(model, optimizer).idle
    assert idle is not None
    assert idle.nonzero().flatten().tolist() == [0]
    assert folded(model, warmed(torch.optim.RMSprop, model, 3, lr=0.1)).idle is None


@pytest.mark.parametrize(
    ("name", "group", "said"),
    [
        ("Muon", {}, "the optimizer is Muon, which orthogonalises its steps"),
        ("Rprop", {}, "the optimizer is Rprop, whose steps depend on the signs"),
        ("LBFGS", {}, "the optimizer is LBFGS, which divides by a dense matrix"),
        ("Adafactor", {}, "the optimizer is Adafactor, which keeps no second moment per coordinate"),
        ("SparseAdam", {}, "the optimizer is SparseAdam, which moves only the rows"),
        ("ASGD", {}, "the optimizer is ASGD, whose step size is not proportional to lr"),
        ("Lion", {}, "the optimizer is Lion, whose limit is not known"),
        ("SGD", {"maximize": True}, r"the optimizer climbs \(maximize=True\)"),
        ("SGD", {"momentum": 1.0}, "a momentum or beta of the optimizer is 1, which is not within"),
        (
            "SGD",
            {"momentum": 0.5, "dampening": 1.5},
            "the dampening of the optimizer is 1.5, which turns its steps round",
        ),
        ("Adam", {"betas": (1.0, 0.9)}, "a momentum or beta of the optimizer is 1, which"),
        ("AdamW", {"correct_bias": True}, "the AdamW of transformers, whose correction of bias is another"),
        (
            "Adam or AdamW",
            {"weight_decay": 0.1},
            "the weight decay of the optimizer is 0.1, which Adam and AdamW treat in different",
        ),
        ("SGD", {"lr": float("nan")}, "a learning rate of the optimizer is nan"),
        ("SGD", {"lr": 0.0}, "the optimizer's learning rate is 0"),
    ],
)
def test_no_limit_and_why(name: str, group: dict[str, Any], said: str):
    model = Vector()
    state = state_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state = type(state)(name, ({**state.groups[0], **group},), state.parameters, "by hand", True, state.rates)
    found = Update.of(state, ParameterSpace.of(model), [group.get("lr", 0.1)])
    assert isinstance(found, NoLimit)
    assert re.search(said, found.reason), found.reason


def test_adam_or_adamw_without_decay_is_either():
    model = Vector()
    state = state_of(model, warmed(torch.optim.Adam, model, 3, lr=0.1))
    either = type(state)("Adam or AdamW", state.groups, state.parameters, "by hand", True, state.rates)
    a, b = (Update.of(it, ParameterSpace.of(model), [0.1] * 3, dtype=torch.float64) for it in (state, either))
    assert isinstance(a, Update)
    assert isinstance(b, Update)
    assert torch.equal(torch.as_tensor(a.steps), torch.as_tensor(b.steps))


def test_states_that_lack_something_have_no_limit():
    model, other = Vector(), Vector([3])
    space = ParameterSpace.of(model)
    fresh = state_of(model, torch.optim.Adam(model.parameters(), lr=0.1))
    assert Update.of(fresh, space, [0.1]) == NoLimit("the optimizer has not made a step")
    foreign = state_of(other, torch.optim.Adam(other.parameters(), lr=0.1))
    foreign = type(foreign)(
        "Adam", foreign.groups, {"x": foreign.parameters["pieces.0"]}, "by hand", True, foreign.rates
    )
    assert Update.of(foreign, space, [0.1]) == NoLimit("none of these parameters is the optimizer's")
    optimizer = warmed(torch.optim.Adam, model, 3, lr=0.1)
    del optimizer.state[model.pieces[0]]["step"]
    missing = Update.of(state_of(model, optimizer), space, [0.1] * 3)
    assert missing == NoLimit("the optimizer's state has no 'step', which Adam always keeps")
    optimizer = warmed(torch.optim.Adam, model, 3, lr=0.1, eps=0.0)
    optimizer.state[model.pieces[2]]["exp_avg_sq"][0] = 0.0
    zero = Update.of(state_of(model, optimizer), space, [0.1] * 3)
    assert zero == NoLimit(
        "what the optimizer divides the steps of 'pieces.2' by has entries that are zero, NaN or infinite"
    )


def test_wrong_arguments_are_refused():
    model = Vector()
    state = state_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        InvalidArgument, match=r"2 learning rates were given for 1 groups of parameters\. Pass one for each"
    ):
        Update.of(state, ParameterSpace.of(model), [0.1, 0.2])
    for kappa in (-1.0, float("nan")):
        said = f"Update: kappa={kappa} must not be negative. It is the extra speed along flat coordinates: pass 0 for none."
        with pytest.raises(InvalidArgument, match=re.escape(said)):
            Update("SGD", 0.1, 0.1).amplified(torch.ones(3, dtype=torch.bool), kappa)


def test_names_of_amplified_updates():
    flat = torch.tensor([True, False])
    assert Update("SGD", 0.1, 0.1, 0.2, matrix="H + C").amplified(flat, 4.0).matrix == "(1 + kappa n) (H + C)"
    longer = Update("AdamW", 0.1, 0.1, 0.0, 0.2, matrix="P^-1 H").amplified(flat, 4.0)
    assert (longer.name, longer.matrix) == ("AdamW with IRE, kappa 4", "(1 + kappa n) P^-1 H + W")
