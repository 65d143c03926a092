"""Layer rules: the gradient of each example against torch.autograd on that example alone, and signs per example against dense Hessians."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import bits, classes, dense, normal, seeded
from test_estimators import Case, check_unbiased
from torch import Tensor, nn

from curvkit.estimators import EmpiricalFisher, ExampleHutchinson
from curvkit.estimators.recordings.coverage import coverage
from curvkit.estimators.recordings.recording import Recording
from curvkit.estimators.recordings.uses import grouped, summed_squares
from curvkit.estimators.rules.forms import CACHE_BYTES, Signs, summed_in_chunks
from curvkit.operators import Residual

N, T = 4, 5
Y = classes(N, num=3, seed=2)


class Attending(nn.Module):
    """nn.MultiheadAttention in all its ways: whose key and value are the query or not, with masks, of other sizes."""

    def __init__(self, kind: str, *, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.kind, self.batch_first = kind, batch_first
        self.a = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.memory, self.head = nn.Linear(4, options.get("kdim") or 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = x if self.batch_first else x.transpose(0, 1)
        memory = torch.tanh(self.memory(q))[1:] if not self.batch_first else torch.tanh(self.memory(q))[:, 1:]
        k, v = {
            "self": (q, q),
            "cross": (memory, memory),
            "apart": (memory, memory * 2.0),
            "other sizes": (memory, torch.cat([memory, memory], -1)),
        }[self.kind.partition(",")[0]]
        options: dict[str, Any] = {"need_weights": "weights" in self.kind}
        if "causal" in self.kind:
            options |= {
                "attn_mask": nn.Transformer.generate_square_subsequent_mask(T, dtype=x.dtype),
                "is_causal": True,
            }
        if "padding" in self.kind:
            padding = torch.zeros(len(x), k.shape[1 if self.batch_first else 0], dtype=x.dtype)
            padding[:, -1] = torch.where(x[:, 0, 0] > 0, -torch.inf, 0.0)
            options |= {"key_padding_mask": padding}
        out = q + self.a(q, k, v, **options)[0]
        return self.head(out).mean(1 if self.batch_first else 0)


class Positions(nn.Module):
    """Looked up once for all examples, and added; with or without a dimension of size 1 in front."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 6), nn.Linear(6, 3)
        self.places, self.query = nn.Embedding(T, 6), nn.Linear(2, 6)
        self.register_buffer("fixed", normal(2, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        h, p = self.a(x), self.places(torch.arange(T))
        if self.kind == "unsqueezed":
            p = p.unsqueeze(0)
        elif self.kind == "indexed":
            p = p[None]
        elif self.kind == "twice":
            h = torch.tanh(h + p)
        elif self.kind == "left":
            return self.b(torch.tanh(p + h)).mean(1)
        elif self.kind == "linear":
            return self.b(torch.tanh(h.mean(1) + self.query(self.fixed)))
        return self.b(torch.tanh(h + p)).mean(1)


class Split(nn.Module):
    """One matrix, cut into the weights of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.randn(7)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.w.split([4, 3])
        first, second = torch.split(self.v, [4, 3])
        return self.b(torch.tanh(F.linear(x, up, first)) * F.linear(x, gate, second).sum(-1, keepdim=True))


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * T, 3))


SEQUENCE, VECTOR = normal(N, T, 4), normal(N, 4)
ATTENTION = {
    name: Case(make, F.cross_entropy, SEQUENCE, Y)
    for name, make in {
        "self": lambda: Attending("self"),
        "self, time first": lambda: Attending("self", batch_first=False),
        "self, weights": lambda: Attending("self, weights"),
        "self, causal": lambda: Attending("self, causal"),
        "self, causal, padding": lambda: Attending("self, causal, padding"),
        "cross": lambda: Attending("cross"),
        "cross, time first, padding": lambda: Attending("cross, padding", batch_first=False),
        "apart": lambda: Attending("apart, weights"),
        "apart, without offsets": lambda: Attending("apart", bias=False),
        "other sizes": lambda: Attending("other sizes", kdim=3, vdim=6),
        "with a zero": lambda: Attending("self", add_zero_attn=True),
        "encoder": encoder,
        "encoder, norm first": lambda: encoder(norm_first=True),
    }.items()
}
OTHERS = {
    "positions": Case(lambda: Positions("plain"), F.cross_entropy, SEQUENCE, Y),
    "positions, unsqueezed": Case(lambda: Positions("unsqueezed"), F.cross_entropy, SEQUENCE, Y),
    "positions, indexed": Case(lambda: Positions("indexed"), F.cross_entropy, SEQUENCE, Y),
    "positions, added twice": Case(lambda: Positions("twice"), F.cross_entropy, SEQUENCE, Y),
    "positions, first": Case(lambda: Positions("left"), F.cross_entropy, SEQUENCE, Y),
    "a layer of no example": Case(lambda: Positions("linear"), F.cross_entropy, SEQUENCE, Y),
    "a matrix that is cut": Case(Split, F.cross_entropy, VECTOR, Y),
}
CASES = ATTENTION | OTHERS


def recorded(case: Case) -> tuple[Recording, dict[str, list[Any]], Any]:
    """A forward pass with gradients of the total at all calls."""
    objective = case.objective((N,))
    own: Any = dict(zip(objective.parameters.names, objective.tensors, strict=True))
    with objective.measuring():
        with Recording(own, N) as recording:
            outputs, targets = objective.outputs(0)
        total = objective.terms_of(outputs, targets).total
        pulled: Any = torch.autograd.grad(total, [use.output for use in recording.uses], allow_unused=True)
    return recording, grouped(recording.uses, pulled), objective


def diagonal(case: Case) -> Tensor:
    return dense(case.objective((N,)).model, lambda call: case.loss(call(case.x), case.y)).hessian.diagonal()


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_examples(name: str):
    """Rung 2: every example run alone; sums of squares likewise."""
    recording, uses, objective = recorded(CASES[name])
    assert recording.refused == {}
    for row in range(N):
        one = objective.with_batches([tuple(tensor[row : row + 1] for tensor in objective.batches[0])])
        with one.measuring():
            alone = torch.autograd.grad(one.terms(0).total, one.tensors, materialize_grads=True)
        for parameter, truth in zip(one.parameters.names, alone, strict=True):
            found = sum(form.gradients(g, slice(row, row + 1))[0] for form, g in uses.get(parameter, []))
            assert (found - truth).abs().max() < 1e-12
    for forms in uses.values():
        written = sum(form.gradients(g, slice(None)) for form, g in forms)
        assert isinstance(written, Tensor)
        assert (summed_squares(forms) - written.square().sum(0)).abs().max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_coverage_has_all(name: str):
    assert coverage(CASES[name].objective((N,))).refused == {}


@pytest.mark.parametrize("name", ["self", "apart", "positions, added twice", "a matrix that is cut"])
def test_signs_are_unbiased(name: str):
    """Rung 5."""
    found = ExampleHutchinson(num_probes=100).estimate(CASES[name].objective((2, 2)), seed=3)
    check_unbiased(found, diagonal(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_signs_are_unbiased_everywhere(name: str):
    """Rung 5."""
    found = ExampleHutchinson(num_probes=120).estimate(CASES[name].objective((N,)), seed=4)
    check_unbiased(found, diagonal(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_pass_is_the_pass(name: str):
    """Bit for bit, also with dropout in training mode, whose draws are the same; and so are the gradients of parameters."""
    model = CASES[name].objective((N,)).model.train()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.4
    made: list[list[bytes]] = []
    for inside in (False, True):
        with seeded(5):
            if inside:
                with Recording.of(model):
                    z = model(CASES[name].x)
            else:
                z = model(CASES[name].x)
        found = torch.autograd.grad(z.square().sum(), list(model.parameters()), materialize_grads=True)
        made.append([bits(z), *(bits(g) for g in found)])
    assert made[0] == made[1]


CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "strides": (lambda: nn.Conv2d(4, 6, 3, 2, 1), (4, 9, 8)),
    "dilation, uneven kernel": (lambda: nn.Conv2d(4, 6, (3, 2), 1, (0, 1), (2, 1)), (4, 9, 8)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, 1, 1, groups=2), (4, 7, 6)),
    "channel by channel": (lambda: nn.Conv2d(6, 6, 3, 2, groups=6), (6, 8, 8)),
    "one pixel": (lambda: nn.Conv2d(4, 4, 1), (4, 3, 3)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (4, 6, 6)),
    "a row": (lambda: nn.Conv1d(4, 6, 3, 2, 1), (4, 11)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, dtype: torch.dtype):
    """Rung 2: gradients, squares, and what signs give, against convolutions with the weights of each example alone."""
    make, shape = CONVOLUTIONS[name]
    with seeded(1):
        layer = make().to(dtype)
    x = torch.tanh(normal(N, *shape, dtype=dtype).requires_grad_())
    with Recording({"w": layer.weight}, N) as recording:
        z = layer(x)
    (form,) = recording.uses[0].forms
    g, g_dot, x_dot = (normal(*it.shape, seed=seed, dtype=dtype) for seed, it in ((1, z), (2, z), (3, x)))
    a, b = normal(N, len(layer.weight), seed=4, dtype=dtype), normal(N, layer.weight[0].numel(), seed=5, dtype=dtype)
    V, signs = (a[:, :, None] * b[:, None]).view(N, *layer.weight.shape), Signs(a, b)

    def alone(g: Tensor, x: Tensor) -> Tensor:
        w = layer.weight.detach().requires_grad_()
        z = [layer._conv_forward(x[n : n + 1], w, None) for n in range(N)]
        return torch.stack([torch.autograd.grad(z[n], w, g[n : n + 1])[0] for n in range(N)])

    truth, tolerance = alone(g, x.detach()), 200 * torch.finfo(dtype).eps  # sums of up to 100 products
    moved = torch.cat([layer._conv_forward(x[n : n + 1], V[n], None) for n in range(N)])
    for found, wanted in (
        (form.gradients(g, slice(1, 3)), truth[1:3]),
        (form.squares(g), truth.square().sum(0)),
        (form.probe(signs), moved),
        (form.pulled(signs, g), torch.autograd.grad(moved, x, g, retain_graph=True)[0]),
        (form.collected(signs, g, g_dot, x_dot), (V * (alone(g_dot, x.detach()) + alone(g, x_dot))).sum(0)),
    ):
        assert found is not None
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.slow
def test_less_at_a_time_when_memory_runs_out():
    x, sizes = torch.arange(20.0), list[int]()

    def part(piece: slice) -> Tensor:
        sizes.append(len(x[piece]))
        if sizes[-1] > 3:
            raise MemoryError
        return x[piece].sum()

    assert summed_in_chunks(20, CACHE_BYTES // 12, x.device, part) == x.sum()
    assert sizes[:3] == [12, 6, 3]
    assert set(sizes[2:]) == {3, 2}

    def never(piece: slice) -> Tensor:
        raise MemoryError("no memory at all")

    with pytest.raises(MemoryError, match="no memory at all"):
        summed_in_chunks(20, 1, x.device, never)
    with pytest.raises(RuntimeError, match="another matter"):
        summed_in_chunks(20, 1, x.device, lambda piece: (_ for _ in ()).throw(RuntimeError("another matter")))


class Odd(nn.Module):
    """Parameters in calls that have no rule."""

    def __init__(self, make: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.make = nn.Linear(4, 6), nn.Linear(6, 3), make
        self.places, self.attention = (
            nn.Embedding(T, 6),
            nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.make(self, x))).mean(1)


@pytest.mark.parametrize(
    ("make", "refused", "reason"),
    [
        (lambda m, x: m.a(x) * m.places(torch.arange(T)), "places.weight", "none of the dimensions of a tensor"),
        (
            lambda m, x: torch.add(m.a(x), m.places(torch.arange(T)), alpha=2.0),
            "places.weight",
            "none of the dimensions of a tensor",
        ),
        (lambda m, x: m.a(x) + m.places(torch.tensor([0])), "places.weight", "none of the dimensions of a tensor"),
        (lambda m, x: F.linear(x, m.a.weight[:3]).repeat(1, 1, 2), "a.weight", "it is used in __getitem__"),
        (lambda m, x: m.attention(*[m.a(x)] * 3)[0], "attention.bias_k", "it is used in repeat"),
        (
            lambda m, x: torch.cat([part @ x.mT for part in m.a.weight.chunk(2)], 1).mT,
            "a.weight",
            "none of the dim|no rule",
        ),
    ],
)
def test_what_has_no_rule_is_named(make: Callable[..., Tensor], refused: str, reason: str):
    case = Case(lambda: Odd(make), F.cross_entropy, SEQUENCE, Y)
    found = coverage(case.objective((N,)))
    assert refused in found.refused
    assert re.search(reason, found.refused[refused])


class Products(nn.Module):
    """Parameters that are multiplied with parameters: what is linear in each is not linear in both."""

    def __init__(self, make: Callable[[Products, Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.l = make, nn.Linear(4, 6)
        self.w, self.v, self.row = (nn.Parameter(torch.rand(*shape) + 0.5) for shape in ((6,), (6,), (1, 6)))
        self.square, self.pair = nn.Parameter(torch.randn(6, 6) / 2), nn.Parameter(torch.rand(12) + 0.5)
        self.register_buffer("fixed", normal(6, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self, x)


PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[str, ...]]] = {
    "squared": (lambda m, x: m.l(x) + m.w * m.w, ("w",)),
    "squared, of one example's shape": (lambda m, x: m.l(x) + m.row * m.row, ("row",)),
    "two parameters": (lambda m, x: m.l(x) + m.w * m.v, ("w", "v")),
    "two of other shapes": (lambda m, x: torch.tanh(m.l(x) + m.row * m.v), ("row", "v")),
    "halves": (lambda m, x: m.l(x) + torch.mul(*m.pair.chunk(2)), ("pair",)),
    "a half, squared": (lambda m, x: m.l(x) + m.pair.chunk(2)[0] * m.pair.chunk(2)[0], ("pair",)),
    "twice itself": (lambda m, x: m.l(x) + (2.0 * m.w) * m.w, ("w",)),
    "itself, scaled": (lambda m, x: m.l(x) + (m.fixed * m.w) * m.w, ("w",)),
    "a view": (lambda m, x: m.l(x) + m.w * m.w.view(6), ("w",)),
    "expanded": (lambda m, x: m.l(x) + m.w * m.w.expand(len(x), 6), ("w",)),
    "times its exponential": (lambda m, x: m.l(x) + torch.exp(m.w) * m.w, ("w",)),
    "times another's exponential": (lambda m, x: m.l(x) + torch.exp(m.v) * m.w, ("v",)),
    "scaled by another's exponential": (lambda m, x: torch.tanh(m.l(x)) * torch.exp(m.v) * m.w, ("v",)),
    "times its transpose": (lambda m, x: m.l(x) @ (m.square @ m.square.T), ("square",)),
    "a product as the weight": (lambda m, x: F.linear(m.l(x), m.square * m.square), ("square",)),
    "a layer of a parameter": (lambda m, x: m.l(x) + F.linear(m.row, m.square), ("row", "square")),
    "a norm of a parameter": (lambda m, x: m.l(x) + F.layer_norm(m.w, (6,), m.v, m.v), ("w", "v")),
    "in a row": (lambda m, x: torch.tanh(m.l(x) * m.w) * m.w, ()),
    "added to itself": (lambda m, x: torch.tanh(m.l(x) + (m.w + m.w)), ()),
}


def products(name: str) -> Case:
    make = PRODUCTS[name][0]
    return Case(lambda: Products(make), F.mse_loss, VECTOR, normal(N, 6, seed=8))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_parameters(name: str):
    """Rung 5: what has no rule shares its signs, and H and H - G are right either way."""
    objective = products(name).objective((N,))
    found = coverage(objective).refused
    assert set(PRODUCTS[name][1]) == set(found)
    check_products(ExampleHutchinson(num_probes=60).estimate(objective, seed=3), diagonal(products(name)))
    R = Residual(objective)
    truth = R.matmat(torch.eye(R.n, dtype=R.dtype)).diagonal()
    check_products(ExampleHutchinson(num_probes=60).estimate_residual(objective, seed=3), truth)


def check_products(found: Any, truth: Tensor) -> None:
    """As elsewhere; where signs leave no noise at all, equal."""
    errors = torch.cat([error.reshape(-1) for error in found.stderr.values()])
    if errors.max() > 1e-12:
        check_unbiased(found, truth)
        return
    values = torch.cat([value.reshape(-1) for value in found.values.values()])
    assert (values - truth).abs().max() < 1e-12 * (1 + truth.abs().max())


def test_a_square_of_a_parameter_in_closed_form():
    """Rung 1: L = mean (l(x) + w^2 - y)^2, so that d^2 L / dw_k^2 = 2 / 6 mean (4 w_k^2 + 2 (z_k - y_k))."""
    case = products("squared")
    objective = case.objective((N,))
    found = ExampleHutchinson(num_probes=2).estimate(objective, seed=0)
    assert any("w has no rule (it is multiplied with a parameter)" in note for note in found.notes)
    model: Any = objective.model
    z, w = model(case.x).detach(), model.w.detach()
    truth = 2 / 6 * (4 * w.square() + 2 * (z - case.y).mean(0))
    many = ExampleHutchinson(num_probes=200).estimate(objective, seed=0)
    assert many.stderr is not None
    assert (many.values["w"] - truth).abs().max() <= 5 * many.stderr["w"].max() + 1e-12


class Named(nn.Module):
    """Calls of torch's functions by keyword."""

    def __init__(self, make: Callable[[Named, Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.b = make, nn.Linear(6, 3)
        self.w, self.m, self.v, self.u = (nn.Parameter(torch.randn(*s)) for s in ((6, 4), (4, 6), (6,), (6,)))
        self.k, self.table = nn.Parameter(torch.randn(6, 5, 3)), nn.Parameter(torch.randn(7, 6))
        self.register_buffer("mean", normal(6, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.make(self, x)))


NAMED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(input=x, weight=m.w, bias=m.v),
    "linear, bias": lambda m, x: F.linear(x, bias=m.v, weight=m.w),
    "addmm": lambda m, x: torch.addmm(input=m.v, mat1=x, mat2=m.m),
    "matmul": lambda m, x: torch.matmul(input=x, other=m.m),
    "mm": lambda m, x: torch.mm(x, mat2=m.m),
    "method": lambda m, x: x.matmul(other=m.m),
    "mul": lambda m, x: torch.mul(input=x @ m.m, other=m.v),
    "add": lambda m, x: torch.add(other=m.v, input=x @ m.m),
    "conv": lambda m, x: torch.conv1d(input=x[:, None].expand(-1, 5, -1), weight=m.k, bias=m.v).mean(2),
    "embedding": lambda m, x: F.embedding(weight=m.table, input=(x[:, 0] > 0).long(), padding_idx=1),
    "layer_norm": lambda m, x: F.layer_norm(input=x @ m.m, normalized_shape=(6,), weight=m.v, bias=m.u),
    "torch.layer_norm": lambda m, x: torch.layer_norm(input=x @ m.m, normalized_shape=(6,), weight=m.v, bias=m.u),
    "rms_norm": lambda m, x: F.rms_norm(input=x @ m.m, normalized_shape=(6,), weight=m.v),
    "group_norm": lambda m, x: F.group_norm(input=x @ m.m, num_groups=2, weight=m.v, bias=m.u),
    "group_norm, one for both": lambda m, x: F.group_norm(input=x @ m.m, num_groups=2, weight=m.v, bias=m.v),
    "batch_norm": lambda m, x: F.batch_norm(
        input=x @ m.m, running_mean=m.mean, running_var=m.mean.square() + 1, weight=m.v, bias=m.u, training=False
    ),
    "chunk": lambda m, x: torch.cat([F.linear(x, part) for part in torch.chunk(input=m.w, chunks=2)], 1),
}


@pytest.mark.parametrize("name", NAMED)
def test_calls_by_keyword(name: str):
    """Rung 2: every example run alone."""
    with seeded(1):
        model = Named(NAMED[name]).double()
    estimator = EmpiricalFisher()
    with estimator.recording(model) as recording:
        outputs = model(VECTOR)
    assert recording.refused == {}
    found = estimator.from_recording(recording, outputs, Y)
    own = list(model.parameters())
    rows = [
        torch.autograd.grad(F.cross_entropy(model(VECTOR[n : n + 1]), Y[n : n + 1]), own, materialize_grads=True)
        for n in range(N)
    ]
    for (parameter, value), *truth in zip(found.values.items(), *rows, strict=True):
        total = torch.stack(truth).square().mean(0)
        assert (value - total).abs().max() <= 1e-12 * (1 + total.abs().max()), parameter
    assert sum(float(value.sum()) for name, value in found.values.items() if not name.startswith("b.")) > 0


def test_training_mode_is_seen_by_keyword():
    model = Named(lambda m, x: F.batch_norm(input=x @ m.m, running_mean=None, running_var=None, training=True)).double()
    with Recording.of(model) as recording:
        model(VECTOR)
    assert recording.coupled == "batch_norm in training mode"


def test_a_rule_that_fails_refuses_its_parameters():
    """What a rule cannot take is said afterwards; the pass goes on."""

    def scaled(m: Any, x: Tensor) -> Tensor:
        return (x[:, None].expand(-1, 7, -1) @ m.m + m.table * m.mean[None]).mean(1)

    model = Named(scaled).double()
    with Recording.of(model) as recording:
        outputs = model(VECTOR)
    assert torch.equal(outputs, model(VECTOR))
    assert "its rule does not take this call (RuntimeError" in recording.refused["table"]
    assert set(recording.refused) == {"table"}


def test_calls_without_gradients_refuse_nothing():
    def watched(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            _ = m.w * m.w, m.w @ m.m, F.linear(m.m, m.m)
        return x @ m.m

    model = Named(watched).double()
    with Recording.of(model) as recording:
        model(VECTOR)
    assert recording.refused == {}
