"""The support matrix, row by row: what torch does with a construct, and what curvkit does; a torch that behaves otherwise fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from oracles import classes, dense, normal, relative, seeded
from test_preflight import Applying, DetachedSine, OnceSine, Sine
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch_modules import Around, Calling

from curvkit.errors import CurvkitError, UnsupportedModel
from curvkit.losses import BatchLoss
from curvkit.measures import sharpness
from curvkit.objectives import Objective
from curvkit.operators import DifferenceHessian, Hessian
from curvkit.operators.preflight import preflight, refuse_wrong
from curvkit.operators.support import SUPPORT, page
from curvkit.operators.suspects import suspects

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


@dataclass(frozen=True)
class Sample:
    """A model with the construct, and the same function written so that torch is right."""

    model: Callable[[], nn.Module]
    truth: Callable[[], nn.Module] | None = None
    loss: Any = F.cross_entropy
    train: bool = False


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Inner(nn.Module):
    """The same without checkpointing, with the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Inside(nn.Sequential):
    """Scriptable."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Looked(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 6, sparse=sparse)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.embedding(torch.arange(len(x)) % 6))


class Quantised(nn.Module):
    """Weights in eight bits: numbers without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).T


class ByHand(nn.Module):
    """w = g v / ||v||, by torch's fused function or written out."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.v, self.g, self.head = nn.Linear(4, 6), nn.Parameter(torch.rand(6, 1)), nn.Linear(6, 3)
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        v = self.v.weight
        w = v * (self.g / v.norm(dim=1, keepdim=True)) if self.written_out else torch._weight_norm(v, self.g, 0)
        return self.head(torch.tanh(F.linear(x, w, self.v.bias)))


def sdpa(x: Tensor) -> Tensor:
    heads = x.reshape(len(x), 1, 3, 2)
    return F.scaled_dot_product_attention(heads, heads, heads)


def by_hand(x: Tensor) -> Tensor:
    q = x.reshape(len(x), 1, 3, 2)
    return (q @ q.transpose(-1, -2) / 2**0.5).softmax(-1) @ q


def ctc(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])[:, None].expand(-1, 2, -1).log_softmax(-1)  # 4 steps, 2 sequences, 3 classes
    return F.ctc_loss(logits, torch.ones(2, 1, dtype=torch.long), torch.tensor([4, 4]), torch.tensor([1, 1]))


def flex(x: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    heads = x.reshape(len(x), 1, 3, 2)
    return flex_attention(heads, heads, heads)  # type: ignore[return-value]


def self_attention() -> nn.Module:
    return Calling(lambda m, x: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(4, 2, batch_first=True))


def encoder() -> nn.Module:
    return Around(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3, 4)


SAMPLES: dict[str, Sample] = {
    "layers of torch.nn": Sample(lambda: Around(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6)), 6)),
    "ReLU and max-pool": Sample(lambda: Around(nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)), 6)),
    "tied, frozen and unused parameters": Sample(lambda: CASES["frozen"]().model),
    "mse_loss": Sample(
        lambda: Around(nn.Tanh(), 6), loss=lambda m, b: F.mse_loss(m(b[0]), torch.eye(3, dtype=b[0].dtype)[b[1]])
    ),
    "attention with fused kernels": Sample(lambda: Around(Calling(sdpa), 6), lambda: Around(Calling(by_hand), 6)),
    "MultiheadAttention": Sample(lambda: Around(self_attention(), 3, 4)),
    "TransformerEncoderLayer, eval": Sample(encoder),
    "LSTM, GRU, RNN": Sample(lambda: Around(nn.LSTM(4, 5, batch_first=True), 3, 4)),
    "weight_norm": Sample(lambda: Around(parametrizations.weight_norm(nn.Linear(6, 6)), 6)),
    "torch._weight_norm, called by hand": Sample(lambda: ByHand(False), lambda: ByHand(True)),
    "cast to bfloat16 or float16 inside the model": Sample(
        lambda: Around(Calling(lambda x: x.bfloat16().to(x.dtype)), 6), lambda: Around(nn.Identity(), 6)
    ),
    "spectral_norm, train mode": Sample(lambda: Around(parametrizations.spectral_norm(nn.Linear(6, 6)), 6), train=True),
    "spectral_norm, eval mode": Sample(lambda: Around(parametrizations.spectral_norm(nn.Linear(6, 6)), 6)),
    "dropout, train mode": Sample(lambda: Around(nn.Dropout(0.5), 6), train=True),
    "BatchNorm, train mode": Sample(lambda: Around(nn.BatchNorm1d(6), 6), train=True),
    "once_differentiable function": Sample(
        lambda: Around(Applying(OnceSine), 6), lambda: Around(Calling(torch.sin), 6)
    ),
    "function that saves detached tensors": Sample(
        lambda: Around(Applying(DetachedSine), 6), lambda: Around(Calling(torch.sin), 6)
    ),
    "differentiable custom function": Sample(lambda: Around(Applying(Sine), 6), lambda: Around(Calling(torch.sin), 6)),
    "checkpoint, non-reentrant": Sample(lambda: Around(Checkpointed(False), 6), lambda: Around(Inner(), 6)),
    "checkpoint, reentrant": Sample(lambda: Around(Checkpointed(True), 6), lambda: Around(Inner(), 6)),
    "torch.compile": Sample(
        lambda: torch.compile(Around(nn.Tanh(), 6), backend="aot_eager"),  # type: ignore[return-value]
        lambda: Around(nn.Tanh(), 6),
    ),
    "TorchScript": Sample(lambda: torch.jit.trace(Inside(), normal(4, 4).float()), Inside),
    "Embedding(sparse=True)": Sample(lambda: Around(Looked(True), 6), lambda: Around(Looked(False), 6)),
    "ctc_loss": Sample(lambda: Around(nn.Tanh(), 6), loss=ctc),
    "multi_margin_loss": Sample(lambda: Around(nn.Tanh(), 6), loss=lambda m, b: F.multi_margin_loss(m(b[0]), b[1])),
    "quantised weights": Sample(Quantised),
    "flex_attention": Sample(lambda: Around(Calling(flex), 6)),
}


def made(build: Callable[[], nn.Module], train: bool = False) -> nn.Module:
    with seeded():
        model = build()
    return model.double().train(train)


def batch_of(sample: Sample) -> tuple[Tensor, Tensor]:
    if sample is SAMPLES["tied, frozen and unused parameters"]:
        return CASES["frozen"]().data[0]  # type: ignore[no-any-return]
    return normal(4, 4), classes(4, num=3)


def objective(sample: Sample, model: nn.Module) -> Objective:
    loss = sample.loss if sample.loss is F.cross_entropy else BatchLoss(sample.loss)
    return Objective(model, loss, [batch_of(sample)])


def by_torch_alone(sample: Sample, model: nn.Module, vs: Tensor) -> Tensor:
    """Reverse over reverse with the user's own flags, as any other tool would do it."""
    x, y = batch_of(sample)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        return sample.loss(model(x), y) if sample.loss is F.cross_entropy else sample.loss(model, (x, y))

    rows = []
    for v in vs.unbind(1):
        gradient = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
        pieces = [
            piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        dot = sum((g * piece).sum() for g, piece in zip(gradient, pieces, strict=True))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(dot, parameters, materialize_grads=True)]))  # type: ignore[arg-type]
    return torch.stack(rows, 1)


def quotients(sample: Sample, model: nn.Module, vs: Tensor) -> Tensor:
    """The truth: central differences of gradients by `.backward()`, in float64, on the function written right if there is one."""
    if sample.truth is not None:
        own = model.state_dict()
        model = made(sample.truth, sample.train)
        model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in own.items()})
    x, y = batch_of(sample)
    parameters = [p for p in model.parameters() if p.requires_grad]
    theta = [p.detach().clone() for p in parameters]

    def gradient(v: Tensor, h: float) -> Tensor:
        with torch.no_grad():
            for p, w, piece in zip(parameters, theta, v.split([p.numel() for p in parameters]), strict=True):
                p.copy_(w + h * piece.view_as(w))
        for p in parameters:
            p.grad = None
        (sample.loss(model(x), y) if sample.loss is F.cross_entropy else sample.loss(model, (x, y))).backward()
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).flatten() for p in parameters])

    made_ = torch.stack([(gradient(v, 1e-6) - gradient(v, -1e-6)) / 2e-6 for v in vs.unbind(1)], 1)
    with torch.no_grad():
        for p, w in zip(parameters, theta, strict=True):
            p.copy_(w)
            p.grad = None
    return made_


def directions(model: nn.Module) -> Tensor:
    V = normal(sum(p.numel() for p in model.parameters() if p.requires_grad), 2)
    return V / V.norm(dim=0)


def measured(sample: Sample, model: nn.Module) -> Tensor:
    it = objective(sample, model)
    refuse_wrong(preflight(it))
    return Hessian(it).matvec(directions(model)[:, 0])


def outcome_of_torch(sample: Sample) -> str:
    model = made(sample.model, sample.train)
    if not any(p.requires_grad for p in model.parameters()):
        return "raises"
    V = directions(model)
    try:
        first = by_torch_alone(sample, model, V)
        again = by_torch_alone(sample, model, V)
    except (RuntimeError, NotImplementedError):
        return "raises"
    if not torch.equal(first, again):
        return "random"
    return "right" if relative(first, quotients(sample, model, V)) <= 1e-5 else "wrong"


pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{name}")
    for name in ("UserWarning", "DeprecationWarning", "FutureWarning", "torch.jit.TracerWarning")
]


def test_every_row_has_a_sample():
    assert {*SAMPLES} == {*SUPPORT}


@pytest.mark.parametrize("name", SUPPORT)
def test_torch_alone_does_what_the_row_says(name: str):
    """By torch's own double backward with the flags as they are; the truth is a difference of gradients."""
    assert outcome_of_torch(SAMPLES[name]) == SUPPORT[name].torch


@pytest.mark.parametrize("name", SUPPORT)
def test_curvkit_does_what_the_row_says(name: str):
    """Right or handled: equal to differences of gradients; refused or raises: an error of curvkit's own."""
    sample, row = SAMPLES[name], SUPPORT[name]
    model = made(sample.model, sample.train)
    if row.curvkit in ("right", "handled"):
        it, V = objective(sample, model), directions(model)
        refuse_wrong(preflight(it))
        assert relative(Hessian(it).matmat(V), quotients(sample, model, V)) <= 1e-5
        return
    kind = UnsupportedModel if row.curvkit == "raises" else CurvkitError
    text = (
        "no second derivative|cannot be differentiated twice"
        if row.curvkit == "raises"
        else "Objective: |preflight: |ParameterSpace: |Hessian: the model uses"
    )
    with pytest.raises(kind, match=text):
        measured(sample, model)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, normal(4, 4).float())])
def test_torchscript_is_measured_from_end_to_end(make: Callable[[nn.Module], Any]):
    """It takes no hooks, keeps its parameters elsewhere, and its copies share leaves of graphs; the eager module is the truth."""
    eager = made(Inside).float()
    data = [(normal(8, 4).float(), classes(8, num=3))]
    expected = sharpness(Objective(eager, F.cross_entropy, data), seed=0)
    got = sharpness(Objective(make(eager), F.cross_entropy, data), seed=0)
    assert got.value == pytest.approx(expected.value, rel=1e-5)
    assert got.eigenpairs.residual_dtype == expected.eigenpairs.residual_dtype == "float64"


KEPT = F.embedding, torch.embedding


class Finding(nn.Module):
    """A look-up whose gradient is sparse, by a function."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.table, self.head, self.way = nn.Parameter(normal(6, 4)), nn.Linear(4, 3), way

    def forward(self, index: Tensor) -> Tensor:
        sparse: Any = {
            "F.embedding": lambda: F.embedding(index, self.table, sparse=True),
            "imported": lambda: KEPT[0](index, self.table, None, None, 2.0, False, True),
            "torch's own": lambda: KEPT[1](self.table, index, sparse=True),
            "gather": lambda: torch.gather(self.table, 0, index[:, None].expand(-1, 4), sparse_grad=True),
            "dense": lambda: self.table[index],
        }[self.way]
        return self.head(torch.tanh(sparse()))


@pytest.mark.parametrize("way", ["F.embedding", "imported", "torch's own", "gather"])
def test_look_ups_with_sparse_gradients(way: str):
    """Dense autograd of the same look-up by indexing."""
    data = [(classes(5, num=6), classes(5, num=3)), (classes(3, num=6, seed=1), classes(3, num=3, seed=1))]
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    truth = dense(made(lambda: Finding("dense")), lambda call: F.cross_entropy(call(x), y))
    it = Objective(made(lambda: Finding(way)), F.cross_entropy, data)
    assert relative(it.gradient(), truth.gradient) <= 1e-14
    for make, allowed in ((Hessian, 1e-14), (DifferenceHessian, 1e-8)):  # differences keep about 1e-11
        H = make(it)
        assert relative(H.gradient, truth.gradient) <= 1e-14
        assert relative(H.matmat(torch.eye(H.n, dtype=torch.float64)), truth.hessian) <= allowed
    assert preflight(it).verdict == "right"
    assert (F.embedding, torch.embedding) == KEPT


def test_hooks_are_removed_when_the_model_raises():
    class Raising(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise LookupError("no")

    model = nn.Sequential(nn.Linear(4, 4), Raising(4, 3))
    with pytest.raises(LookupError):
        suspects(Objective(model, F.cross_entropy, [(normal(4, 4).float(), classes(4, num=3))]))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", SUPPORT)
def test_differences_do_what_the_row_says(name: str):
    sample, row = SAMPLES[name], SUPPORT[name]
    model = made(sample.model, sample.train)
    if row.difference == "right":
        it, V = objective(sample, model), directions(model)
        assert relative(DifferenceHessian(it).matmat(V), quotients(sample, model, V)) <= 1e-5
        return
    if (
        row.difference == "smooth only"
    ):  # no kink lies near these points; a kink that does is refused, see test_difference
        it, V = objective(sample, model), directions(model)
        assert relative(DifferenceHessian(it).matmat(V), quotients(sample, model, V)) <= 1e-5
        return
    with pytest.raises((CurvkitError, RuntimeError)):
        DifferenceHessian(objective(sample, model)).matvec(directions(model)[:, 0])


@pytest.mark.parametrize("name", ["once_differentiable function", "function that saves detached tensors"])
def test_a_refusal_names_the_module_and_the_remedy(name: str):
    with pytest.raises(UnsupportedModel, match=r"module 'module' \(Applying\), the function .*rule='difference'"):
        refuse_wrong(preflight(objective(SAMPLES[name], made(SAMPLES[name].model))))


def test_the_page_is_the_table():
    """Written by `python -c "from curvkit.operators.support import page; print(page(), end='')" > docs/support.md`."""
    assert PAGE.read_text(encoding="utf-8") == page()
    assert {line.count("|") for line in page().splitlines() if line.startswith("|")} == {6}
