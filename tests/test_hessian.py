"""Hessian products: against dense float64 Hessians, over kinds of models, data and parameters; and what is refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    Dense,
    classes,
    cut,
    dense,
    linear_regression_hessian,
    normal,
    relative,
    seeded,
    softmax_regression_hessian,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from curvkit.errors import CurvkitError, InvalidArgument, UnknownObjective, UnsupportedModel
from curvkit.linalg import lanczos
from curvkit.losses import BatchLoss, token_cross_entropy
from curvkit.models import MLP, Decoder, ResNet
from curvkit.objectives import Objective
from curvkit.operators import Hessian, Plan
from curvkit.operators.plan import choose, free_memory, saved_bytes

# float64 rounding, 2.2e-16, grown by a few dozen layers and by sums of up to a thousand terms in another order: measured at most
# 2e-14 on the cases below. The requirement is 1e-8.
EXACT = 1e-12

X, Y = normal(9, 4, seed=1), classes(9, num=3, seed=2)
IMAGES, KINDS = normal(7, 2, 6, 6, seed=3), classes(7, num=3, seed=4)
TOKENS, NEXT = classes(5, 6, num=7, seed=5), classes(5, 6, num=7, seed=6)
NEXT[0, 1:], NEXT[1, 5:], NEXT[4] = -100, -100, -100
SERIES, LABELS = normal(6, 5, 3, seed=7), classes(6, num=2, seed=8)


@dataclass(frozen=True)
class Case:
    """A model in float64 with its data in batches, and the same loss of all the data at once."""

    model: nn.Module
    loss: Any
    data: list[Any]
    whole: Callable[[Callable[..., Any]], Tensor]
    patterns: Any = None
    unused: tuple[str, ...] = ()
    keep: Callable[[str], bool] = field(default=lambda name: True)

    def objective(self) -> Objective:
        return Objective(self.model, self.loss, self.data, self.patterns)

    def dense(self) -> Dense:
        return dense(self.model, self.whole, self.keep)


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        def made() -> Case:
            with seeded():
                return make()

        CASES[name] = made
        return make

    return register


def shake(model: nn.Module) -> nn.Module:
    """Away from the initial values: no zero biases, no norms of 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double()


# ---- feed-forward ---------------------------------------------------------------------------------------------------


@case("mlp")
def _() -> Case:
    return Case(
        shake(MLP([4, 6, 5, 3], "tanh")), F.cross_entropy, cut([4, 4, 1], X, Y), lambda call: F.cross_entropy(call(X), Y)
    )


@case("mlp, relu, mse")
def _() -> Case:
    y = normal(9, 3)
    return Case(shake(MLP([4, 6, 3])), F.mse_loss, cut([4, 4, 1], X, y), lambda call: F.mse_loss(call(X), y))


@case("mlp, layer norm, gelu")
def _() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    return Case(shake(model), nn.CrossEntropyLoss(), cut([5, 4], X, Y), lambda call: F.cross_entropy(call(X), Y))


class Statistics(nn.Module):
    """Convolutions with BatchNorm, some of it right behind them and some not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.grouped, self.plain = nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3, affine=False)
        self.early, self.head, self.last = nn.BatchNorm2d(3), nn.Linear(12, 4), nn.BatchNorm1d(4)
        for m in (self.norm, self.plain, self.early, self.last):
            m.running_mean.copy_(0.3 * torch.randn_like(m.running_mean))
            m.running_var.copy_(0.5 + torch.rand_like(m.running_var))

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x)
        x = F.relu(self.norm(c)) + c  # the convolution's output is used twice
        x = self.plain(self.grouped(x))
        x = self.early(torch.tanh(x))  # not behind a linear map
        return self.last(self.head(F.max_pool2d(x, 2).flatten(1)))


@case("cnn, batch norm")
def _() -> Case:
    model = shake(Statistics()).eval()
    return Case(
        model, F.cross_entropy, cut([3, 3, 1], IMAGES, KINDS), lambda call: F.cross_entropy(call(IMAGES), KINDS)
    )


@case("cnn, batch norm, weighted loss")
def _() -> Case:
    """torch's l1_loss forgets its weight where a function mode is active."""
    model, weight, y = shake(Statistics()).eval(), normal(7, 4).abs(), normal(7, 4)
    loss = functools.partial(F.l1_loss, weight=weight)
    return Case(model, loss, [(IMAGES, y)], lambda call: (weight * (call(IMAGES) - y).abs()).sum() / weight.sum())


@case("batch norm over a sequence")
def _() -> Case:
    """BatchNorm1d of [N, C, L] normalises dimension 1, whether a linear map or a convolution gave it; here C = L."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 2))
    for m in (model[1], model[3]):
        m.running_mean.copy_(torch.randn(4))
        m.running_var.copy_(0.5 + torch.rand(4))
    x, y = normal(6, 4, 6), classes(6, num=2)
    return Case(shake(model).eval(), F.cross_entropy, cut([4, 2], x, y), lambda call: F.cross_entropy(call(x), y))


@case("batch norm without batch dimension")
def _() -> Case:
    """conv1d of an unbatched [C, L] gives [C, L], which BatchNorm1d reads as [N, C]; here C = L."""

    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 5, 1), nn.BatchNorm1d(5)
            self.norm.running_mean.copy_(torch.randn(5))
            self.norm.running_var.copy_(0.5 + torch.rand(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).tanh().sum(0)

    x, y = normal(2, 5), torch.tensor(3)
    return Case(shake(Unbatched()).eval(), F.cross_entropy, [(x, y)], lambda call: F.cross_entropy(call(x), y))


@case("batch norm without statistics")
def _() -> Case:
    """The examples of the one batch are coupled, so that it must never be cut."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 3))
    return Case(shake(model).eval(), F.cross_entropy, [(X, Y)], lambda call: F.cross_entropy(call(X), Y))


@case("frozen batch norm in a model in training mode")
def _() -> Case:
    model = shake(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).train()
    model[1].eval()
    return Case(model, F.cross_entropy, cut([5, 4], X, Y), lambda call: F.cross_entropy(call(X), Y))


@case("group norm and instance norm")
def _() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(64, 3)
    )
    return Case(
        shake(model), F.cross_entropy, cut([4, 3], IMAGES, KINDS), lambda call: F.cross_entropy(call(IMAGES), KINDS)
    )


@case("convolutions under a checkpoint")
def _() -> Case:
    """Non-reentrant checkpointing runs the forward pass again while the gradient is computed."""

    class Checkpointed(Statistics):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = shake(Checkpointed()).eval()
    return Case(model, F.cross_entropy, cut([4, 3], IMAGES, KINDS), lambda call: F.cross_entropy(call(IMAGES), KINDS))


# ---- attention ------------------------------------------------------------------------------------------------------


@case("decoder, tied, padded tokens")
def _() -> Case:
    model = shake(Decoder(vocabulary=7, width=8, depth=1, heads=2, context=6, hidden=8))
    assert "head.weight" not in dict(model.named_parameters())
    return Case(
        model,
        token_cross_entropy,
        cut([2, 2, 1], TOKENS, NEXT),
        lambda call: F.cross_entropy(call(TOKENS).transpose(1, 2), NEXT),
    )


@case("decoder, untied, sum")
def _() -> Case:
    model = shake(Decoder(vocabulary=7, width=4, depth=1, heads=1, context=6, hidden=4, tied=False))
    return Case(
        model,
        functools.partial(token_cross_entropy, reduction="sum"),
        cut([4, 1], TOKENS, NEXT),
        lambda call: F.cross_entropy(call(TOKENS).transpose(1, 2), NEXT, reduction="sum"),
    )


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.layer(x, src_key_padding_mask=padding).mean(1))


SEQUENCES = normal(6, 5, 4, seed=9)


@case("encoder layer, eval")
def _() -> Case:
    """In eval mode torch takes a fused path that has no derivative at all."""
    model = shake(Encoder(dropout=0.3)).eval()
    return Case(
        model, F.cross_entropy, cut([4, 2], SEQUENCES, LABELS), lambda call: F.cross_entropy(call(SEQUENCES), LABELS)
    )


@case("encoder layer, train, pre-norm, gelu")
def _() -> Case:
    model = shake(Encoder(dropout=0.0, norm_first=True, activation="gelu")).train()
    return Case(
        model, F.cross_entropy, cut([4, 2], SEQUENCES, LABELS), lambda call: F.cross_entropy(call(SEQUENCES), LABELS)
    )


@case("encoder layer, padding as a second input")
def _() -> Case:
    model = shake(Encoder(dropout=0.0)).eval()
    padding = torch.arange(5) >= torch.tensor([5, 3, 4, 1, 2, 5])[:, None]
    return Case(
        model,
        F.cross_entropy,
        cut([4, 2], SEQUENCES, padding, LABELS),
        lambda call: F.cross_entropy(call(SEQUENCES, padding), LABELS),
    )


@case("attention module, sequence first")
def _() -> Case:
    """Dimension 0 is time here: a cut along it would be another function."""

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model, x, y = shake(SelfAttention()), normal(5, 3, 4), classes(5, 3, num=3)
    return Case(model, token_cross_entropy, [(x, y)], lambda call: F.cross_entropy(call(x).flatten(0, 1), y.flatten()))


@case("scaled_dot_product_attention, masks")
def _() -> Case:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(5, 5, dtype=torch.bool).tril()
            y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=mask)
            return F.scaled_dot_product_attention(y, y, y, is_causal=True).mean(1)

    y = normal(6, 4)
    model = shake(Masked())
    return Case(model, F.mse_loss, cut([5, 1], SEQUENCES, y), lambda call: F.mse_loss(call(SEQUENCES), y))


# ---- recurrence -----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Case:
    model = shake(Recurrent(kind, **options))
    return Case(model, F.cross_entropy, cut([4, 2], SERIES, LABELS), lambda call: F.cross_entropy(call(SERIES), LABELS))


case("lstm")(lambda: recurrent(nn.LSTM))
case("lstm, two layers, both directions")(lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True))
case("gru")(lambda: recurrent(nn.GRU))
case("rnn")(lambda: recurrent(nn.RNN, nonlinearity="relu"))


def time_first(scale: float) -> Case:
    """Batches are [T, N, ...]: the rows are times, and coupled, strongly or weakly."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    model, x, y = shake(TimeFirst()), normal(6, 2, 3), classes(6, 2, num=3)
    with torch.no_grad():
        model.rnn.weight_hh_l0.mul_(scale)
    return Case(model, token_cross_entropy, [(x, y)], lambda call: F.cross_entropy(call(x).flatten(0, 1), y.flatten()))


case("lstm, time first")(lambda: time_first(1.0))
case("lstm, time first, weakly coupled")(lambda: time_first(1e-6))


# ---- batches that must stay whole -----------------------------------------------------------------------------------


@case("graph network")
def _() -> Case:
    """Rows of features, of the adjacency matrix and of targets agree, but a part of them is no graph."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.last(torch.tanh(adjacency @ self.first(x)))

    adjacency = normal(9, 9, seed=4).softmax(1)
    return Case(
        shake(Graph()), F.cross_entropy, [(X, adjacency, Y)], lambda call: F.cross_entropy(call(X, adjacency), Y)
    )


@case("contrastive")
def _() -> Case:
    """Each example is compared with all others of the batch."""

    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = F.normalize(self.map(x), dim=1)
            return z @ z.T

    y = torch.arange(9).roll(1)
    return Case(shake(Similarity()), F.cross_entropy, [(X, y)], lambda call: F.cross_entropy(call(X), y))


# ---- parameters -----------------------------------------------------------------------------------------------------


@case("tied layers")
def _() -> Case:
    model = shake(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    model[2].weight = model[0].weight
    return Case(model, F.cross_entropy, cut([5, 4], X, Y), lambda call: F.cross_entropy(call(X), Y))


@case("frozen")
def _() -> Case:
    model = shake(MLP([4, 5, 3], "tanh"))
    model.linear0.weight.requires_grad_(False)
    return Case(model, F.cross_entropy, cut([5, 4], X, Y), lambda call: F.cross_entropy(call(X), Y))


class Odd(nn.Module):
    """Parameters of every degree: unused, constant, linear, and of odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.body = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.randn(()))
        self.turned = nn.Parameter(torch.randn(3, 2).T)
        self.none = nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) @ self.turned.T + self.none.sum()


@case("unused and linear parameters")
def _() -> Case:
    model = shake(Odd())

    def loss(call: Callable[..., Tensor], shift: Tensor) -> Tensor:
        return call(X).square().mean() + 3.0 * shift

    def fn(model: Odd, batch: Tensor) -> tuple[Tensor, int]:
        y = model(batch)
        return y.square().sum() + 3.0 * model.shift * y.numel(), y.numel()

    class Shifted(nn.Module):  # so that the dense loss reaches the parameter `shift`
        pass

    def whole(call: Callable[..., Any]) -> Tensor:
        return call(X, shifted=True)

    def forward(x: Tensor, shifted: bool = False) -> Tensor:
        y = Odd.forward(model, x)
        return y.square().mean() + 3.0 * model.shift if shifted else y

    model.forward = forward  # type: ignore[method-assign]
    return Case(model, BatchLoss(fn), list(X.split([5, 4])), whole, unused=("spare.weight", "spare.bias"))


@case("linear in every parameter")
def _() -> Case:
    return Case(
        shake(nn.Linear(4, 2)), BatchLoss(lambda m, x: (m(x).sum(), 2 * len(x))), list(X.split([5, 4])), lambda call: call(X).mean()
    )


@case("patterns")
def _() -> Case:
    return Case(
        shake(MLP([4, 5, 5, 3], "tanh")),
        F.cross_entropy,
        cut([5, 4], X, Y),
        lambda call: F.cross_entropy(call(X), Y),
        patterns=["*.weight", "linear2.*"],
        keep=lambda name: name.endswith("weight") or name.startswith("linear2."),
    )


@case("a used parameter in one batch only")
def _() -> Case:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x) if len(x) > 4 else self.experts[1](x).tanh()

    a, b = X[:5], X[5:]
    return Case(
        shake(Routed()),
        F.cross_entropy,
        cut([5, 4], X, Y),
        lambda call: (F.cross_entropy(call(a), Y[:5]) * 5 + F.cross_entropy(call(b), Y[5:]) * 4) / 9,
        unused=("experts.2.weight", "experts.2.bias"),
    )


@case("embedding, some rows never looked up")
def _() -> Case:
    model = shake(nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)))
    tokens = classes(6, 4, num=5)
    return Case(model, F.cross_entropy, cut([4, 2], tokens, LABELS), lambda call: F.cross_entropy(call(tokens), LABELS))


# ---- forms of batches and losses ------------------------------------------------------------------------------------


@case("dict batches")
def _() -> Case:
    data = [{"x": x, "y": y} for x, y in cut([5, 4], X, Y)]
    return Case(shake(MLP([4, 5, 3], "gelu")), F.cross_entropy, data, lambda call: F.cross_entropy(call(X), Y))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.tanh(self.left(first)) * self.right(second)


SECOND = normal(9, 4, seed=12)


@case("dict batches by keyword")
def _() -> Case:
    data = [{"second": s, "first": x, "labels": y} for x, s, y in cut([5, 4], X, SECOND, Y)]
    return Case(shake(Two()), nn.CrossEntropyLoss(), data, lambda call: F.cross_entropy(call(X, SECOND), Y))


@case("two inputs")
def _() -> Case:
    return Case(
        shake(Two()), nn.CrossEntropyLoss(), cut([5, 4], X, SECOND, Y), lambda call: F.cross_entropy(call(X, SECOND), Y)
    )


@case("batch loss with a count")
def _() -> Case:
    def fn(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["a"]), batch["b"][0], reduction="sum"), len(batch["a"])

    data = [{"a": x, "b": [y]} for x, y in cut([1, 5, 3], X, Y)]
    return Case(shake(MLP([4, 5, 3], "tanh")), BatchLoss(fn), data, lambda call: F.cross_entropy(call(X), Y))


@case("batch loss with a scalar, one batch")
def _() -> Case:
    loss = BatchLoss(lambda model, x: model(x).square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters()))
    model = shake(MLP([4, 5, 3], "tanh"))

    def forward(x: Tensor, penalty: bool = False) -> Tensor:
        y = MLP.forward(model, x)
        return y.square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters()) if penalty else y

    model.forward = forward  # type: ignore[method-assign]
    return Case(model, loss, [X], lambda call: call(X, penalty=True))


@case("a loss that returns its sum and count")
def _() -> Case:
    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return (outputs - targets).abs().pow(3).sum(), outputs.numel()

    y = normal(9, 3)
    return Case(
        shake(MLP([4, 5, 3], "tanh")), loss, cut([5, 4], X, y), lambda call: (call(X) - y).abs().pow(3).mean()
    )


# ---- the comparison -------------------------------------------------------------------------------------------------

ENGINES: dict[str, dict[str, Any]] = {
    "retained": {"residency": "retained"},
    "streamed": {"residency": "streamed"},
    "streamed in small parts": {"residency": "streamed", "budget_bytes": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_hessian(name: str):
    """Dense autograd, float64, the mean over all the data at once: loss, gradient, matvec and matmat, for every engine."""
    made = CASES[name]()
    truth = made.dense()
    n = len(truth.gradient)
    V = normal(n, 3, seed=20)
    V /= torch.linalg.vector_norm(V, dim=0)
    scale = max(torch.linalg.matrix_norm(truth.hessian).item(), 1e-300)
    for engine, options in ENGINES.items():
        H = Hessian(made.objective(), **options)
        assert (H.n, H.dtype, H.unused) == (n, torch.float64, made.unused), engine
        assert H.loss == pytest.approx(truth.loss, rel=EXACT), engine
        assert relative(H.gradient, truth.gradient) <= EXACT, engine
        errors = [torch.linalg.vector_norm(H.matvec(v) - truth.hessian @ v).item() for v in V.unbind(1)]
        errors.append(torch.linalg.vector_norm(H.matmat(V) - truth.hessian @ V).item())
        if name == "linear in every parameter":
            assert max(errors) == 0.0, engine
        else:
            assert max(errors) <= EXACT * scale, engine


@pytest.mark.parametrize("name", ["mlp", "cnn, batch norm", "decoder, tied, padded tokens", "encoder layer, eval", "lstm", "frozen"])
def test_eigenvalues_are_those_of_the_dense_hessian(name: str):
    """Dense `eigvalsh`: each interval holds an eigenvalue, and the largest three are the largest three."""
    made = CASES[name]()
    truth = torch.linalg.eigvalsh(made.dense().hessian).flip(0)
    H = Hessian(made.objective())
    pairs = lanczos.eigenpairs(H, 3, start=H.gradient, tolerance=1e-8, seed=0)
    assert pairs.all_converged
    for (low, high), value in zip(pairs.intervals.tolist(), truth[:3].tolist(), strict=True):
        assert low <= value <= high
    # A residual r bounds the error by r, here 1e-8 of the value.
    assert torch.allclose(pairs.values, truth[:3], rtol=1e-8, atol=0.0)


def test_linear_regression():
    """Closed form: 2 / (N C) I (x) X'X. Exact but for sums of nine float64 terms: 1e-14 = 45 eps."""
    model, y = shake(nn.Linear(4, 3)), normal(9, 3)
    H = Hessian(Objective(model, F.mse_loss, cut([5, 3, 1], X, y)))
    assert relative(H.matmat(torch.eye(15, dtype=torch.float64)), linear_regression_hessian(X, 3)) <= 1e-14


def test_softmax_regression():
    """Closed form: 1/N sum (diag p - pp') (x) xx', 1e-14 = 45 eps; the labels do not matter."""
    model = shake(nn.Linear(4, 3))
    truth = softmax_regression_hessian(X, model(X).detach())
    for y in (Y, Y.flip(0)):
        H = Hessian(Objective(model, F.cross_entropy, cut([5, 3, 1], X, y)))
        assert relative(H.matmat(torch.eye(15, dtype=torch.float64)), truth) <= 1e-14


def test_a_chain_of_scalars():
    """Closed form: L = (w1 w2 w3 - 1)^2 / 2 at w1 w2 w3 = 1 has the one eigenvalue sum 1 / w_i^2; here 5.25."""
    model = nn.Module()
    for index, value in enumerate((0.5, 1.0, 2.0)):
        model.register_parameter(f"w{index}", nn.Parameter(torch.tensor(value, dtype=torch.float64)))
    loss = BatchLoss(lambda m, x: (m.w0 * m.w1 * m.w2 * x - 1).square().sum() / 2)
    H = Hessian(Objective(model, loss, [torch.ones(1, dtype=torch.float64)]))
    values = torch.linalg.eigvalsh(H.matmat(torch.eye(3, dtype=torch.float64)))
    assert values.tolist() == pytest.approx([0.0, 0.0, 5.25], abs=1e-14)  # 45 eps of numbers of order 5


def test_uneven_batches_of_sixty_four_and_one():
    """Dense autograd. Known failure elsewhere: the mean of batch means is 3.9 times off here."""
    x, y = normal(65, 4), torch.cat([classes(64, num=3), torch.tensor([0])])
    x[64] *= 30.0
    model = shake(MLP([4, 5, 3], "tanh"))
    truth = dense(model, lambda call: F.cross_entropy(call(x), y))
    v = normal(len(truth.gradient))
    H = Hessian(Objective(model, F.cross_entropy, cut([64, 1], x, y)))
    assert relative(H.matvec(v), truth.hessian @ v) <= EXACT


def test_a_small_network_is_not_left_early():
    """Dense `eigvalsh`. Known failure elsewhere: two steps are taken for one eigenvalue of 103 parameters, 0.19 instead of 0.61."""
    model = shake(MLP([5, 8, 5, 2], "tanh"))  # 48 + 45 + 12 parameters
    x, y = normal(30, 5), classes(30, num=2)
    truth = torch.linalg.eigvalsh(dense(model, lambda call: F.cross_entropy(call(x), y)).hessian)[-1].item()
    for seed in range(5):
        pairs = lanczos.eigenpairs(Hessian(Objective(model, F.cross_entropy, [(x, y)])), seed=seed)
        assert pairs.all_converged
        assert pairs.intervals[0, 0] <= truth <= pairs.intervals[0, 1]


@pytest.mark.parametrize("name", ["mlp", "cnn, batch norm", "decoder, tied, padded tokens", "lstm"])
def test_law_of_scaling(name: str):
    """Law: a loss times c has c times the curvature; both in float64, 1e-13 = 450 eps."""
    made = CASES[name]()
    known = made.objective().loss

    def scaled(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        terms = known.terms(model, batch)
        return 3.0 * terms.total, terms.weight

    H, three = Hessian(made.objective()), Hessian(Objective(made.model, BatchLoss(scaled), made.data))
    v = normal(H.n)
    assert relative(three.matvec(v), 3.0 * H.matvec(v)) <= 1e-13


def test_float32_is_right_to_its_rounding():
    """Dense autograd in float64. Products in float32 are taken to err by at most 8 eps ||H||, which intervals rely on."""
    eps = torch.finfo(torch.float32).eps
    for name in ("mlp", "cnn, batch norm", "decoder, tied, padded tokens", "encoder layer, eval", "lstm"):
        made = CASES[name]()
        wide = Hessian(made.objective())
        narrow = Hessian(made.objective().converted(dtype=torch.float32))
        assert narrow.dtype is torch.float32
        norm = torch.linalg.matrix_norm(wide.matmat(torch.eye(wide.n, dtype=torch.float64)), 2).item()
        for seed in range(3):
            v = normal(wide.n, seed=seed)
            v /= torch.linalg.vector_norm(v)
            error = torch.linalg.vector_norm(narrow.matvec(v.float()).double() - wide.matvec(v)).item()
            assert error <= 8 * eps * norm, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_as_a_float32_copy(dtype: torch.dtype):
    """Law: the same bits as of the converted model; and the user's model stays what it is."""
    with seeded():
        model = MLP([4, 5, 3], "tanh").to(dtype)
    x = X.to(dtype)
    H = Hessian(Objective(model, F.cross_entropy, cut([5, 4], x, Y)))
    with seeded():
        copy = MLP([4, 5, 3], "tanh").to(dtype).float()
    direct = Hessian(Objective(copy, F.cross_entropy, cut([5, 4], x.float(), Y)))
    v = normal(H.n, dtype=torch.float32)
    assert (H.dtype, H.objective.dtype) == (torch.float32, torch.float32)
    assert torch.equal(H.matvec(v), direct.matvec(v))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_mixed_precision_is_measured_in_the_wider_type():
    model = MLP([4, 5, 3], "tanh")
    model.linear1.half()
    H = Hessian(Objective(model, F.cross_entropy, [(X.float(), Y)]))
    assert H.dtype is torch.float32
    assert model.linear1.weight.dtype is torch.float16


def test_more_than_a_thousand_batches():
    """Dense autograd: the same float32 sums, accumulated in float64."""
    x, y = normal(1003, 4, dtype=torch.float32), classes(1003, num=3)
    with seeded():
        model = nn.Linear(4, 3)
    one = Hessian(Objective(model, F.cross_entropy, [(x, y)]))
    many = Hessian(Objective(model, F.cross_entropy, cut([1] * 1003, x, y)), residency="streamed")
    truth = dense(nn.Linear(4, 3).double(), lambda call: F.cross_entropy(call(x.double()), y))
    assert truth.hessian.shape == (15, 15)
    v = normal(15, dtype=torch.float32)
    # 1003 products with 4 eps each, averaged; the single batch rounds its sums of 1003 terms: together below 1e-6 = 8 eps.
    assert relative(many.matvec(v), one.matvec(v)) <= 1e-6
    assert many.matvec(v).dtype is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules_run_eagerly(in_place: bool):
    """Dense autograd; a compiled forward pass has no second derivative."""
    model = shake(MLP([4, 5, 3], "tanh"))
    truth = dense(model, lambda call: F.cross_entropy(call(X), Y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: Any = model
        if in_place:
            model.compile()
        else:
            compiled = torch.compile(model)
        H = Hessian(Objective(compiled, F.cross_entropy, cut([5, 4], X, Y)))
        assert relative(H.matmat(torch.eye(H.n, dtype=torch.float64)), truth.hessian) <= EXACT


# ---- what the operator says of itself -------------------------------------------------------------------------------


def small(**options: Any) -> Hessian:
    return Hessian(CASES["mlp"]().objective(), **options)


def test_products_are_counted():
    H = small()
    H.matvec(normal(H.n))
    H.matmat(normal(H.n, 3))
    H.batch_quotients(normal(H.n))
    assert H.products == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_no_column_gives_no_column(engine: str):
    H = small(**ENGINES[engine])
    assert H.matmat(torch.zeros(H.n, 0, dtype=torch.float64)).shape == (H.n, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_quotients(engine: str):
    """Dense autograd of each batch alone; their weighted mean is v'Hv."""
    made = CASES["decoder, tied, padded tokens"]()
    H = Hessian(made.objective(), **ENGINES[engine])
    v = normal(H.n)
    v /= torch.linalg.vector_norm(v)
    quotients, weights = H.batch_quotients(v)
    kept = [(x, y) for x, y in made.data if (y != -100).any()]
    assert weights == [float((y != -100).sum()) for _, y in kept]  # the last batch has no term
    for quotient, (x, y) in zip(quotients, kept, strict=True):
        alone = dense(made.model, lambda call, x=x, y=y: F.cross_entropy(call(x).transpose(1, 2), y)).hessian
        assert quotient == pytest.approx((v @ alone @ v).item(), rel=1e-11, abs=EXACT * torch.linalg.matrix_norm(alone).item())
    mean = sum(q * w for q, w in zip(quotients, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx((v @ H.matvec(v)).item(), rel=1e-11)


def test_batch_quotients_of_a_sum_add_up():
    """Law."""
    H = Hessian(CASES["decoder, untied, sum"]().objective())
    v = normal(H.n)
    quotients, weights = H.batch_quotients(v)
    assert weights == [1.0, 1.0]
    assert sum(quotients) == pytest.approx((v @ H.matvec(v)).item(), rel=1e-11)


def test_the_plan_says_what_was_chosen():
    retained, streamed = small(), small(budget_bytes=1)
    assert (retained.plan.residency, streamed.plan.residency) == ("retained", "streamed")
    assert "fit the budget of" in retained.plan.reason
    assert "exceed the budget of 0.00 MiB" in streamed.plan.reason
    assert str(retained.plan).startswith("reverse over reverse, retained (")
    assert small(residency="streamed").plan.reason == "as asked"
    assert retained.plan.threads == torch.get_num_threads()
    assert (retained.plan.dtype, retained.plan.device, retained.plan.attention) == ("float64", "cpu", "math")
    assert isinstance(choose(CASES["mlp"]().objective()), Plan)


def test_a_bad_residency_is_refused():
    with pytest.raises(InvalidArgument, match="residency='keep' is not one of retained, streamed, auto. Use 'auto' if in doubt"):
        small(residency="keep")


@pytest.mark.parametrize("budget", [0, -5])
def test_a_bad_budget_is_refused(budget: int):
    with pytest.raises(InvalidArgument, match=f"budget_bytes={budget} must be positive"):
        small(budget_bytes=budget)


def test_saved_bytes_of_a_layer():
    """Closed form for exp(x w): the forward pass saves its 4000-byte output once; parameters and data are not counted."""
    model = nn.Linear(1, 1, bias=False)
    it = Objective(model, BatchLoss(lambda m, x: m(x).exp().sum()), [torch.ones(1000, 1)])
    assert 4000 <= saved_bytes(it, gradient=False) <= 4100  # and a few scalars
    assert saved_bytes(it, gradient=True) >= 4000


def test_free_memory_is_of_this_machine():
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_wrong_vector_is_refused():
    H = small()
    for wrong in (torch.zeros(H.n + 1).double(), torch.zeros(H.n), torch.zeros(H.n, 1).double(), torch.zeros(()).double()):
        with pytest.raises(InvalidArgument, match=rf"this operator takes \[{H.n}\], or \[{H.n}, k\] in matmat, torch.float64 on cpu"):
            H.matvec(wrong)
    with pytest.raises(InvalidArgument, match=r"a vector of shape \(3, 2\), torch.float64 on meta was given"):
        H.matmat(torch.zeros(3, 2, dtype=torch.float64, device="meta"))
    with pytest.raises(InvalidArgument, match="was given; this operator takes"):
        H.batch_quotients(torch.zeros(H.n + 1).double())


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def through_data(model: nn.Module) -> None:
    model.linear1.weight.data.add_(1e-3)


def signs(model: nn.Module) -> None:
    model.linear1.weight.data.neg_()


def permuted(model: nn.Module) -> None:
    w = model.linear1.weight
    w.data = w.data[[1, 0, 2, 3, 4]]


def permuted_in_place(model: nn.Module) -> None:
    model.linear1.weight.data[[0, 1]] = model.linear1.weight.data[[1, 0]]


def storage(model: nn.Module) -> None:
    model.linear1.weight.data = torch.zeros_like(model.linear1.weight)


def replaced(model: nn.Module) -> None:
    model.linear1.weight = nn.Parameter(model.linear1.weight.detach() + 1)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("change", [step, through_data, signs, permuted, permuted_in_place, storage, replaced, loaded])
def test_changed_parameters_are_noticed(change: Callable[[nn.Module], None], residency: str):
    """Products of two points must not be mixed; a retained graph belongs to the point where it was built."""
    H = small(residency=residency)
    v = normal(H.n)
    H.matvec(v)
    change(H.objective.model)
    for use in (lambda: H.matvec(v), lambda: H.matmat(v[:, None]), lambda: H.batch_quotients(v)):
        with pytest.raises(InvalidArgument, match=r"the parameter 'linear\d.\w+' has changed since this operator was made.*Make a new Hessian"):
            use()


@pytest.mark.parametrize("residency", ["retained", "streamed"])
def test_changed_parameters_outside_the_space_are_noticed(residency: str):
    """Frozen parameters and those that the patterns leave out belong to the point, too; so do buffers."""
    for change in ("excluded", "frozen", "buffer"):
        made = CASES["cnn, batch norm"]()
        made.model.head.bias.requires_grad_(False)
        H = Hessian(Objective(made.model, made.loss, made.data, "*.weight"), residency=residency)
        with torch.no_grad():
            {"excluded": made.model.last.bias, "frozen": made.model.head.bias, "buffer": made.model.norm.running_mean}[change].add_(1.0)
        with pytest.raises(InvalidArgument, match="has changed since this operator was made"):
            H.matvec(normal(H.n))


def test_the_number_of_threads_is_no_change():
    """Sums over parameters round differently with another number of threads."""
    with seeded():
        model = nn.Linear(1000, 200)
    H = Hessian(Objective(model, F.mse_loss, [(normal(2, 1000, dtype=torch.float32), normal(2, 200, dtype=torch.float32))]))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert H.matvec(torch.ones(H.n)).isfinite().all()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("residency", ["retained", "streamed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, residency: str):
    made = CASES["mlp"]()
    with torch.no_grad():
        made.model.linear1.weight[2, 1] = value
    with pytest.raises(CurvkitError, match="the parameter 'linear1.weight' has NaN or infinite entries.*Take an earlier one"):
        Hessian(made.objective(), residency=residency)


def test_unused_weights_that_are_not_finite_are_named():
    made = CASES["a used parameter in one batch only"]()
    with torch.no_grad():
        made.model.experts[2].bias[0] = float("nan")
    with pytest.raises(CurvkitError, match="the parameter 'experts.2.bias' has NaN or infinite entries"):
        Hessian(made.objective())


def test_a_buffer_that_is_not_finite_is_named():
    made = CASES["cnn, batch norm"]()
    made.model.plain.running_var[1] = float("nan")
    with pytest.raises(CurvkitError, match="the buffer 'plain.running_var' has NaN or infinite entries"):
        Hessian(made.objective())


@pytest.mark.parametrize("residency", ["retained", "streamed"])
def test_a_batch_that_is_not_finite_is_named(residency: str):
    made = CASES["mlp"]()
    x = X.clone()
    x[5, 0] = float("nan")
    with pytest.raises(CurvkitError, match="the loss of batch 1 is nan though all parameters are finite. Check this batch"):
        Hessian(Objective(made.model, made.loss, cut([4, 4, 1], x, Y)), residency=residency)


@pytest.mark.parametrize("loss", [lambda o, t: F.cross_entropy(o, t, reduction="none"), lambda o, t: o])
def test_a_loss_that_is_not_a_scalar_is_refused(loss: Any):
    made = CASES["mlp"]()
    with pytest.raises(UnknownObjective, match=r"it must return a scalar, or a pair \(sum, count\)"):
        Hessian(Objective(made.model, loss, [(X, Y)]))


def test_a_loss_of_another_model_is_refused():
    other = CASES["mlp"]().model
    loss = BatchLoss(lambda model, batch: F.cross_entropy(other(batch[0]), batch[1]))
    with pytest.raises(UnknownObjective, match="the loss does not depend on any of the parameters.*not one from an outer scope"):
        Hessian(Objective(CASES["mlp"]().model, loss, [(X, Y)]))


def test_a_detached_loss_is_refused():
    loss = BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]).detach(), batch[1]))
    with pytest.raises(UnknownObjective, match="nothing in it detaches or disables gradients"):
        Hessian(Objective(CASES["mlp"]().model, loss, [(X, Y)]))


@pytest.mark.parametrize(
    ("layer", "loss", "operation"),
    [
        (nn.EmbeddingBag(9, 3), F.cross_entropy, "embedding_bag"),
        (nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 3)), nn.MultiMarginLoss(), "multi_margin_loss"),
    ],
)
def test_an_operation_without_second_derivative_is_named(layer: nn.Module, loss: Any, operation: str):
    with pytest.raises(UnsupportedModel, match=f"has no second derivative of {operation}, which the model or the loss uses. Replace"):
        H = Hessian(Objective(layer, loss, [(classes(6, 4, num=9), classes(6, num=3))]))
        H.matvec(torch.ones(H.n))


def test_functional_dropout_is_found_by_its_effect():
    """There is no module to name; the same batch gives two losses."""

    class Careless(MLP):
        def forward(self, input: Tensor) -> Tensor:
            return F.dropout(super().forward(input), 0.5, training=True)

    for loss in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t)):
        objective = Objective(Careless([4, 5, 3]).double().eval(), loss, [(X, Y)])
        with pytest.raises(UnsupportedModel, match=r"the loss of batch 0 differs from one evaluation to the next.*model.eval\(\)"):
            Hessian(objective)


def test_little_noise_is_found_too():
    """On the CPU the same function gives the same bits, so that any difference is noise."""

    class Hazy(MLP):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y + 1e-4 * torch.randn_like(y)

    with seeded():
        model = Hazy([4, 5, 3])
    with pytest.raises(UnsupportedModel, match="differs from one evaluation to the next"):
        Hessian(Objective(model, F.cross_entropy, cut([5, 4], X.float(), Y)))


def test_noise_in_a_later_batch_is_found_by_streaming():
    class Late(MLP):
        def forward(self, input: Tensor) -> Tensor:
            y = super().forward(input)
            return y + torch.randn_like(y) if len(input) == 4 else y

    with seeded():
        model = Late([4, 5, 3]).double()
    H = Hessian(Objective(model, F.cross_entropy, cut([5, 4], X, Y)), residency="streamed")
    with seeded(1), pytest.raises(UnsupportedModel, match="the loss of batch 1 differs from one evaluation to the next"):
        H.matvec(normal(H.n))


def test_a_model_that_keeps_state_is_found():
    class Counter(MLP):
        calls = 0.0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 0.1
            return super().forward(input) * (1 + self.calls)

    with pytest.raises(UnsupportedModel, match="the model or the loss is random, or keeps state"):
        Hessian(Objective(Counter([4, 5, 3]).double(), F.cross_entropy, [(X, Y)]))


@pytest.mark.parametrize("make", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_caller_s_modes_do_not_matter(make: Callable[[], Any], engine: str):
    """Law: the same bits under no_grad, inference mode and autocast as without."""
    objective = CASES["mlp"]().objective()
    outside = Hessian(objective, **ENGINES[engine])
    v = normal(outside.n)
    expected = outside.matvec(v)
    with make():
        inside = Hessian(objective, **ENGINES[engine])
        got, mixed = inside.matvec(v), outside.matvec(v)
    assert torch.equal(got, expected)
    assert torch.equal(mixed, expected)
    assert torch.equal(inside.gradient, outside.gradient)
