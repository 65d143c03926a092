"""Sharpness with its two doubts: closed forms, dense spectra, what the doubt from data claims, and steps, seeds and budgets."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    classes,
    cut,
    dense,
    linear_regression_hessian,
    normal,
    seeded,
    softmax_regression_hessian,
)
from samples import ROWS, Net, examples, net, truth
from torch import Tensor, nn

from curvkit import BatchLoss, Objective
from curvkit.errors import InvalidArgument, UnsupportedModel
from curvkit.linalg import lanczos
from curvkit.losses import token_cross_entropy
from curvkit.measures import Halves, Sharpness, SharpnessSettings, Spread, data_doubt, sharpness, sharpness_steps
from curvkit.models import Decoder
from curvkit.operators import Hessian

SEARCH_ONLY = SharpnessSettings(data_doubt=False)


def objective(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = ROWS) -> Objective:
    """The small classifier; 51 parameters, so that the whole space is not spanned by default."""
    return Objective(net().to(dtype), F.cross_entropy, cut(sizes, *examples(dtype)))


def linear(inputs: Tensor, outputs: int = 1, seed: int = 0) -> nn.Linear:
    with seeded(seed):
        return nn.Linear(inputs.shape[1], outputs).to(inputs.dtype)


# ---- closed forms and dense spectra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_regression(dtype: torch.dtype):
    """Rung 1: 2/N X'X with a column of ones; n = 41 is above the order up to which the whole space is spanned."""
    x = normal(60, 40, seed=1)
    values = torch.linalg.eigvalsh(linear_regression_hessian(x, 1))
    inputs = x.to(dtype)
    found = sharpness(
        Objective(linear(inputs), F.mse_loss, cut((20, 40), inputs, inputs[:, :1])), 3, tolerance=1e-4, seed=0
    )
    assert found.eigenpairs.all_converged
    expected = values.flip(0)[:3]
    # the intervals hold for the float32 matrix; rounding its products of 60 terms moves eigenvalues by a few dozen eps ||H||
    slack = 50 * torch.finfo(dtype).eps * values[-1]
    low, high = found.eigenpairs.intervals.T
    assert bool(((low - slack <= expected) & (expected <= high + slack)).all())
    assert found.value == found.eigenpairs.values[0].item()


def test_softmax_regression():
    """Rung 1: 1/N sum (diag p - pp') (x) xx', which has a null space."""
    x, y = normal(30, 12, seed=2), classes(30, num=4, seed=3)
    model = linear(x, 4)
    values = torch.linalg.eigvalsh(softmax_regression_hessian(x, model(x).detach()))
    found = sharpness(Objective(model, F.cross_entropy, cut((7, 23), x, y)), 2, tolerance=1e-8, seed=0)
    # float64 and residuals of 1e-8 relative: eigenvalues to 1e-16 ||H|| / gap, far below 1e-9
    assert found.eigenpairs.values.tolist() == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-9)


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("num", [1, 3])
def test_which_eigenvalues(which: Any, num: int):
    """Rung 2: the dense spectrum of a classifier, which has negative eigenvalues."""
    values = truth()
    assert values[0] < -1e-3
    order = {
        "largest": values.flip(0)[:num],
        "smallest": values[:num].flip(0),
        "both": torch.cat([values[-(num - num // 2) :], values[: num // 2]]).sort(descending=True).values,
        "magnitude": values[values.abs().argsort(descending=True)[:num]].sort(descending=True).values,
    }
    found = sharpness(objective(torch.float64), num, which=which, tolerance=1e-8, seed=0, settings=SEARCH_ONLY)
    assert found.eigenpairs.values.tolist() == pytest.approx(order[which].tolist(), rel=1e-9)
    outermost = {"smallest": values[0], "magnitude": values[values.abs().argmax()]}.get(which, values[-1])
    assert found.value == pytest.approx(outermost.item(), rel=1e-9)
    assert found.to_dict()["quantity"] == f"{which} eigenvalues of the Hessian"


def test_an_order_of_one():
    model = nn.Linear(1, 1, bias=False)
    found = sharpness(Objective(model, F.mse_loss, [(torch.tensor([[3.0]]), torch.tensor([[1.0]]))]), seed=0)
    assert found.value == pytest.approx(18.0, rel=1e-6)  # 2 x^2, in float32
    assert found.eigenpairs.confidence == 1.0
    assert (found.spread, found.halves, found.stage) == (None, None, "complete")


def test_a_converted_objective_is_measured_in_float64():
    found = sharpness(objective().converted(dtype=torch.float64), tolerance=1e-10, seed=0, settings=SEARCH_ONLY)
    assert found.definition.dtype == "float64"
    assert found.value == pytest.approx(truth()[-1].item(), rel=1e-6)  # the data was rounded to float32, 6e-8


def test_half_precision_is_raised():
    found = sharpness(objective(torch.bfloat16), seed=0)
    assert found.definition.dtype == "float32"
    assert found.halves is not None


# ---- the record of what was measured --------------------------------------------------------------------------------


def test_definition_loss_and_gradient():
    x, y = examples(torch.float64)
    model = net().double()
    exact = dense(model, lambda call: F.cross_entropy(call(x), y))
    found = sharpness(objective(torch.float64), seed=0)
    assert found.loss == pytest.approx(exact.loss, rel=1e-12)
    assert found.gradient_norm == pytest.approx(torch.linalg.vector_norm(exact.gradient).item(), rel=1e-12)
    assert str(found.definition) == (
        "Hessian of cross_entropy, mean over 24 terms · 24 examples in 2 batches · 51 parameters · train mode · float64"
    )
    assert found.eigenpairs.space is not None
    assert found.eigenpairs.space.names == ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    v, H = found.eigenpairs.vectors, exact.hessian
    assert v is not None
    residual = torch.linalg.vector_norm(H @ v[:, 0] - found.value * v[:, 0]).item()
    # both residuals are rounded at 1e-15 ||H||; they differ by no more than a few of those
    assert found.eigenpairs.residuals[0].item() == pytest.approx(residual, abs=1e-13 * abs(found.value))


def test_unused_frozen_and_tied_parameters_are_told():
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.outer.bias.requires_grad_(False)

    with seeded():
        model = Odd()
    found = sharpness(Objective(model, F.cross_entropy, [examples()]), seed=0, settings=SEARCH_ONLY)
    assert found.unused == ("unused.weight", "unused.bias")
    assert found.notes == ("frozen and left out: outer.bias",)
    assert found.definition.parameters == 51 - 3 + 6
    with seeded():
        tied = Decoder(vocabulary=5, width=4, depth=1, heads=2, context=7)
    tokens = classes(3, 7, num=5, seed=1)
    found = sharpness(Objective(tied, token_cross_entropy, [(tokens, tokens)]), seed=0, settings=SEARCH_ONLY)
    assert found.notes == ("tied: head.weight = embedding.weight",)


def test_the_plain_form():
    found = sharpness(objective(), 2, seed=4)
    plain = found.to_dict()
    assert plain["definition"]["text"] == str(found.definition)
    assert [e["value"] for e in plain["eigenvalues"]] == found.eigenpairs.values.tolist()
    assert [[e["low"], e["high"]] for e in plain["eigenvalues"]] == found.eigenpairs.intervals.tolist()
    assert [e["converged"] for e in plain["eigenvalues"]] == [True, True]
    assert found.spread is not None
    assert found.halves is not None
    assert plain["batch_spread"]["quotients"] == list(found.spread.quotients)
    assert plain["halves"]["lower"] == sum(found.halves.held_out) / 2
    assert plain["stage"] == "complete"
    assert sharpness(objective(), seed=4, settings=SEARCH_ONLY).to_dict()["halves"] is None


def test_nothing_is_disturbed():
    model = net().train()
    model.inner.weight.grad = torch.ones_like(model.inner.weight)
    before, grads, state = {k: v.clone() for k, v in model.state_dict().items()}, {}, torch.get_rng_state()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    sharpness(Objective(model, F.cross_entropy, [examples()]), seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, p in model.named_parameters():
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_steps_grow_and_end_complete():
    found = list(sharpness_steps(objective(), seed=0))
    stages = [result.stage for result in found]
    assert stages == sorted(stages, key=["searching", "spread", "halves", "complete"].index)
    assert stages.count("spread") == stages.count("complete") == 1
    products = [result.products for result in found]
    assert products == sorted(products)
    searching = [result for result in found if result.stage == "searching"]
    partial, certified = searching[:-1], searching[-1]
    assert [result.products for result in partial] == list(range(1, len(partial) + 1))
    assert not any(result.eigenpairs.recomputed for result in partial)
    assert not any(e["converged"] for result in partial for e in result.to_dict()["eigenvalues"])
    assert certified.eigenpairs.recomputed
    values = [result.value for result in partial]  # Ritz values of growing spaces: they can only grow, up to rounding
    assert all(b >= a - 1e-6 * abs(a) for a, b in itertools.pairwise(values))
    assert {result.seed for result in found} == {0}
    seconds = [result.seconds for result in found]
    assert seconds == sorted(seconds)
    last = found[-1]
    assert last.halves is not None
    assert all(result.halves is None for result in found[:-2])
    assert last.eigenpairs is found[-2].eigenpairs


def test_a_consumer_may_stop_at_any_step():
    model = net()
    steps = sharpness_steps(Objective(model, F.cross_entropy, [examples()]), seed=0)
    first = next(steps)
    steps.close()
    assert first.stage == "searching"
    assert all(p.grad is None for p in model.parameters())


def test_the_last_step_is_the_result():
    *_, last = sharpness_steps(objective(), seed=3)
    direct = sharpness(objective(), seed=3)
    assert last.to_dict() | {"seconds": 0} == direct.to_dict() | {"seconds": 0}


# ---- seeds ----------------------------------------------------------------------------------------------------------


def bits(result: Sharpness) -> dict[str, Any]:
    return result.to_dict() | {"seconds": 0, "vectors": result.eigenpairs.vectors.tolist()}  # type: ignore[union-attr]


def test_same_seed_same_bits():
    first, again, other = (sharpness(objective(), 2, seed=seed) for seed in (5, 5, 6))
    assert bits(first) == bits(again)
    assert bits(first) != bits(other)
    assert first.value == pytest.approx(other.value, rel=1e-3)


def test_a_drawn_seed_is_recorded_and_reproduces():
    first, second = sharpness(objective()), sharpness(objective())
    assert first.seed != second.seed
    assert bits(sharpness(objective(), seed=first.seed)) == bits(first)


def test_the_largest_seed():
    assert sharpness(objective(), seed=2**63 - 1).halves is not None


# ---- budgets and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, -1])
def test_memory_must_be_positive(memory: int):
    with pytest.raises(
        InvalidArgument, match=f"sharpness: memory_bytes={memory} must be positive. Pass bytes, for example"
    ):
        SharpnessSettings(memory_bytes=memory)


def test_too_little_memory_is_refused_and_a_little_more_restarts():
    n = 51 * 4
    with pytest.raises(InvalidArgument, match=r"\d vectors of length 51 fit the memory budget; 1 eigenvalue"):
        sharpness(objective(), seed=0, settings=SharpnessSettings(memory_bytes=2 * 8 * n))
    found = sharpness(objective(), 2, seed=0, settings=SharpnessSettings(memory_bytes=2 * 24 * n))
    # residuals of 1e-3 relative, so the values agree to that at worst
    assert found.eigenpairs.values.tolist() == pytest.approx(truth().flip(0)[:2].tolist(), rel=1e-3)
    assert found.halves is not None


def test_a_budget_of_products_is_kept_and_said():
    found = sharpness(objective(), max_products=4, seed=0, settings=SEARCH_ONLY)
    assert found.eigenpairs.products == found.products == 4
    assert not found.eigenpairs.all_converged
    low, high = found.eigenpairs.intervals[0].tolist()
    assert bool(((truth() >= low) & (truth() <= high)).any())


def test_a_budget_of_time_holds_for_the_halves_too():
    search = lanczos.Settings(max_seconds=1e-9)
    found = [*sharpness_steps(objective(), SharpnessSettings(search), seed=0)]
    assert found[-1].eigenpairs.products == 3  # one, one in float64 for the residual, and one to compare with that
    assert sum(result.stage == "halves" for result in found) == 2 * 2 + 2 + 1


def test_active_dropout_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(UnsupportedModel, match=r"1 \(Dropout\) is active"):
        sharpness(Objective(model, F.cross_entropy, [examples()]), seed=0)


class Nonsense(torch.autograd.Function):
    """A square whose backward pass is not its derivative, so that "second derivatives" are not symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.exp(ctx.saved_tensors[0].roll(1, -1))


def test_a_wrong_derivative_is_refused():
    class Wrong(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.outer(Nonsense.apply(self.inner(x)))

    with seeded():
        model = Wrong()
    with pytest.raises(
        UnsupportedModel, match="sharpness: the products are not those of a symmetric matrix \\(u'Hv and v'Hu"
    ):
        sharpness(Objective(model, F.cross_entropy, [examples()]), seed=0, settings=SharpnessSettings(preflight=False))


def test_a_failure_in_the_doubt_leaves_the_eigenvalues():
    """They are certified by then; what failed is said in a note."""

    class Failing(Net):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise LookupError("no such file any more")
            return super().forward(x)

    with seeded():
        model = Failing()
    for found in sharpness_steps(Objective(model, F.cross_entropy, cut(ROWS, *examples())), seed=0):
        model.fails = found.stage == "spread"
    assert found.stage == "complete"
    assert found.eigenpairs.all_converged
    assert found.spread is not None
    assert found.halves is None
    assert found.notes == ("the doubt from data could not be measured: LookupError: no such file any more",)


# ---- doubt from data: the spread ------------------------------------------------------------------------------------

TOKENS, NEXT = classes(7, 6, num=5, seed=5), classes(7, 6, num=5, seed=6)
NEXT[0, 1:], NEXT[5] = -100, -100


def decoder() -> nn.Module:
    with seeded():
        return Decoder(vocabulary=5, width=4, depth=1, heads=2, context=6).double()


def pair(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


XY = examples(torch.float64)
SPREADS: dict[str, Callable[[], Objective]] = {
    "uneven batches": lambda: objective(torch.float64, (3, 14, 7)),
    "one batch": lambda: objective(torch.float64, (24,)),
    "fewer rows than parts": lambda: Objective(net().double(), F.cross_entropy, [(XY[0][:3], XY[1][:3])]),
    "class weights": lambda: Objective(
        net().double(), nn.CrossEntropyLoss(torch.tensor([0.1, 1.0, 5.0]).double()), cut((5, 19), *XY)
    ),
    "ignored targets": lambda: Objective(decoder(), token_cross_entropy, cut((2, 3, 1, 1), TOKENS, NEXT)),
    "sum and count": lambda: Objective(net().double(), BatchLoss(pair), cut((3, 14, 7), *XY)),
    "a sum": lambda: Objective(net().double(), nn.CrossEntropyLoss(reduction="sum"), cut((3, 14, 7), *XY)),
    "a sum over one batch": lambda: Objective(net().double(), nn.CrossEntropyLoss(reduction="sum"), [XY]),
}


@pytest.mark.parametrize("name", SPREADS)
def test_the_weights_of_the_spread_average_to_the_whole(name: str):
    """Law: sum_b w_b v'H_b v / sum_b w_b = v'Hv, whatever the batches; float64, so to rounding of sums over 24 examples."""
    made = SPREADS[name]()
    H = Hessian(made)
    v = normal(H.n, seed=9)
    v /= torch.linalg.vector_norm(v)
    found = data_doubt.spread(H, v)
    assert found is not None
    whole = torch.dot(v, H.matvec(v)).item()
    mean = math.fsum(w * q for w, q in zip(found.weights, found.quotients, strict=True)) / math.fsum(found.weights)
    scale = max(map(abs, found.quotients))
    assert mean == pytest.approx(whole, abs=1e-12 * scale)
    assert found.lowest == min(found.quotients)
    assert found.highest == max(found.quotients)
    assert found.lowest - 1e-12 * scale <= whole <= found.highest + 1e-12 * scale


def test_the_quotients_are_those_of_the_batches():
    """Rung 2: each is v'H_b v of the dense Hessian of that batch alone."""
    x, y = XY
    found = sharpness(objective(torch.float64), seed=0)
    assert found.spread is not None
    v = found.eigenpairs.vectors[:, 0]  # type: ignore[index]
    for quotient, (xb, yb) in zip(found.spread.quotients, cut(ROWS, x, y), strict=True):
        H = dense(net().double(), lambda call, xb=xb, yb=yb: F.cross_entropy(call(xb), yb)).hessian
        assert quotient == pytest.approx((v @ H @ v).item(), rel=1e-11)
    assert found.spread.weights == tuple(map(float, ROWS))


def test_the_standard_error_of_equal_batches():
    """Rung 1: for equal weights it is the sample standard deviation over sqrt(m)."""
    found = sharpness(objective(torch.float64, (6, 6, 6, 6)), seed=0).spread
    assert found is not None
    quotients = torch.tensor(found.quotients, dtype=torch.float64)
    assert found.stderr == pytest.approx((quotients.std() / 2.0).item(), rel=1e-12)


def test_a_sum_has_the_spread_of_the_mean_scaled():
    mean = sharpness(objective(torch.float64), seed=0)
    total = Objective(net().double(), nn.CrossEntropyLoss(reduction="sum"), cut(ROWS, *XY))
    summed = sharpness(total, seed=0)
    assert mean.spread is not None
    assert summed.spread is not None
    assert mean.halves is not None
    assert summed.halves is not None
    # 24 rows; the same Krylov spaces, scaled, so to rounding
    assert [q / 24 for q in summed.spread.quotients] == pytest.approx(list(mean.spread.quotients), rel=1e-9)
    assert summed.spread.stderr / 24 == pytest.approx(mean.spread.stderr, rel=1e-9)
    assert [q / 24 for q in summed.halves.held_out] == pytest.approx(list(mean.halves.held_out), rel=1e-6)


def scalar_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        (BatchLoss(scalar_loss), [examples()]),  # how to divide it is not known
        (F.cross_entropy, [tuple(t[:1] for t in examples())]),  # one row
    ],
)
def test_data_that_cannot_be_divided_has_no_doubt(loss: Any, data: Any):
    found = sharpness(Objective(net(), loss, data), seed=0)
    assert (found.spread, found.halves, found.stage) == (None, None, "complete")
    assert found.products == found.eigenpairs.products


def test_a_half_without_a_term_leaves_the_bracket_out():
    data = cut((4, 3), TOKENS, NEXT.clone())
    data[1][1].fill_(-100)
    found = sharpness(Objective(decoder(), token_cross_entropy, data), seed=0)
    assert (found.spread, found.halves, found.stage) == (None, None, "complete")


# ---- doubt from data: the two halves --------------------------------------------------------------------------------


def test_held_out_quotients_are_those_of_the_other_half():
    """Rung 2: u_A from the dense Hessian of half A, on the dense Hessian of half B, and the other way round."""
    hessians = [
        dense(net().double(), lambda call, x=x, y=y: F.cross_entropy(call(x), y)).hessian for x, y in cut(ROWS, *XY)
    ]
    tops = [torch.linalg.eigh(H).eigenvectors[:, -1] for H in hessians]
    exact = [(u @ H @ u).item() for u, H in zip(tops, reversed(hessians), strict=True)]
    found = sharpness(objective(torch.float64), seed=0)
    assert found.halves is not None
    # a residual of 3e-2 relative leaves an angle of about 3e-2 lambda / gap, so the quotient is off by a few per cent
    assert list(found.halves.held_out) == pytest.approx(exact, rel=0.1)
    assert found.halves.in_sample == found.value
    assert found.halves.lower == sum(found.halves.held_out) / 2
    assert found.halves.lower < found.value


def test_the_search_on_one_half_never_sees_the_other(monkeypatch: pytest.MonkeyPatch):
    """Law: u_A is the same to the last bit whatever half B contains; otherwise it would not be held out."""
    tops: list[list[Tensor]] = []

    class Spy:
        Settings = lanczos.Settings

        @staticmethod
        def search(*arguments: Any, **options: Any) -> Any:
            for pairs in lanczos.search(*arguments, **options):
                yield pairs
            tops[-1].append(pairs.vectors[:, 0])

    monkeypatch.setattr(data_doubt, "lanczos", Spy)
    (first, second), brackets = cut((12, 12), *examples()), []
    for factor in (1.0, -30.0):
        tops.append([])
        made = Objective(net(), F.cross_entropy, [first, (factor * second[0], second[1])])
        *_, bracket = data_doubt.halves(made, 1.0, seed=0, limits=lanczos.Settings())
        brackets.append(bracket)
    assert [len(found) for found in tops] == [2, 2]
    assert torch.equal(tops[0][0], tops[1][0])
    assert not torch.equal(tops[0][1], tops[1][1])
    assert brackets[0].held_out != brackets[1].held_out


@pytest.mark.slow
def test_the_bracket_of_the_population():
    """Rung 5: on linear regression with a known population, held out lies below lambda_max and in sample above it, on average.

    Inputs x ~ N(0, diag(1.44, 1, 1, 1)) without bias, so that the population's Hessian is 2 diag(1.44, 1, 1, 1) and
    lambda_max = 2.88; 12 rows per draw, 6 per half. The mean over the draws is compared with 2.88 at five of its standard errors.
    """
    scales, population = torch.tensor([1.2, 1.0, 1.0, 1.0]).double(), 2.88
    held_out, in_sample = [], []
    for draw in range(240):
        x = normal(12, 4, seed=1000 + draw) * scales
        top = torch.linalg.eigvalsh(2 * x.T @ x / 12)[-1].item()
        made = Objective(nn.Linear(4, 1, bias=False).double(), F.mse_loss, [(x, x[:, :1])])
        *_, bracket = data_doubt.halves(made, top, seed=draw, limits=lanczos.Settings())
        assert isinstance(bracket, Halves)
        held_out.append(bracket.lower)
        in_sample.append(bracket.in_sample)
    low, high = torch.tensor(held_out).double(), torch.tensor(in_sample).double()
    assert low.mean() + 5 * low.std() / len(low) ** 0.5 < population
    assert high.mean() - 5 * high.std() / len(high) ** 0.5 > population


class Concave(nn.Module):
    """A loss whose largest eigenvalue in absolute value is negative: -100 a^2 + sum b_i^2 x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(40))

    def forward(self, x: Tensor) -> Tensor:
        return (x * (self.b.square().sum() - 100 * self.a.square())).sum(1)


def concave() -> Objective:
    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return model(batch).sum(), len(batch)

    return Objective(Concave(), BatchLoss(loss), [torch.ones(2, 1), torch.ones(3, 1)])


@pytest.mark.parametrize(
    ("which", "num", "halves"), [("magnitude", 1, False), ("magnitude", 2, True), ("smallest", 1, False)]
)
def test_the_bracket_is_only_one_of_the_largest_eigenvalue(which: Any, num: int, halves: bool):
    found = sharpness(concave(), num, which=which, seed=0)
    assert found.value == pytest.approx(-200.0, rel=1e-5)
    assert found.eigenpairs.values[0].item() == pytest.approx(-200.0 if num == 1 else 2.0, rel=1e-3)
    assert isinstance(found.spread, Spread)
    assert found.spread.quotients == pytest.approx((-200.0, -200.0), rel=1e-5)
    assert (found.halves is not None) == halves
    if found.halves is not None:
        assert found.halves.in_sample == found.eigenpairs.values[0].item()


def test_the_graphs_of_all_the_data_are_freed_before_those_of_a_half(monkeypatch: pytest.MonkeyPatch):
    alive: list[weakref.ref[Hessian]] = []
    counts: list[int] = []
    init = Hessian.__init__

    def counted(self: Hessian, *arguments: Any, **options: Any) -> None:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        init(self, *arguments, **options)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(Hessian, "__init__", counted)
    sharpness(objective(), seed=0)
    assert counts[0] == 0
    assert max(counts[1:]) <= 1  # at most the one of the half before, which its loop variable still holds
