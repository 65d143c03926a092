"""Models with their data and losses, all in float64 and small enough for a dense Hessian; one line of a table each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from oracles import Dense, classes, cut, dense, normal, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvkit.losses import BatchLoss, token_cross_entropy
from curvkit.models import MLP, Decoder
from curvkit.objectives import Objective

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
        shake(MLP([4, 6, 5, 3], "tanh")),
        F.cross_entropy,
        cut([4, 4, 1], X, Y),
        lambda call: F.cross_entropy(call(X), Y),
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
    model = nn.Sequential(
        nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 2)
    )
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
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.Linear(64, 3),
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

    def fn(model: Odd, batch: Tensor) -> tuple[Tensor, int]:
        y = model(batch)
        return y.square().sum() + 3.0 * model.shift * y.numel(), y.numel()

    def whole(call: Callable[..., Any]) -> Tensor:
        return call(X, shifted=True)

    def forward(x: Tensor, shifted: bool = False) -> Tensor:  # so that the dense loss reaches the parameter `shift`
        y = Odd.forward(model, x)
        return y.square().mean() + 3.0 * model.shift if shifted else y

    model.forward = forward  # type: ignore[method-assign]
    return Case(model, BatchLoss(fn), list(X.split([5, 4])), whole, unused=("spare.weight", "spare.bias"))


@case("linear in every parameter")
def _() -> Case:
    return Case(
        shake(nn.Linear(4, 2)),
        BatchLoss(lambda m, x: (m(x).sum(), 2 * len(x))),
        list(X.split([5, 4])),
        lambda call: call(X).mean(),
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
    loss = BatchLoss(
        lambda model, x: model(x).square().mean() + 0.1 * sum(p.square().sum() for p in model.parameters())
    )
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
    return Case(shake(MLP([4, 5, 3], "tanh")), loss, cut([5, 4], X, y), lambda call: (call(X) - y).abs().pow(3).mean())


ENGINES: dict[str, dict[str, Any]] = {
    "retained": {"residency": "retained"},
    "streamed": {"residency": "streamed"},
    "streamed in small parts": {"residency": "streamed", "budget_bytes": 1},
}
