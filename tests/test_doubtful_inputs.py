"""Inputs on which a plausible implementation hangs, claims too much, or gives a number that means nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from curvkit.errors import CurvkitError, InvalidArgument, UnsupportedModel
from curvkit.linalg import FunctionMap, lanczos
from curvkit.measures import SharpnessSettings, sharpness, trace
from curvkit.measures.data_doubt import parts_of
from curvkit.models import MLP
from curvkit.objectives import Objective
from curvkit.operators import Hessian


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-12, 1e6, 1e12])
def test_a_multiple_of_the_identity_at_any_scale(scale: float):
    """Closed form: after each breakdown a new direction is taken, whatever the unit of the matrix is."""
    pairs = lanczos.eigenpairs(FunctionMap(100, lambda v: scale * v), 3, seed=0)
    assert pairs.values.tolist() == pytest.approx([scale] * 3, rel=1e-6)


def test_an_outlier_hidden_in_the_remainder_of_a_breakdown():
    """Closed form: in float32 the remainder that counts as rounding may be the missed eigenvector; the bound must say so."""
    d = torch.ones(1_000_000)
    d[0] = 1.001
    for seed in range(10):
        bound = lanczos.eigenpairs(FunctionMap(len(d), lambda v: d * v), seed=seed).upper_bound
        assert bound is None or bound >= 1.001 * (1 - 1e-6)


class Once(torch.autograd.Function):
    """A sine whose backward pass cannot be differentiated, which torch.autograd.grad does not say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class OnceSine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_second_derivatives_show_as_asymmetry(dtype: torch.dtype):
    """Law: torch's second derivative of such a function is wrong, and the search sees it if the preflight is left out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 20), OnceSine(), nn.Linear(20, 3)).to(dtype)
    x, y = draw(40, 6).to(dtype), torch.arange(40) % 3
    with pytest.raises(UnsupportedModel, match="not those of a symmetric matrix"):
        sharpness(Objective(model, F.cross_entropy, [(x, y)]), seed=0, settings=SharpnessSettings(preflight=False))


def test_hooks_that_change_derivatives_are_refused():
    """Law: torch applies a module's backward hook to every derivative, so that the products would be of something else."""
    model = MLP([4, 5, 3])
    model[0].register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))
    with pytest.raises(UnsupportedModel, match="backward hook"):
        sharpness(Objective(model, F.cross_entropy, [(draw(8, 4), torch.arange(8) % 3)]), seed=0)


class OverTime(nn.Module):
    """Dimension 0 of its input is time, not examples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0])


def test_steps_of_time_are_not_taken_for_examples():
    """Law: a batch whose rows depend on each other is not cut to measure the doubt from data; the result says that it is missing."""
    objective = Objective(OverTime(), F.mse_loss, [(draw(24, 5, 3), draw(24, 5, 1, seed=1))])
    assert len(parts_of(objective, 8)) == 1
    result = sharpness(objective, seed=0)
    assert result.spread is None
    assert result.halves is None
    assert result.stage == "complete"


def test_half_precision_in_frozen_layers_counts():
    """Law: a frozen bfloat16 layer would round everything behind it; the whole model is measured in float32."""
    model = nn.Sequential(nn.Linear(4, 6).bfloat16().requires_grad_(False), nn.Tanh(), nn.Linear(6, 3).bfloat16())
    result = sharpness(Objective(model, F.cross_entropy, [(draw(16, 4).bfloat16(), torch.arange(16) % 3)]), seed=0)
    assert result.definition.dtype == "float32"
    assert model[0].weight.dtype == torch.bfloat16


def test_a_function_that_writes_to_its_argument_is_refused():
    """Otherwise v'Av / v'v is that of the written vector: 1, with a residual of 0."""
    for function in (lambda v: v.mul_(2), lambda v: v.add_(1).mul(2)):
        with pytest.raises(InvalidArgument, match="FunctionMap: the function writes to its argument"):
            lanczos.eigenpairs(FunctionMap(60, function, dtype=torch.float64), seed=0)


@pytest.mark.parametrize("wrong", [None, torch.zeros(59), torch.zeros(60, dtype=torch.float64)])
def test_a_function_that_returns_something_else_is_refused(wrong: Tensor | None):
    with pytest.raises(InvalidArgument, match="FunctionMap: the function returned .* It must return the same kind"):
        FunctionMap(60, lambda v: wrong).matvec(torch.zeros(60))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("scale", [1e-160, 1e-200, 1e160])
def test_a_matrix_whose_squares_leave_the_range_is_refused(scale: float):
    """Norms are roots of sums of squares; below 1e-140 they would lose digits without a word."""
    d = torch.arange(1.0, 41.0, dtype=torch.float64) * scale
    with pytest.raises(
        CurvkitError, match="outside of the range of float64. Multiply the function by a constant|NaN or infinite"
    ):
        lanczos.eigenpairs(FunctionMap(40, lambda v: d * v, dtype=torch.float64), seed=0)


def test_no_bound_is_claimed_for_a_matrix_that_is_not_symmetric():
    """The bounds are theorems about symmetric matrices; here the one from above would lie below the value."""
    A = torch.diag(torch.arange(1.0, 61.0, dtype=torch.float64))
    A[0, 1] += 1.0
    pairs = lanczos.eigenpairs(FunctionMap(60, lambda v: A @ v, dtype=torch.float64), seed=0, max_products=30)
    assert pairs.asymmetry > lanczos.asymmetry_limit(pairs)
    assert (pairs.upper_bound, pairs.lower_bound, pairs.confidence) == (None, None, None)


def test_representations_are_short():
    pairs = lanczos.eigenpairs(FunctionMap(1000, lambda v: 2 * v), seed=0)
    assert repr(pairs) == f"Eigenpairs(largest: 2; converged, {pairs.products} products)"
    it = Objective(MLP([4, 5, 3]), F.cross_entropy, [(draw(8, 4), torch.arange(8) % 3)])
    assert repr(Hessian(it)).startswith("Hessian(n=43, reverse over reverse, retained (")
    assert repr(sharpness(it, seed=0)).startswith("Sharpness(")
    assert len(repr(sharpness(it, seed=0))) < 300


def test_the_representation_of_a_trace_is_short():
    it = Objective(MLP([4, 5, 3]), F.cross_entropy, [(draw(8, 4), torch.arange(8) % 3)])
    shown = repr(trace(it, seed=0))
    assert shown.startswith("Trace(")
    assert "converged; Hessian of cross_entropy" in shown
    assert len(shown) < 300
