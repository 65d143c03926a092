"""Products by differences of gradients: right for smooth models, refused across kinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from oracles import classes, cut, normal, relative, seeded
from test_copies import CastsInside
from test_preflight import DetachedSine, OnceSine, made
from torch import Tensor, nn
from torch_modules import Around, batch

from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.linalg import lanczos
from curvkit.losses import BatchLoss
from curvkit.measures import SharpnessSettings, sharpness
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, Hessian
from curvkit.testing import check_operator

# Truncation h^4 and rounding eps / h at h = 1e-5 (1 + ||theta||) are near 1e-11; third and fourth derivatives of the cases make it 1e-8
# at most.
CLOSE = 1e-7
SMOOTH = ["mlp", "decoder, tied, padded tokens", "lstm", "frozen"]


@pytest.mark.parametrize("name", SMOOTH)
def test_products_are_those_of_the_dense_hessian(name: str):
    """Dense autograd in float64, from float64 and from float32 weights."""
    case = CASES[name]()
    truth = case.dense()
    H, V = DifferenceHessian(case.objective()), normal(len(truth.gradient), 2)
    assert relative(H.matmat(V), truth.hessian @ V) <= CLOSE
    assert relative(H.gradient, truth.gradient) <= 1e-12
    assert H.product_error <= CLOSE
    assert (H.plan.rule, H.plan.residency) == ("differences of gradients", "streamed")
    single = DifferenceHessian(case.objective().converted(dtype=torch.float32))
    assert single.dtype == torch.float64
    assert relative(single.matmat(V), truth.hessian @ V) <= 1e-4  # other weights: rounded to float32


def test_it_keeps_the_contract_of_an_operator():
    objective = CASES["mlp"]().objective()
    check_operator(DifferenceHessian(objective), objective=objective)


class Applying(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Sines(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@pytest.mark.parametrize("function", [OnceSine, DetachedSine])
def test_it_is_right_where_torch_is_silently_wrong(function: Any):
    """The same network with torch's own sine is the truth."""
    model = made(lambda: Around(Applying(function), 6))
    right = made(lambda: Around(Sines(), 6))
    truth = Hessian(Objective(right.double(), F.cross_entropy, [(batch()[0].double(), batch()[1])]))
    it = Objective(model.double(), F.cross_entropy, [(batch()[0].double(), batch()[1])])
    V = normal(truth.n, 2)
    assert relative(DifferenceHessian(it).matmat(V), truth.matmat(V)) <= CLOSE
    settings = SharpnessSettings(rule="difference")
    result = sharpness(it, seed=0, settings=settings)
    expected = torch.linalg.eigvalsh(truth.matmat(torch.eye(truth.n).double()))[-1].item()
    low, high = result.eigenpairs.intervals[0].tolist()
    assert low <= expected <= high
    assert result.eigenpairs.all_converged
    assert "differences of gradients" in str(result.plan)
    assert result.halves is not None


def test_ctc_loss_has_no_other_way():
    """torch has no second derivative of it; the truth is a difference quotient of the loss's gradient at another step."""
    with seeded():
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, targets = normal(6, 2, 4), classes(2, 3, num=3) + 1

    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.ctc_loss(m(b[0]).log_softmax(-1), b[1], torch.tensor([6, 6]), torch.tensor([3, 3]))

    it = Objective(model, BatchLoss(loss), [(x, targets)])
    with pytest.raises(UnsupportedModel, match="no second derivative of ctc_loss|cannot be differentiated twice"):
        sharpness(it, seed=0)
    result = sharpness(it, seed=0, settings=SharpnessSettings(rule="difference"))
    assert result.eigenpairs.all_converged
    v = result.eigenpairs.vectors
    assert v is not None
    model_theta = [p.detach().clone() for p in model.parameters()]

    def gradient(t: float) -> Tensor:
        with torch.no_grad():
            for p, w, d in zip(model.parameters(), model_theta, it.parameters.split(v[:, 0]), strict=True):
                p.copy_(w + t * d)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, (x, targets)), [*model.parameters()])])

    Hv = (gradient(1e-4) - gradient(-1e-4)) / 2e-4
    assert (Hv @ v[:, 0]).item() == pytest.approx(result.value, rel=1e-6)


def test_kinks_are_refused():
    """A ReLU at its kink: the quotient is that of another function at every step."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        model[2].weight.fill_(1.0)
    x = torch.tensor(
        [[1.0, 1.0 - 2e-6], [1.0, 0.5]], dtype=torch.float64
    )  # the first row's pre-activation is 2e-6 from zero
    H = DifferenceHessian(Objective(model, F.mse_loss, [(x, torch.ones(2, 1).double())]))
    with pytest.raises(
        UnsupportedModel, match="differences of gradients at two steps disagree by .*has kinks.*Use rule='reverse'"
    ):
        H.matvec(torch.tensor([1.0, 1.0, 0.5]).double())


def test_what_cannot_be_done_is_refused():
    objective = CASES["mlp"]().objective()
    with pytest.raises(UnsupportedModel, match="residency='retained' has no meaning for differences of gradients"):
        DifferenceHessian(objective, residency="retained")
    with pytest.raises(InvalidArgument, match="rule='forward' is not one of reverse, difference"):
        SharpnessSettings(rule="forward")  # type: ignore[arg-type]
    with seeded():
        cast = Objective(CastsInside(), F.cross_entropy, [(normal(20, 6).float(), classes(20, num=3))])
    with pytest.raises(UnsupportedModel, match="need float64, in which the model or the loss does not run .*dtype"):
        DifferenceHessian(cast)


def test_changed_parameters_of_the_original_are_noticed():
    case = CASES["mlp"]()
    H = DifferenceHessian(case.objective())
    v = normal(H.n)
    H.matvec(v)
    with torch.no_grad():
        next(iter(case.model.parameters())).add_(1.0)
    with pytest.raises(InvalidArgument, match="has changed since"):
        H.matvec(v)


def test_batches_are_weighted_as_in_the_hessian():
    """Uneven batches; a zero vector; linear in v."""
    with seeded():
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    it = Objective(model, F.cross_entropy, cut([5, 1, 6], normal(12, 4), classes(12, num=3)))
    D, H, v = DifferenceHessian(it), Hessian(it), normal(it.parameters.n)
    assert relative(D.matvec(v), H.matvec(v)) <= CLOSE
    assert torch.equal(D.matvec(torch.zeros(D.n).double()), torch.zeros(D.n).double())
    assert relative(D.matvec(1e6 * v), 1e6 * H.matvec(v)) <= CLOSE
    mine, theirs = D.batch_quotients(v / v.norm()), H.batch_quotients(v / v.norm())
    assert mine[0] == pytest.approx(theirs[0], rel=1e-6)
    assert mine[1] == theirs[1]


def test_a_tolerance_below_the_seen_rounding_is_not_converged():
    """Law: more steps cannot help; the flag says so, and the search ends."""
    with seeded():
        model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))
    it = Objective(model, F.cross_entropy, [(1e4 * normal(256, 20).float(), classes(256, num=5))])
    settings = SharpnessSettings(lanczos.Settings(tolerance=2e-6), data_doubt=False, rounding="perturbation")
    pairs = sharpness(it, tolerance=2e-6, seed=0, settings=settings).eigenpairs
    assert pairs.rounding > 2e-6 * pairs.scale
    assert not pairs.converged.any()
    assert pairs.products < 200


def test_a_loss_without_curvature_is_no_kink():
    """Closed form: linear in the parameters, H = 0; what the quotients show is rounding."""
    with seeded():
        model = nn.Linear(4, 1).double()
    it = Objective(model, BatchLoss(lambda m, b: (m(b).sum(), len(b))), list(normal(12, 4).split(4)))
    assert DifferenceHessian(it).matvec(normal(5)).norm() <= 1e-8
