"""Scale-invariant tensors are found, and adaptive sharpness does not change where a function's own rescaling changes the Hessian."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import dense, normal, seeded, surroundings
from torch import Tensor, nn

from curvkit.linalg import lanczos
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.measures.adaptive import adaptive_sharpness, adaptive_sharpness_steps
from curvkit.measures.invariances import scale_invariance
from curvkit.models import MLP
from curvkit.objectives import Objective

X, Y = normal(24, 5, seed=1), normal(24, 3, seed=2)
FINE = SharpnessSettings(search=lanczos.Settings(tolerance=1e-9))


def objective(*layers: nn.Module) -> Objective:
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad(), seeded(1):
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return Objective(model, F.mse_loss, [(X, Y)])


def normalised(norm: Callable[[], nn.Module]) -> Objective:
    with seeded():
        return objective(nn.Linear(5, 8, bias=False), norm(), nn.Tanh(), nn.Linear(8, 3))


# ---- adaptive sharpness ---------------------------------------------------------------------------------------------


def test_it_is_the_largest_eigenvalue_of_the_dense_matrix():
    """Dense: |w_i| h_ij |w_j|."""
    it = objective(MLP([5, 6, 3], "tanh"))
    w = torch.cat([p.detach().flatten() for p in it.model.parameters()]).abs()
    h = dense(it.model, lambda call: F.mse_loss(call(X), Y)).hessian
    truth = torch.linalg.eigvalsh(torch.outer(w, w) * h)[-1].item()
    result = adaptive_sharpness(it, seed=0, settings=FINE)
    assert result.value == pytest.approx(truth, rel=1e-9)
    low, high = result.eigenpairs.intervals[0].tolist()
    assert low <= truth <= high
    assert result.eigenpairs.recomputed
    assert result.eigenpairs.all_converged


def rescale_rms(it: Objective) -> None:
    it.model[0].weight.mul_(10.0)


def rescale_batch_norm(it: Objective) -> None:
    """In eval mode the running statistics go with the weights before them."""
    it.model[0].weight.mul_(10.0)
    it.model[1].running_mean.mul_(10.0)
    it.model[1].running_var.mul_(100.0)


def rescale_relu(it: Objective) -> None:
    """Up before a ReLU, down after it."""
    it.model[0].weight.mul_(10.0)
    it.model[0].bias.mul_(10.0)
    it.model[2].weight.div_(10.0)


def test_batch_norm_has_statistics_of_its_own():
    it = normalised(lambda: nn.BatchNorm1d(8, eps=1e-14))
    statistics = it.model[1]
    with torch.no_grad():
        z = it.model[0](X)
        statistics.running_mean.copy_(z.mean(0))
        statistics.running_var.copy_(z.var(0))
    assert it.model(X).isfinite().all()


@pytest.mark.parametrize(
    ("make", "rescale"),
    [
        (lambda: normalised(lambda: nn.RMSNorm(8, eps=1e-14)), rescale_rms),
        (lambda: normalised(lambda: nn.BatchNorm1d(8, eps=1e-14)), rescale_batch_norm),
        (lambda: objective(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), rescale_relu),
    ],
    ids=["RMSNorm", "BatchNorm, eval", "ReLU"],
)
def test_rescaling_that_leaves_the_function_leaves_it(
    make: Callable[[], Objective], rescale: Callable[[Objective], None]
):
    """Law: the function and adaptive sharpness stay, to 1e-6; the raw largest eigenvalue does not."""
    it = make()
    before, raw = adaptive_sharpness(it, seed=0, settings=FINE), sharpness(it, seed=0, tolerance=1e-9)
    outputs = it.model(X).detach()
    with torch.no_grad():
        rescale(it)
    it = Objective(it.model, it.loss, it.batches)
    assert torch.allclose(it.model(X), outputs, rtol=0.0, atol=1e-9)
    after, then = adaptive_sharpness(it, seed=0, settings=FINE), sharpness(it, seed=0, tolerance=1e-9)
    assert after.value == pytest.approx(before.value, rel=1e-6)
    assert after.gradient_norm == pytest.approx(before.gradient_norm, rel=1e-6)
    assert abs(then.value / raw.value - 1.0) > 0.05


def test_weights_of_zero_stay_out():
    it = objective(nn.Linear(5, 3))
    with torch.no_grad():
        it.model[0].weight[:, 1:].zero_()
    w = torch.cat([p.detach().flatten() for p in it.model.parameters()]).abs()
    h = dense(it.model, lambda call: F.mse_loss(call(X), Y)).hessian
    result = adaptive_sharpness(Objective(it.model, F.mse_loss, [(X, Y)]), seed=0, settings=FINE)
    assert result.value == pytest.approx(torch.linalg.eigvalsh(torch.outer(w, w) * h)[-1].item(), rel=1e-9)
    with torch.no_grad():
        for p in it.model.parameters():
            p.zero_()
    assert adaptive_sharpness(Objective(it.model, F.mse_loss, [(X, Y)]), seed=0).value == 0.0


def test_its_unit_is_that_of_the_loss():
    """Law: multiplied weights and divided inputs change nothing; a multiple of the loss is a multiple of it."""
    it = objective(nn.Linear(5, 3, bias=False))
    twice = Objective(it.model, lambda out, y: 7.0 * F.mse_loss(out, y), [(X, Y)])
    assert adaptive_sharpness(twice, seed=0, settings=FINE).value == pytest.approx(
        7.0 * adaptive_sharpness(it, seed=0, settings=FINE).value, rel=1e-8
    )


def test_steps_and_records():
    it = objective(MLP([5, 6, 3], "tanh"))
    before = surroundings(it.model)
    results = list(adaptive_sharpness_steps(it, seed=4))
    assert surroundings(it.model) == before
    assert [result.stage for result in results] == ["searching"] * (len(results) - 1) + ["complete"]
    record = json.loads(json.dumps(results[-1].to_dict(), allow_nan=False))
    assert record["quantity"] == "largest eigenvalue of diag|w| H diag|w|"
    assert record["value"] == results[-1].value
    assert record["interval"][0] < record["value"] < record["interval"][1]
    assert (record["seed"], record["converged"], record["residuals_recomputed"]) == (4, True, True)
    assert repr(results[-1]).startswith(f"AdaptiveSharpness({record['value']:.6g} in [")


# ---- scale invariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm, nn.LayerNorm, lambda n: nn.GroupNorm(2, n)], ids=["RMS", "layer", "group"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_before_a_normalisation_are_found(norm: Callable[[int], nn.Module], dtype: torch.dtype):
    """Its own gain and the layers behind it are not scale-invariant; the usual eps of 1e-5 does not hide it."""
    it = normalised(lambda: norm(8)).converted(dtype=dtype)
    found = scale_invariance(it, seed=0)
    assert found.invariant == ("0.weight",)
    assert (found.without_effect, found.zero) == ((), ())
    assert (found.tensors, found.parameters) == (len(list(it.model.parameters())), 40)


def test_a_network_without_normalisation_has_none():
    for seed in range(5):
        with seeded(seed):
            it = objective(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
        found = scale_invariance(it, seed=seed)
        assert found.invariant == ()
        assert str(found) == "none of 6 parameter tensors is scale-invariant"


class Attention(nn.Module):
    """Scores of queries and keys: a bias of the keys adds the same to all scores of a query, and has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.unused = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).T).softmax(1) @ self.v(x)


def test_tensors_without_effect_are_no_scale_invariant_ones():
    found = scale_invariance(objective(Attention()), seed=0)
    assert found.invariant == ()
    assert found.without_effect == ("0.k.bias", "0.unused.weight", "0.unused.bias")


def test_zeros_cannot_be_rescaled():
    it = normalised(lambda: nn.RMSNorm(8))
    with torch.no_grad():
        it.model[3].bias.zero_()
    found = scale_invariance(it, seed=0)
    assert (found.invariant, found.zero) == (("0.weight",), ("3.bias",))


def test_batch_norm_in_eval_mode_is_said_to_hide_it():
    found = scale_invariance(normalised(lambda: nn.BatchNorm1d(8)), seed=0)
    assert found.invariant == ()
    assert found.notes == (
        "BatchNorm in eval mode: weights before it could be rescaled in training, but not with these running statistics",
    )


def test_a_loss_that_overflows_is_a_change():
    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            n = self.w.norm()
            return (x[:, :3] * self.w[:3] / n) + torch.where(n > 2.5, torch.nan, 0.0)

    it = Objective(Exploding().double(), F.mse_loss, [(X, Y)])
    assert scale_invariance(it, seed=0).invariant == ()


def test_it_leaves_the_model_and_says_what_it_found():
    it = normalised(lambda: nn.RMSNorm(8))
    before = surroundings(it.model)
    found = scale_invariance(it, seed=0)
    assert surroundings(it.model) == before
    record = json.loads(json.dumps(found.to_dict()))
    assert record["invariant"] == ["0.weight"]
    assert record["text"] == "1 of 4 parameter tensors is scale-invariant: 0.weight"


def test_long_lists_are_cut():
    layers = [layer for _ in range(5) for layer in (nn.Linear(5, 5, bias=False), nn.RMSNorm(5))]
    with seeded():
        found = scale_invariance(objective(*layers, nn.Linear(5, 3)), seed=0)
    # the five matrices, and the gains of all norms but the last, which a matrix carries on to the next norm
    assert str(found) == "9 of 12 parameter tensors are scale-invariant: 0.weight, 1.weight, 2.weight and 6 more"
