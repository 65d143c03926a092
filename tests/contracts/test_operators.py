"""The contract of operators: every implementation is a line of the table; every property has a planted fault that breaks it alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, fill_gradients, normal, rotated, seeded
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import weight_norm

from curvkit.errors import CurvkitError, InvalidArgument
from curvkit.linalg import DenseMap, FunctionMap, LinearMap
from curvkit.losses import token_cross_entropy
from curvkit.models import MLP, Decoder
from curvkit.objectives import Objective
from curvkit.operators import GGN, CurvatureOperator, Hessian, Preconditioned, Residual, Scaled
from curvkit.projection import FlatMask, FlatRule, Projected
from curvkit.testing import check_operator


def mlp(dtype: torch.dtype = torch.float32) -> Objective:
    with seeded():
        model = MLP([4, 6, 3], "tanh").to(dtype)
    fill_gradients(model)
    return Objective(model, F.cross_entropy, cut([4, 3, 1], normal(8, 4, dtype=dtype), classes(8, num=3)))


def language() -> Objective:
    with seeded():
        model = Decoder(vocabulary=7, width=8, depth=1, heads=2, context=6).eval()
    targets = classes(4, 6, num=7, seed=1)
    targets[0, 2:] = -100
    return Objective(model, token_cross_entropy, cut([3, 1], classes(4, 6, num=7), targets))


def batch_norm() -> Objective:
    with seeded():
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    return Objective(model, F.cross_entropy, [(normal(5, 1, 4, 4, dtype=torch.float32), classes(5, num=3))])


OBJECTIVES = {
    "mlp, float32": mlp,
    "mlp, float64": lambda: mlp(torch.float64),
    "mlp, bfloat16": lambda: mlp(torch.bfloat16),
    "decoder": language,
    "batch norm": batch_norm,
}


def preconditioned(operator: CurvatureOperator) -> Preconditioned:
    return Preconditioned(operator, 0.1 + normal(operator.n, dtype=operator.dtype).square())


def scaled(operator: CurvatureOperator) -> Scaled:
    """With zeros in the scale, and added diagonals of both signs."""
    scale = normal(operator.n, seed=1, dtype=operator.dtype).clamp(min=0.0)
    inner, outer = (normal(operator.n, seed=seed, dtype=operator.dtype) for seed in (2, 3))
    return Scaled(operator, scale, inner=inner, outer=outer)


def projected(operator: CurvatureOperator) -> Projected:
    """Within a random half of the coordinates."""
    like = operator.space.unflatten(torch.zeros(operator.n))
    return Projected(operator, FlatMask.random(like, FlatRule(0.5), seed=0))


CURVATURE: dict[str, Callable[[Objective], CurvatureOperator]] = {
    "Hessian, retained": lambda objective: Hessian(objective, residency="retained"),
    "Hessian, streamed": lambda objective: Hessian(objective, residency="streamed"),
    "GGN, retained": lambda objective: GGN(objective, residency="retained"),
    "GGN, streamed": lambda objective: GGN(objective, residency="streamed"),
    "residual, retained": lambda objective: Residual(objective, residency="retained"),
    "residual, streamed": lambda objective: Residual(objective, residency="streamed"),
    "GGN, preconditioned": lambda objective: preconditioned(GGN(objective)),
    "Hessian, scaled": lambda objective: scaled(Hessian(objective)),
    "Hessian, projected": lambda objective: projected(Hessian(objective)),
}
MAPS: dict[str, Callable[[], LinearMap]] = {
    "DenseMap": lambda: DenseMap(rotated(torch.linspace(-1, 5, 40, dtype=torch.float64))),
    "DenseMap, float32": lambda: DenseMap(rotated(torch.linspace(-1, 5, 40))),
    "FunctionMap": lambda: FunctionMap(50, lambda v: torch.arange(50.0) * v),
    "FunctionMap, identity": lambda: FunctionMap(3, lambda v: v),
    "zero": lambda: FunctionMap(9, torch.zeros_like),
    "n = 1": lambda: DenseMap(torch.tensor([[-2.0]])),
    "large outlier": lambda: DenseMap(rotated(torch.cat([torch.tensor([1e6]), torch.linspace(0, 1, 300)]))),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_keep_the_contract(name: str):
    operator = MAPS[name]()
    assert isinstance(operator, LinearMap)
    for seed in range(3):
        check_operator(operator, seed=seed)


@pytest.mark.parametrize("kind", CURVATURE)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_curvature_operators_keep_the_contract(name: str, kind: str):
    objective = OBJECTIVES[name]()
    operator = CURVATURE[kind](objective)
    assert isinstance(operator, CurvatureOperator)
    assert isinstance(operator, LinearMap)
    check_operator(operator, objective=objective)


# ---- planted faults -------------------------------------------------------------------------------------------------

MATRIX = rotated(torch.linspace(-1.0, 5.0, 30))


class Planted(DenseMap):
    """A right operator; the faults below override one method each."""

    def __init__(self, matrix: Tensor = MATRIX) -> None:
        super().__init__(matrix)


class Affine(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v) + 1e-4


class Quadratic(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v) * (1 + 1e-4 * v.norm())


class AtZero(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v) if v.any() else torch.full_like(v, 1e-30)


class Asymmetric(Planted):
    def __init__(self) -> None:
        super().__init__()
        self._matrix = self._matrix.clone()
        self._matrix[0, 1] += 0.1


class Noisy(Planted):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.calls += 1
        return super().matvec(v) * (1 + self.calls * torch.finfo(v.dtype).eps)


class Reusing(Planted):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.zeros(self.n)

    def matvec(self, v: Tensor) -> Tensor:
        return torch.mv(self._matrix, v, out=self.buffer) if v.shape == (self.n,) else super().matvec(v)


class OtherMatmat(Planted):
    def matmat(self, V: Tensor) -> Tensor:
        return super().matmat(V) * 1.001


class TransposedMatmat(Planted):
    def matmat(self, V: Tensor) -> Tensor:
        return super().matmat(V).T


class Widening(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v).double()


class Column(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v)[:, None]


class Elsewhere(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v).to("meta")


class WithGraph(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v).requires_grad_()


class Array(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v).numpy()  # type: ignore[return-value]


class NotANumber(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v) * float("nan")


class Writing(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        product = super().matvec(v)
        v.mul_(2.0)
        return product


class TakesAnything(Planted):
    def matvec(self, v: Tensor) -> Tensor:
        return self._matrix @ v if v.shape[:1] == (self.n,) else torch.zeros_like(v)


class OwnError(Planted):
    def matmat(self, V: Tensor) -> Tensor:
        return self._matrix @ V if V.ndim == 2 else super().matmat(V)


FAULTS: dict[type[Planted], str] = {
    Affine: r"'linear' does not hold: \|\|A\(u \+ 0.7 v\) - Au - 0.7 Av\|\| is",
    Quadratic: "'linear' does not hold",
    AtZero: r"'linear' does not hold: \|\|A 0\|\| is .* at most 0",
    Asymmetric: "'symmetric' does not hold: .* at most",
    Noisy: r"'(linear|repeatable)' does not hold",
    Reusing: "'linear' does not hold",
    OtherMatmat: "'matmat is matvec column by column' does not hold: .* k = 3, is",
    TransposedMatmat: "'matmat keeps shape, dtype and device' does not hold: the product has shape",
    Widening: "'matvec keeps shape, dtype and device' does not hold: the product has dtype torch.float64; allowed: dtype torch.float32",
    Column: r"the product has shape \[30, 1\]; allowed: shape \[30\]",
    Elsewhere: "the product has device meta; allowed: device cpu",
    WithGraph: "the product has requires_grad True; allowed: requires_grad False",
    Array: "'matvec returns a tensor' does not hold: it returned a ndarray",
    NotANumber: "'matvec is finite' does not hold",
    Writing: "'matvec leaves its argument alone' does not hold",
    TakesAnything: r"'wrong shapes are refused' does not hold: matvec took a tensor of shape \[31\], n = 30; allowed: InvalidArgument",
    OwnError: r"'wrong shapes are refused' does not hold: matmat of \[31, 2\] raised RuntimeError",
}


def test_the_sound_operator_of_the_faults_keeps_the_contract():
    check_operator(Planted())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_found(fault: type[Planted]):
    with pytest.raises(InvalidArgument, match=FAULTS[fault]):
        check_operator(fault())


def test_noise_that_linearity_cannot_see_is_found_by_repetition():
    """An operator that changes by one part in 2^23 per call is within rounding of linear, and not repeatable."""
    operator = Noisy()
    with pytest.raises(
        InvalidArgument, match=r"'repeatable' does not hold: \|\|Au - Au\|\| of two calls is .* at most 0"
    ):
        check_operator(operator)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n", 0, "n is 0; allowed: an integer of at least 1"),
        ("n", 3.0, "n is 3.0"),
        ("dtype", torch.int64, "dtype is torch.int64; allowed: a real floating-point torch.dtype"),
        ("dtype", "float32", "dtype is 'float32'"),
        ("device", "cpu", "device is 'cpu'; allowed: a torch.device"),
    ],
)
def test_a_wrong_attribute_is_found(name: str, value: object, said: str):
    operator = Planted()
    setattr(operator, name, value)
    with pytest.raises(InvalidArgument, match=said):
        check_operator(operator)


def test_a_missing_method_is_found():
    class Half:
        n, dtype, device = 3, torch.float32, torch.device("cpu")

        def matvec(self, v: Tensor) -> Tensor:
            return v

    with pytest.raises(InvalidArgument, match="Half has no matmat; allowed: n, dtype, device, matvec, matmat"):
        check_operator(Half())  # type: ignore[arg-type]


class Careless(Hessian):
    """A right Hessian that does `what` to its surroundings with each product."""

    what: Callable[[nn.Module], object]

    def matvec(self, v: Tensor) -> Tensor:
        product = super().matvec(v)
        type(self).what(self.objective.model)
        return product


OTHER_THREADS = 2 if torch.get_num_threads() == 1 else 1


def write(model: nn.Module) -> None:
    model.linear0.weight.grad = torch.ones(6, 4)


SIDE_EFFECTS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    ".grad": (write, ".grad of 'linear0.weight'"),
    ".grad, in place": (lambda model: model.linear0.weight.grad.mul_(0.5), ".grad of 'linear0.weight'"),
    "mode": (lambda model: model.eval(), "the mode of 'the model', the mode of 'linear0'"),
    "requires_grad": (lambda model: model.extra.requires_grad_(), "requires_grad of 'extra'"),
    "buffer": (lambda model: model.count.add_(1), "the buffer 'count'"),
    "module hook": (lambda model: model.register_forward_hook(lambda *_: None), "hooks of 'the model'"),
    "tensor hook": (lambda model: model.linear0.weight.register_hook(lambda g: g), "hooks of 'linear0.weight'"),
    "torch's random state": (lambda model: torch.rand(1), "torch's random state"),
    "numpy's random state": (lambda model: numpy.random.rand(), "numpy's random state"),
    "Python's random state": (lambda model: random.random(), "Python's random state"),
    "threads": (lambda model: torch.set_num_threads(OTHER_THREADS), "number of threads"),
    "encoder": (lambda model: torch.backends.mha.set_fastpath_enabled(False), "fused encoder path"),
}


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_a_side_effect_is_found(name: str):
    what, said = SIDE_EFFECTS[name]
    objective = mlp()
    objective.model.register_buffer("count", torch.zeros(1))
    objective.model.extra = nn.Parameter(torch.zeros(1), requires_grad=False)
    operator = type("Careless", (Careless,), {"what": staticmethod(what)})(objective, residency="retained")
    threads, fastpath = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    try:
        found = f"'nothing is disturbed' does not hold: a product changed: .*{said}"
        with pytest.raises(CurvkitError, match=f"{found}|^Hessian: {said} has changed since"):
            check_operator(operator, objective=objective)
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.set_rng_state(states[0])
        numpy.random.set_state(states[1])
        random.setstate(states[2])


def test_a_changed_parameter_is_found():
    """Retained products would refuse it first, so the operator is of another model than the one that is changed."""
    objective, other = mlp(), mlp()

    class Rewriting(Hessian):
        def matvec(self, v: Tensor) -> Tensor:
            with torch.no_grad():
                next(other.model.parameters()).add_(1e-3)
            return super().matvec(v)

    with pytest.raises(InvalidArgument, match="changed: the parameter 'linear0.weight'"):
        check_operator(Rewriting(objective), objective=other)


def test_an_operator_that_leaves_a_mess_when_the_forward_pass_raises_is_found():
    objective = mlp()

    class Untidy(Hessian):
        def matvec(self, v: Tensor) -> Tensor:
            if v.shape != (self.n,):
                return super().matvec(v)
            self.objective.model.train(not self.objective.model.training)
            product = super().matvec(v)
            self.objective.model.train(not self.objective.model.training)
            return product

    with pytest.raises(InvalidArgument, match="a product whose forward pass raised changed: the mode of 'the model'"):
        check_operator(Untidy(objective, residency="streamed"), objective=objective)


class Cubed(torch.autograd.Function):
    """x^3, whose backward pass is not differentiated: torch drops that part of the second derivative without a word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class WithCubes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Cubed.apply(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_second_derivatives_of_torch_are_found(dtype: torch.dtype):
    """A once_differentiable function gives products without an error, of a matrix that is not symmetric."""
    with seeded():
        model = WithCubes().to(dtype)
    objective = Objective(model, F.cross_entropy, [(normal(8, 4, dtype=dtype), classes(8, num=3))])
    with pytest.raises(InvalidArgument, match="'symmetric' does not hold"):
        check_operator(Hessian(objective), objective=objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_norm_keeps_the_contract(dtype: torch.dtype):
    """By itself torch has it wrong; it is written out while products are computed."""
    with seeded():
        model = nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    objective = Objective(model, F.cross_entropy, [(normal(8, 4, dtype=dtype), classes(8, num=3))])
    check_operator(Hessian(objective), objective=objective)
