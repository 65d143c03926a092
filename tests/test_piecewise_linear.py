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
from curvkit.estimators import piecewise_proof
from curvkit.linalg import trace as linalg_trace
from curvkit.losses import as_loss, hessian_in_outputs, token_cross_entropy
from curvkit.losses.known import DIVISORS
from curvkit.measures import TraceSettings, piecewise_linear, trace
from curvkit.models import ResNet
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
    found = trace(objective, seed=0, method="exact")
    diagonal = truth(model).diagonal()
    assert found.value == pytest.approx(diagonal.sum().item(), rel=1e-11)
    pieces = diagonal.split([share.parameters for share in found.parameters])
    assert [share.value for share in found.parameters] == pytest.approx([p.sum().item() for p in pieces], abs=1e-12)
    assert (found.estimate.exact, found.estimate.converged, found.products) == (True, True, 0)
    assert found.by_structure
    assert (found.to_dict()["products"], found.to_dict()["by_structure"]) == (None, True)
    assert "a piecewise linear network: the trace is that of the GGN" in found.estimate.reason


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_known_to_be_affine_is_not_used(name: str):
    model, _ = built(NOT_AFFINE[name])
    objective = Objective(model, F.cross_entropy, [examples(torch.float64)])  # one batch: some couple its rows
    assert not is_affine_in_each_entry(objective)
    found = trace(objective, seed=0, tolerance=0.3, settings=TraceSettings(preflight=False))
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
    found = trace(Objective(model, loss, cut(ROWS, x, y)), seed=0, method="exact")
    assert "piecewise linear" in found.estimate.reason
    expected = dense(model, lambda call: loss(call(x), y)).hessian.trace().item()
    assert found.value == pytest.approx(expected, rel=1e-11)


class InPlaceBlock(nn.Module):
    """A residual block as it is often written: in place, with a projection and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += self.shortcut(x)
        return self.head(F.relu(out, inplace=True).mean((2, 3)))


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with statistics and factors of BatchNorm that are not the initial ones."""
    with seeded(seed):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.weight, module.bias):
                    nn.init.normal_(tensor)  # pyright: ignore
                nn.init.uniform_(module.running_var, 0.5, 2.0)  # pyright: ignore
    return model.double().eval()


@pytest.mark.parametrize("make", [lambda: ResNet(depth=8, width=2, num_classes=3, in_channels=2), InPlaceBlock])
def test_residual_networks_with_fixed_statistics(make: Callable[[], nn.Module]):
    """Rung 2: the dense Hessian of a network with BatchNorm in evaluation mode, shortcuts and sums in place."""
    with seeded(3):
        model = with_statistics(make())
    x, y = normal(6, 2, 8, 8, seed=4), classes(6, num=3, seed=5)
    objective = Objective(model, F.cross_entropy, cut((2, 4), x, y))
    assert is_affine_in_each_entry(objective)
    found = trace(objective, seed=0, method="exact")
    assert "piecewise linear" in found.estimate.reason
    expected = dense(model, lambda call: F.cross_entropy(call(x), y)).hessian.trace().item()
    assert found.value == pytest.approx(expected, rel=1e-10)


class Normalised(nn.Module):
    """BatchNorm by a function, whose statistics and factors are what the test says."""

    def __init__(self, factors: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale, self.spare = nn.Parameter(normal(8, seed=1)), nn.Parameter(normal(8, seed=2).square() + 1)
        self._factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(F.batch_norm(self.a(x), **self._factors(self, x))))


ONES, ZEROS = torch.ones(8).double(), torch.zeros(8).double()


@pytest.mark.parametrize(
    "factors",
    [
        lambda self, x: {"running_mean": ZEROS, "running_var": self.spare, "weight": self.scale},
        lambda self, x: {"running_mean": self.spare, "running_var": ONES, "weight": self.scale},
        lambda self, x: {"running_mean": ZEROS, "running_var": ONES, "weight": self.a(x).mean(0)},
        lambda self, x: {"running_mean": ZEROS, "running_var": ONES, "weight": self.scale, "bias": self.scale},
    ],
    ids=["variance is a parameter", "mean is a parameter", "factor is an activation", "factor is the offset, too"],
)
def test_norms_that_are_no_product_with_a_parameter(factors: Callable[[Any, Tensor], Any]):
    with seeded(0):
        model = Normalised(factors).double()
    assert not is_affine_in_each_entry(Objective(model, F.cross_entropy, [examples(torch.float64)]))


def test_writing_to_a_parameter_or_to_its_half_is_not_used():
    def added(self: Any, x: Tensor) -> Tensor:
        return self.c(h(self, x) * self.scale[:8].add_(self.a(x).mean()))

    with seeded(1):
        model = Body(added).double()
    assert not is_affine_in_each_entry(Objective(model, F.cross_entropy, [examples(torch.float64)]))


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


def test_the_cheaper_way_is_taken():
    """20 columns of sequences cost more than 100 probes, and less than the 2,500 of a tolerance of 1 %."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10)).double()
    x, y = normal(12, 2, 4, seed=1), normal(12, 2, 10, seed=2)
    made = Objective(model, F.mse_loss, [(x, y)])
    cost = piecewise_linear.predicted_products(made)
    assert 100 < cost < 2500
    assert piecewise_linear.applies(made, 0)
    assert not piecewise_linear.applies(made, 0, most=100)
    expected = dense(model, lambda call: F.mse_loss(call(x), y)).hessian.trace().item()
    for options in ({"tolerance": 0.01}, {"method": "exact"}):
        found = trace(made, seed=0, max_products=1000, **options)  # pyright: ignore
        assert f"at the predicted cost of {cost:.3g} products" in found.estimate.reason
        assert found.value == pytest.approx(expected, rel=1e-11)
    assert not trace(made, seed=0).estimate.exact
    within = trace(made, seed=0, method="exact", max_products=140)
    assert within.estimate.reason == "as asked"
    assert (within.estimate.products, within.value) == (130, pytest.approx(expected, rel=1e-11))


def test_time_is_kept():
    """Without time for the rest of the examples there is what sampling has by then."""
    _, objective = built(AFFINE["plain"])
    limited = TraceSettings(linalg_trace.Settings(max_seconds=1e-6))
    found = trace(objective, seed=0, settings=limited)
    assert (found.estimate.exact, found.estimate.converged, found.products) == (False, False, 1)


LOSSES: dict[Any, Tensor] = {
    F.cross_entropy: classes(24, num=3, seed=9),
    F.nll_loss: classes(24, num=3, seed=9),
    F.mse_loss: normal(24, 3, seed=9),
    F.l1_loss: normal(24, 3, seed=9),
    F.huber_loss: normal(24, 3, seed=9),
    F.smooth_l1_loss: normal(24, 3, seed=9),
    F.binary_cross_entropy: classes(24, 3, num=2, seed=9).double(),
    F.binary_cross_entropy_with_logits: classes(24, 3, num=2, seed=9).double(),
    F.poisson_nll_loss: normal(24, 3, seed=9).exp(),
    F.soft_margin_loss: 2.0 * classes(24, 3, num=2, seed=9).double() - 1,
    F.hinge_embedding_loss: 2.0 * classes(24, 3, num=2, seed=9).double() - 1,
    F.multilabel_soft_margin_loss: classes(24, 3, num=2, seed=9).double(),
    F.kl_div: normal(24, 3, seed=9).softmax(1),
    token_cross_entropy: classes(24, 1, num=3, seed=9),
}
FACTORED = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits, token_cross_entropy)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")  # kl_div on its mean
@pytest.mark.parametrize("loss", DIVISORS, ids=lambda loss: loss.__name__)
def test_every_known_loss(loss: Any):
    """Rung 2: the dense Hessian; sampled where no factor is known."""
    with seeded(1):
        last: dict[Any, nn.Module] = {
            F.binary_cross_entropy: nn.Sigmoid(),
            token_cross_entropy: nn.Unflatten(1, (1, 3)),
        }
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), last.get(loss, nn.Identity())).double()
    x, y = examples(torch.float64)[0], LOSSES[loss]
    objective = Objective(model, loss, cut(ROWS, x, y))
    affine = piecewise_linear.applies(objective, 0)
    assert affine == (loss in FACTORED)
    found = trace(objective, seed=0, tolerance=0.04, max_products=200)
    assert ("piecewise" in found.estimate.reason) == affine
    expected = dense(model, lambda call: loss(call(x), y)).hessian.trace().item()
    assert abs(found.value - expected) <= 5 * found.estimate.stderr + 1e-11 * (1 + abs(expected))


@pytest.mark.parametrize("absent", [False, True])
def test_negative_class_weights_are_sampled(absent: bool):
    """Also where the class is in the last batch only."""
    with seeded(1):
        model = Body(AFFINE["plain"]).double()
    x, y = examples(torch.float64)
    y = (torch.arange(24) >= 20).long() if absent else y
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, -0.3, 0.5]).double())
    found = trace(Objective(model, loss, cut(ROWS, x, y)), seed=0)
    assert not found.estimate.exact
    said = [note for note in found.notes if "which is piecewise linear, could not be used" in note]
    assert ["a weight of the loss is negative" in note for note in said] == [True]  # not among the first rows
    expected = dense(model, lambda call: loss(call(x), y)).hessian.trace().item()
    assert abs(found.value - expected) <= 5 * found.estimate.stderr


def test_output_hessian_without_gradients():
    """Rung 4: the same with and without gradients switched on."""
    outputs, targets = normal(4, 3, seed=1), normal(4, 3, seed=2)
    with torch.no_grad():
        off = hessian_in_outputs(as_loss(F.huber_loss), outputs, targets)
    on = hessian_in_outputs(as_loss(F.huber_loss), outputs, targets)
    assert torch.equal(off.multiply(targets), on.multiply(targets))


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
    monkeypatch.setattr(piecewise_proof, "is_affine_in_each_entry", lambda objective: True)
    assert not piecewise_linear.applies(objective, 0)


class Checking(nn.Module):
    """A piecewise linear network with a line that torch.func.vmap does not run, or that one example does not pass."""

    def __init__(self, check: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 40), nn.Linear(40, 3)
        self._check = check

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return self.b(torch.relu(self.a(x)))


def asserts(x: Tensor) -> None:
    assert torch.isfinite(x).all()


def asserts_many(x: Tensor) -> None:
    assert len(x) > 1


@pytest.mark.parametrize(
    ("check", "shown"),
    [
        (asserts, True),
        (asserts_many, False),  # the examples are not shown to be independent
        (lambda x: x.detach().numpy(), True),
        (lambda x: 0 if x.abs().max() > 1e6 else 1, True),
    ],
)
def test_a_model_need_not_run_under_vmap(check: Callable[[Tensor], Any], shown: bool):
    """Rung 2; what is not shown is sampled."""
    with seeded(0):
        model = Checking(check).double()
    x, y = examples(torch.float64)
    found = trace(Objective(model, F.cross_entropy, [(x, y)]), seed=0)
    assert abs(found.value - truth(model).trace().item()) <= 5 * found.estimate.stderr + 1e-12
    assert ("piecewise" in found.estimate.reason) == shown


class Mapped(nn.Module):
    """A layer that has no rule, since a view of its weights is multiplied element by element, and a line that vmap does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(normal(4, 24, seed=6)), nn.Linear(24, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all()
        return self.b(torch.relu((x[:, :, None] * self.a[None]).sum(1)))


def test_a_layer_without_a_rule():
    """Rung 2; where it is sampled, the note says why."""
    with seeded(0):
        model = Mapped()
    x, y = examples(torch.float64)
    found = trace(Objective(model, F.cross_entropy, [(x, y)]), seed=0)
    assert abs(found.value - truth(model).trace().item()) <= 5 * found.estimate.stderr + 1e-11
    said = [note for note in found.notes if "which is piecewise linear, could not be used" in note]
    assert ["the parameter a has no rule" in note for note in said] == [True] * (not found.estimate.exact)
