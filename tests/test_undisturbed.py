"""A measurement leaves everything as it was, bit for bit, also when the loss raises in the middle of it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from oracles import bits, classes, cut, fill_gradients, normal, seeded, surroundings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvkit.errors import UnsupportedModel
from curvkit.linalg import lanczos
from curvkit.losses import BatchLoss, token_cross_entropy
from curvkit.measures import sharpness, trace
from curvkit.models import Decoder
from curvkit.objectives import Objective
from curvkit.objectives.arithmetic import ExactArithmetic
from curvkit.objectives.surroundings import random_state, undisturbed
from curvkit.operators import Hessian
from curvkit.testing import check_operator


class Mixed(nn.Module):
    """Something of everything: BatchNorm, recurrence, attention, dropout, buffers, a frozen and an unused parameter, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 3)
        self.spare, self.frozen = nn.Linear(2, 2), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = self.attention(self.rnn(x)[0]) + self.mask[0]
        return self.head(self.dropout(self.frozen(x.mean(1))))


X, Y = normal(6, 2, 5, seed=1, dtype=torch.float32), classes(6, num=3, seed=2)


def mixed() -> Mixed:
    with seeded():
        model = Mixed().eval()
    model.spare.train()  # modes are a property of each module
    model.head.register_forward_hook(lambda module, inputs, output: None)
    fill_gradients(model)
    return model


def language() -> Decoder:
    with seeded():
        model = Decoder(vocabulary=7, width=8, depth=1, heads=2, context=6)
    fill_gradients(model)
    return model


TOKENS = classes(4, 6, num=7, seed=3)

USES: dict[str, Callable[[Objective], Any]] = {
    "value": lambda it: it.value(),
    "gradient": lambda it: it.gradient(),
    "drawing": lambda it: (it.batches, it.notes, it.examples),
    "converted": lambda it: it.converted(dtype=torch.float64).value(),
    "parts": lambda it: [part.value() for part in it.in_parts(2)],
    "retained": lambda it: products(Hessian(it, residency="retained")),
    "streamed": lambda it: products(Hessian(it, residency="streamed")),
    "streamed in parts": lambda it: products(Hessian(it, residency="streamed", budget_bytes=1)),
    "lanczos": lambda it: lanczos.eigenpairs(Hessian(it), 2, max_products=12, seed=0),
    "sharpness": lambda it: sharpness(it, 2, max_products=12, seed=0),
    "check_operator": lambda it: check_operator(Hessian(it), objective=it),
}


def products(H: Hessian) -> None:
    v = torch.ones(H.n, dtype=H.dtype)
    H.matvec(v)
    H.matmat(torch.stack([v, -v], dim=1))
    H.batch_quotients(v / H.n**0.5)


@contextlib.contextmanager
def same_before_and_after(model: nn.Module) -> Iterator[None]:
    before = surroundings(model)
    try:
        yield
    finally:
        after = surroundings(model)
        assert [name for name in before if before[name] != after.get(name)] == []
        assert before.keys() == after.keys()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_everything_is_left_as_it_was(use: str, shuffle: bool):
    """Law: parameters, `.grad` (the same objects), modes, buffers, hooks, requires_grad, random states and flags."""
    model = mixed()
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=shuffle)
    with same_before_and_after(model):
        USES[use](Objective(model, F.cross_entropy, loader))


@pytest.mark.parametrize("use", USES)
def test_everything_is_left_as_it_was_with_attention(use: str):
    model = language()
    with same_before_and_after(model):
        USES[use](Objective(model, token_cross_entropy, cut([3, 1], TOKENS, TOKENS.roll(-1, 1))))


class Failing:
    """A loss that raises at its n-th call, after it has disturbed what it can reach."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, model: Mixed, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        self.calls += 1
        outputs = model(batch[0])
        if self.calls == self.at:
            model.spare.eval()
            model.norm.running_mean.add_(1.0)
            model.norm.num_batches_tracked = torch.tensor(7)
            model.head.weight.grad = torch.ones_like(model.head.weight)
            model.spare.bias.requires_grad_(False)
            torch.rand(3), random.random(), numpy.random.rand()
            torch.backends.mha.set_fastpath_enabled(True)
            raise self.error("in the middle")
        return F.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("use", ["value", "gradient", "retained", "streamed", "lanczos", "sharpness"])
def test_everything_is_left_as_it_was_when_the_loss_raises(use: str, error: type[BaseException]):
    """Law, for an error at each call of the loss, from the first to the last."""
    data = cut([4, 2], X, Y)
    counting = Failing(-1, error)
    USES[use](Objective(mixed(), BatchLoss(counting), data))
    # Where the model fails on a part of the data, sharpness leaves out the doubt from data and says so.
    seen = contextlib.suppress(error) if use == "sharpness" else pytest.raises(error, match="in the middle")
    assert counting.calls >= 2
    calls = range(1, counting.calls + 1)
    for at in calls if len(calls) < 12 else (*calls[:6], *calls[6 :: len(calls) // 6]):
        model = mixed()
        with same_before_and_after(model), seen:
            USES[use](Objective(model, BatchLoss(Failing(at, error)), data))


def test_a_hessian_is_usable_after_an_error():
    """Law: the same bits as without the error."""
    model, loss = mixed(), Failing(-1, RuntimeError)
    H = Hessian(Objective(model, BatchLoss(loss), cut([4, 2], X, Y)), residency="streamed")
    v = torch.ones(H.n)
    expected = H.matvec(v)
    loss.at = loss.calls + 2
    with pytest.raises(RuntimeError, match="in the middle"):
        H.matvec(v)
    assert torch.equal(H.matvec(v), expected)


def test_training_goes_on_as_if_nothing_had_been_measured():
    """Law: the same bits after ten steps of SGD with dropout and BatchNorm, measured after each step or never."""

    def train(measure: bool) -> tuple[dict[str, Tensor], Tensor]:
        with seeded(3):
            model = Mixed().train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
            for _ in range(10):
                optimizer.zero_grad()
                F.cross_entropy(model(X), Y).backward()
                if measure:
                    model.eval()
                    H = Hessian(
                        Objective(model, F.cross_entropy, DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))
                    )
                    lanczos.eigenpairs(H, max_products=4)
                    model.train()
                optimizer.step()
            return model.state_dict(), torch.rand(1)

    (plain, after_plain), (measured, after_measured) = train(False), train(True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert torch.equal(after_plain, after_measured)


# ---- the contexts one by one ----------------------------------------------------------------------------------------


def test_random_states_come_back():
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), numpy.random.rand(), random.random()

    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    with random_state():
        first = draw()
    with contextlib.suppress(KeyError), random_state():
        assert draw() == first
        raise KeyError
    with random_state():
        assert draw() == first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[2]


def test_buffers_come_back_however_they_were_changed():
    """In place (by batch_norm even without a new version of the tensor), replaced, taken away or added."""
    model, x = nn.BatchNorm1d(3).train(), normal(4, 3, dtype=torch.float32)
    model.register_buffer("none", None)
    with same_before_and_after(model), undisturbed(model):
        model(x)
        assert model.running_mean.count_nonzero() == 3
        model.running_var = torch.zeros(3)
        del model._buffers["num_batches_tracked"]
        model.none = torch.ones(2)
        model.register_buffer("extra", torch.ones(1))
        model.eval()


def test_a_written_parameter_is_named():
    model = nn.Linear(2, 2)
    before, said = bits(model.bias), "the forward pass writes to the parameter 'bias'"
    with pytest.raises(UnsupportedModel, match=said), undisturbed(model), torch.no_grad():
        model.bias.add_(1.0)
    assert bits(model.bias) == before
    with pytest.raises(UnsupportedModel, match=said), undisturbed(model, copies=False), torch.no_grad():
        model.bias.add_(1.0)
    assert bits(model.bias) != before  # nothing to restore it from


class Clamped(nn.Module):
    """Keeps its weight in bounds by writing to it, as some implementations of Wasserstein GANs do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.01, 0.01)
        return self.inner(x)


@pytest.mark.parametrize("use", [Objective.value, Hessian, sharpness, trace])
def test_a_forward_pass_that_writes_to_a_parameter_does_no_harm(use: Callable[[Objective], object]):
    """Law: refused by name, and the parameter is what it was, bit for bit."""
    with seeded():
        model = Clamped()
    before = bits(model.inner.weight)
    objective = Objective(model, F.mse_loss, [(normal(4, 3, dtype=torch.float32), torch.zeros(4, 2))])
    with pytest.raises(UnsupportedModel, match="the forward pass writes to the parameter 'inner.weight'"):
        use(objective)
    assert bits(model.inner.weight) == before


def test_the_first_error_is_the_one_that_is_seen():
    """A written parameter does not hide the error that came before."""
    model = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), undisturbed(model), torch.no_grad():
        model.bias.add_(1.0 / 0)  # raises
    with pytest.raises(ZeroDivisionError), undisturbed(model), torch.no_grad():
        model.bias.add_(1.0).div_(1 / 0)  # is written to, then raises


def test_flags_inside_and_after():
    """Law: attention by the MATH kernel, no fused encoder, gradients on, no autocast; and everything as it was outside."""
    model = nn.Linear(2, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = surroundings(model)
        with ExactArithmetic(model):
            assert torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.backends.mha.get_fastpath_enabled()
            assert torch.backends.cuda.math_sdp_enabled()
            assert not torch.backends.cuda.flash_sdp_enabled()
            assert not torch.backends.cuda.mem_efficient_sdp_enabled()
            assert model(torch.ones(1, 2)).dtype is torch.float32
        assert surroundings(model) == before
        with pytest.raises(KeyboardInterrupt), ExactArithmetic(model):
            raise KeyboardInterrupt
        assert surroundings(model) == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_user_s_own_choice_of_precision_comes_back(precision: str):
    """Law: also through torch's older interface, which refuses to read a mixture of the two."""
    try:
        torch.set_float32_matmul_precision(precision)
        model = language()
        with same_before_and_after(model):
            USES["retained"](Objective(model, token_cross_entropy, [(TOKENS, TOKENS.roll(-1, 1))]))
        assert torch.get_float32_matmul_precision() == precision
        check_operator(Hessian(Objective(model, token_cross_entropy, [(TOKENS, TOKENS.roll(-1, 1))])))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_user_s_own_choice_of_kernels_comes_back(enabled: bool):
    fastpath = torch.backends.mha.get_fastpath_enabled()
    flash = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(enabled)
        torch.backends.cuda.enable_flash_sdp(enabled)
        model = language()
        with same_before_and_after(model):
            USES["retained"](Objective(model, token_cross_entropy, [(TOKENS, TOKENS.roll(-1, 1))]))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.cuda.enable_flash_sdp(flash)
