"""The exact trace of piecewise linear networks: what counts as one, and that it is the trace of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from oracles import classes, cut, dense, normal, seeded
from samples import ROWS, examples
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.measures import TraceSettings, piecewise_linear, trace
from curvkit.operators.affine import is_affine_in_each_entry


class Body(nn.Module):
    """Three layers that tests join in their own ways."""

    def __init__(self, join: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.held = [self.scale]
        self._join = join

    def forward(self, x: Tensor) -> Tensor:
        return self._join(self, x)


def h(self: Any, x: Tensor) -> Tensor:
    return torch.relu(self.a(x))


def residual(self: Any, x: Tensor) -> Tensor:
    inner = h(self, x)
    return self.c(inner + torch.relu(self.b(inner)))


AFFINE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda self, x: self.c(torch.relu(self.b(h(self, x)))),
    "residual": residual,
    "scaled": lambda self, x: self.c(torch.relu(self.b(h(self, x)) * self.scale)),
    "leaky": lambda self, x: self.c(F.leaky_relu(self.a(x), 0.1)),
    "absolute": lambda self, x: self.c(self.a(x).abs()),
}
NOT_AFFINE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "used twice": lambda self, x: self.c(self.b(torch.relu(self.b(h(self, x))))),
    "product of activations": lambda self, x: self.c(
        h(self, x) * self.b(torch.relu(self.a.weight.sum() + x @ x.T @ x @ self.a.weight.T))
    ),
    "squared": lambda self, x: self.c(h(self, x).square()),
    "tanh": lambda self, x: self.c(torch.tanh(self.a(x))),
    "gate": lambda self, x: self.c(self.a(x) * torch.sigmoid(x[:, :1])) * self.a(x)[:, :3],
    "parameter squared": lambda self, x: self.c(h(self, x) * (self.scale * self.scale)),
    "relu of a parameter": lambda self, x: self.c(h(self, x) * torch.relu(self.scale)),
    "mask": lambda self, x: self.c(self.a(x) * (self.a(x) > 0)),
    "depends on a value": lambda self, x: self.c(self.a(x)) if self.a.weight.sum() > -1e9 else self.c(x),
    "in place": lambda self, x: self.c(torch.zeros(len(x), 8, dtype=x.dtype).add_(self.a(x))),
    "softmax": lambda self, x: self.c(self.a(x).softmax(1)),
    "with gradients only": lambda self, x: self.c(torch.tanh(self.a(x)) if torch.is_grad_enabled() else self.a(x)),
    "custom function": lambda self, x: self.c(TanhByNumpy.apply(self.a(x))),  # pyright: ignore
    "custom function of known operations": lambda self, x: self.c(ReluOfItsOwn.apply(self.a(x))),  # pyright: ignore
    "activation squared": lambda self, x: self.c(self.a(x) * self.a(x)),
    "one activation squared": lambda self, x: self.c((lambda inner: inner * inner)(self.a(x))),
    "softmax gate": lambda self, x: self.c(torch.relu(self.a(x)) * self.b(torch.relu(self.a(x))).softmax(1)),
    "shared by transposition": lambda self, x: self.c(torch.relu(self.b(torch.relu(self.a(x)) @ self.b.weight.t()))),
    "parameter held elsewhere": lambda self, x: self.c(h(self, x) * self.held[0]),
    "normalised": lambda self, x: self.c(F.layer_norm(self.a(x), (8,))),
}


class TanhByNumpy(torch.autograd.Function):
    """x + tanh(x) / 2 outside torch, with a backward pass that torch differentiates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() + numpy.tanh(x.detach().numpy()) / 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors
        return g * (1.5 - torch.tanh(x).square() / 2)


class ReluOfItsOwn(torch.autograd.Function):
    """ReLU by operations that are on the list, with the backward pass of another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x)
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore
        (x,) = ctx.saved_tensors
        return g * torch.tanh(x)


class EarlierView(nn.Module):
    """A row of a weight that was made before the forward pass, beside the weight."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(4, 8), nn.Parameter(normal(3, 8, seed=6))
        self.row = self.w.detach()[0:1] if detached else self.w[0:1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu((torch.relu(self.a(x)) * self.row) @ self.w.t())


def built(join: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, Objective]:
    with seeded(1):
        model = Body(join).double()
    return model, Objective(model, F.cross_entropy, cut(ROWS, *examples(torch.float64)))


def truth(model: nn.Module, loss: Any = F.cross_entropy) -> Tensor:
    x, y = examples(torch.float64)
    return dense(model, lambda call: loss(call(x), y)).hessian


@pytest.mark.parametrize("name", AFFINE)
def test_exact_trace_and_shares(name: str):
    """Rung 2: the dense Hessian; sums of some thousand squares in float64."""
    model, objective = built(AFFINE[name])
    assert is_affine_in_each_entry(objective)
    assert piecewise_linear.applies(objective, 0)
    found = trace(objective, seed=0)
    diagonal = truth(model).diagonal()
    assert found.value == pytest.approx(diagonal.sum().item(), rel=1e-11)
    pieces = diagonal.split([share.parameters for share in found.parameters])
    assert [share.value for share in found.parameters] == pytest.approx([p.sum().item() for p in pieces], abs=1e-12)
    assert (found.estimate.exact, found.estimate.converged, found.products) == (True, True, 0)
    assert "a piecewise linear network: the trace is that of the GGN" in found.estimate.reason


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_known_to_be_affine_is_not_used(name: str):
    _, objective = built(NOT_AFFINE[name])
    assert not is_affine_in_each_entry(objective)
    found = trace(objective, seed=0, tolerance=0.3)
    assert "piecewise" not in found.estimate.reason


@pytest.mark.parametrize("detached", [False, True])
def test_a_view_of_a_parameter_made_earlier_is_no_constant(detached: bool):
    with seeded(1):
        model = EarlierView(detached=detached)
    model.a.double()
    x, y = examples(torch.float64)
    objective = Objective(model, F.cross_entropy, [(x, y)])
    assert not is_affine_in_each_entry(objective)
    assert not piecewise_linear.applies(objective, 0)


def test_tied_weights_are_not_used():
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    assert not is_affine_in_each_entry(Objective(model, F.cross_entropy, [examples(torch.float64)]))


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), None),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1), None),
        (nn.CrossEntropyLoss(ignore_index=2), None),
        (nn.MSELoss(), normal(24, 3, seed=9)),
        (nn.BCEWithLogitsLoss(), classes(24, 3, num=2, seed=9).double()),
    ],
)
def test_losses_and_uneven_batches(loss: Any, targets: Tensor | None):
    with seeded(1):
        model = Body(AFFINE["plain"]).double()
    x, y = examples(torch.float64)
    y = y if targets is None else targets
    found = trace(Objective(model, loss, cut(ROWS, x, y)), seed=0)
    assert "piecewise linear" in found.estimate.reason
    expected = dense(model, lambda call: loss(call(x), y)).hessian.trace().item()
    assert found.value == pytest.approx(expected, rel=1e-11)


def test_convolutions_and_chosen_parameters(monkeypatch: pytest.MonkeyPatch):
    """Also with the examples cut into chunks of one."""
    with seeded(2):
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 3),
        ).double()
    x, y = normal(10, 1, 8, 8, seed=4), classes(10, num=3, seed=5)
    H = dense(model, lambda call: F.cross_entropy(call(x), y)).hessian
    monkeypatch.setattr(piecewise_linear, "CHUNK_BYTES", 1)
    found = trace(Objective(model, F.cross_entropy, [(x, y)]), seed=0)
    assert "piecewise linear" in found.estimate.reason
    assert found.value == pytest.approx(H.trace().item(), rel=1e-11)
    some = trace(Objective(model, F.cross_entropy, [(x, y)], parameters=["3.*"]), seed=0)  # pyright: ignore
    assert "piecewise linear" in some.estimate.reason
    assert some.value == pytest.approx(H.diagonal()[60:210].sum().item(), rel=1e-11)


def test_it_can_be_switched_off_and_gives_way_to_a_named_method():
    _, objective = built(AFFINE["plain"])
    off = trace(objective, seed=0, settings=TraceSettings(structure=False), tolerance=0.3)
    assert "piecewise" not in off.estimate.reason
    named = trace(objective, seed=0, method="hutchinson", tolerance=0.3)
    assert named.estimate.method == "hutchinson"


def test_losses_that_are_not_known_are_not_used():
    model, _ = built(AFFINE["plain"])
    x, y = examples(torch.float64)
    own = Objective(model, BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])), [(x, y)])
    assert not piecewise_linear.applies(own, 0)


def test_many_outputs_are_sampled():
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 21)).double()
    x = normal(12, 4, seed=1)
    assert is_affine_in_each_entry(made := Objective(model, F.mse_loss, [(x, normal(12, 21, seed=2))]))
    assert not piecewise_linear.applies(made, 0)


def test_rows_that_are_coupled_are_not_used():
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            inner = torch.relu(self.a(x))
            return self.c(inner + inner.mean(0, keepdim=True))

    with seeded(0):
        model = Coupled().double()
    made = Objective(model, F.cross_entropy, [examples(torch.float64)])
    assert is_affine_in_each_entry(made)
    assert not piecewise_linear.applies(made, 0)


def test_diagonals_that_differ_stop_it(monkeypatch: pytest.MonkeyPatch):
    """If the reading of operations were ever wrong, the comparison of entries is there."""
    _, objective = built(NOT_AFFINE["tanh"])
    monkeypatch.setattr(piecewise_linear, "is_affine_in_each_entry", lambda objective: True)
    assert not piecewise_linear.applies(objective, 0)
